"""What is asked of a stage or a chain, what it answers, and what the answers are worth."""
