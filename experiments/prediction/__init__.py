"""Parts of `predict.py` and `submit.py`: rows, networks, a checked submission."""
