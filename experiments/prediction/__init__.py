"""What `predict.py` and `submit.py` do: rows, networks, a checked submission."""
