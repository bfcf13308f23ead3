"""One training loop for every stage and every distillation, and what it is fed."""
