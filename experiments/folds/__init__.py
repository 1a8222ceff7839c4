"""What `run.py --folds K` does: a process for each fold, then one result over all."""
