"""The continual-learning comparison; see README.md."""
