"""Parts of `sweep.py`: a search space, its trials, their processes."""
