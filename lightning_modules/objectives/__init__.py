"""Losses, distillation losses, metrics and the encoding of targets."""
