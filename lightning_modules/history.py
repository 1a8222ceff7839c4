"""metrics.csv: the history of a run, one row a logging point, whatever the tracker and however often the run was resumed."""
import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

FIRST = ["epoch", "step"]


def read_history(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv as numbers, empty cells left out; [] when there is no file."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return [{key: float(value) for key, value in row.items() if value not in ("", None)} for row in csv.DictReader(file)]


class History(Logger):
    """A Lightning logger that appends rows and, at a resume, first drops those after the checkpoint's step.

    `step` counts optimizer steps done; a row of training metrics carries the step it was taken after, a validation row the epoch's last.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.columns = path, []

    name = property(lambda self: "history")
    version = property(lambda self: None)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """config.yaml holds them."""

    @rank_zero_only
    def cut(self, step: int) -> None:
        """Keep the rows up to and including optimizer step `step`; 0 starts an empty history."""
        rows = [row for row in read_history(self.path) if row["step"] <= step and step > 0]
        self._rewrite(rows)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {**metrics, "step": int(metrics.get("step", step))}
        if new := [key for key in row if key not in self.columns]:
            self.columns += new
            self._rewrite([*read_history(self.path), row])
            return
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(_text(row))

    def _rewrite(self, rows: list[dict[str, float]]) -> None:
        self.columns = FIRST + [key for key in dict.fromkeys(key for row in rows for key in row) if key not in FIRST]
        partial = self.path.with_name(f".{self.path.name}.partial")
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(map(_text, rows))
        os.replace(partial, self.path)


def _text(row: Mapping[str, float]) -> dict[str, str]:
    return {key: f"{value:.10g}" for key, value in row.items()}
