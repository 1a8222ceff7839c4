"""Callbacks: checkpoints, EMA, progress, metrics rows, preemption, checks for NaN."""
