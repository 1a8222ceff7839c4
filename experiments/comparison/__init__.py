"""What `compare.py` does: read runs, fold seeds, compare pairs, draw and write."""
