"""The verbs that a person types, and what they are made of."""
import os

from lightning_modules import check_neighbours

check_neighbours("models", "datamodules", "lightning_modules", "experiments")

# Before torch loads OpenMP: a thread that waits for another gives its core away. Spinning halves the speed beside other load and gains nothing.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
