"""The verbs that a person types, and what they are made of."""
from lightning_modules import check_neighbours

check_neighbours("models", "datamodules", "lightning_modules", "experiments")
