"""What `sweep.py` does: a search space, its trials, their processes."""
