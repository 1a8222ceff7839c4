"""Columns of a table as inputs beside the image, or as targets beside the target. Only pandas and numpy: inference
uses it too.

Legend: N rows, C columns.
"""

from typing import Any

import numpy as np
import pandas as pd

from datamodules.tables.table import Report, near_miss
from datamodules.tables.targets import TRUTH, numbers


def names_of(given: str | list[str] | tuple[str, ...] | None, flag: str) -> list[str]:
    """`Eyes,Face` or a list of names -> names; [] of None. Raises ValueError for none, or one named twice."""
    if given is None:
        return []
    names = [str(name).strip() for name in (given.split(",") if isinstance(given, str) else given)]
    if not names or "" in names or len({*names}) < len(names):
        raise ValueError(f"{flag} {given}: names of columns, each once, as Eyes,Face")
    return names


def check_use(names: list[str], scheme: dict[str, Any], flag: str) -> None:
    """Raises ValueError for a column that is the target or the id."""
    for name in names:
        for others, what in (
            (scheme["targets"], "a target (--target says what is predicted)"),
            ([scheme["id_column"]], "the id"),
        ):
            if name in others:
                raise ValueError(f"{flag}: {name} is {what}")


def read_columns(frame: pd.DataFrame, names: list[str], file: str, report: Report) -> np.ndarray:
    """(N, C) float64 of numbers, or of what is true or false; a column that is missing and rows that are no number are
    reported, and 0."""
    for name in names:
        if name not in frame:
            report.add(file, f"has no column {name!r}{near_miss(name, frame.columns)}")
    values = np.zeros((len(frame), len(names)))
    for place, name in enumerate(names):
        if name in frame:
            text = frame[name].map(lambda cell: str(TRUTH.get(cell.lower(), cell)))
            values[:, place] = numbers(text.to_frame(), name, file, report)
    return values


def statistics(names: list[str], values: np.ndarray) -> dict[str, Any]:
    """names, mean and std of (N, C), as kept in `spec["columns"]`; plain values. The std of a constant is 1."""
    mean, std = values.mean(0), values.std(0)
    return {"names": list(names), "mean": mean.tolist(), "std": np.where(std > 0, std, 1.0).tolist()}


def standardised(values: np.ndarray, columns: dict[str, Any]) -> np.ndarray:
    """(N, C) in own units -> (N, C) float32 of mean 0 and std 1 over the rows that `columns`, of `statistics`, are
    of."""
    return ((values - np.array(columns["mean"])) / np.array(columns["std"])).astype(np.float32)


def ranged(values: np.ndarray) -> np.ndarray:
    """(N, C) -> (N, C) float32 in 0 to 1 by the range of each column; a constant is 0."""
    low, span = values.min(0), np.ptp(values, axis=0)
    return ((values - low) / np.where(span > 0, span, 1)).astype(np.float32)
