"""What hangs on a Trainer: checkpoints, EMA, progress, metrics rows, preemption, checks for NaN."""
