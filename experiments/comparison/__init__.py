"""Steps of `compare.py`: read runs, fold seeds, compare pairs, draw and write."""
