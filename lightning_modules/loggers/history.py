"""Reads metrics.csv, the history of a run. Standard library only."""

import csv
from pathlib import Path


def read_history(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv as numbers, empty cells and a line cut short left out; [] when there is no file."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        lines = [line for line in file if line.endswith("\n")]
    return [
        {key: float(value) for key, value in row.items() if value not in ("", None)} for row in csv.DictReader(lines)
    ]
