"""The verbs that a person types, and what they are made of."""

import os

from lightning_modules import check_neighbours

check_neighbours("models", "datamodules", "lightning_modules", "experiments")
if "OMP_WAIT_POLICY" not in os.environ:
    # OpenMP's threads spin while they wait for one another: some 10 ms by default, which costs a multiple of the step
    # beside other load
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when torch is imported; measured by benchmark.py load
