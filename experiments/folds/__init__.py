"""`run.py --folds K`: a subprocess for each fold, then one result over all."""

FOLD_PER_DEVICE = "folds"  # --strategy: one fold on each device, at the same time
