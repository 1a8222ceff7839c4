"""run.py processes that another process starts."""
