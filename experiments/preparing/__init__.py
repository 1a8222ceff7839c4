"""Work of `prepare.py` ahead of training: image cache, a teacher's answers, duplicates."""
