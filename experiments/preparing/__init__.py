"""What `prepare.py` does ahead of training: picture cache, a teacher's answers, duplicates."""
