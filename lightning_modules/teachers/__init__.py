"""Trained networks that a student learns from, live or cached."""
