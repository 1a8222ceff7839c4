"""Optimizers, schedules, layer-wise learning rates, frozen parts."""
