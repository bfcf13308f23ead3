"""Training data: clips with captions, drawn by key, so that any of them can be made again."""
