"""Students of few steps: what they learn, in which rounds, and what bettered them."""
