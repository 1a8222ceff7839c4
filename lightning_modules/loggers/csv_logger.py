"""metrics.csv: the history of a run, one row a logging point, whatever the tracker and however often the run was
resumed."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from lightning_modules.loggers.history import read_history
from lightning_modules.loggers.messages import warn

FIRST = ["epoch", "step"]


class History(Logger):
    """A Lightning logger that appends rows and, at a resume, first drops those after the checkpoint's step.

    `step` counts optimizer steps done; a row of training metrics carries the step it was taken after, a validation row
    the epoch's last. When the disk takes no row, `rows` keeps it and the next one writes it too.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.rows, self.behind = path, read_history(path), False
        self.columns: list[str] = []

    name = property(lambda self: "history")
    version = property(lambda self: None)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """config.yaml holds them."""

    @rank_zero_only
    def cut(self, step: int) -> None:
        """Keep the rows up to and including optimizer step `step`; 0 starts an empty history."""
        self.rows = [row for row in read_history(self.path) if row["step"] <= step and step > 0]
        self._write(None)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row: dict[str, Any] = {"step": step, **metrics}
        row["step"] = int(row["step"])
        self.rows.append({key: float(value) for key, value in _text(row).items()})  # as the file gives them back
        self._write(self.rows[-1])

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self.behind:
            self._write(None)

    def _write(self, row: dict[str, float] | None) -> None:
        """Append one row; or write all of them anew, for new columns and after a failure."""
        try:
            if row is None or self.behind or row.keys() - self.columns:
                self._rewrite()
            else:
                with open(self.path, "a", newline="") as file:
                    csv.DictWriter(file, self.columns).writerow(_text(row))
            self.behind = False
        except OSError as error:
            if not self.behind:
                warn(
                    f"{self.path} could not be written: {error.strerror or error}. Training goes on; its rows are "
                    f"kept for the next try."
                )
            self.behind = True

    def _rewrite(self) -> None:
        self.columns = FIRST + [
            key for key in dict.fromkeys(key for row in self.rows for key in row) if key not in FIRST
        ]
        partial = self.path.with_name(f".{self.path.name}.partial")
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(map(_text, self.rows))
        os.replace(partial, self.path)


def _text(row: Mapping[str, float]) -> dict[str, str]:
    return {key: f"{value:.10g}" for key, value in row.items()}
