"""Predictions of each row, `oof.csv` and `predictions.csv`, scored row by row, and the bootstrap over rows.

Legend: N rows, K classes, labels or targets, B draws.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

DRAWS, SEED = 2000, 0  # of the bootstrap
SLOW_DRAWS = 300  # of metrics that are no mean over rows
CLASSES, LABELS, VALUES = "classification", "multilabel", "regression"
TINY = np.finfo(np.float64).eps
FILES = ("oof.csv", "predictions.csv")  # the first that both sides have


@dataclass(frozen=True)
class Rows:
    """Predictions with targets. `ids` (N,) text, sorted; `target` (N, K) numbers, or (N,) class names; `prediction` (N,
    K), or (N,) class names where only the likeliest was written; `names` (K,) of the classes, labels or targets."""

    ids: np.ndarray
    target: np.ndarray
    prediction: np.ndarray
    names: list[str]
    task: str

    @cached_property
    def key(self) -> str:
        """Equal for equal ids."""
        return hashlib.sha256("\n".join(self.ids).encode()).hexdigest()

    def at(self, ids: np.ndarray) -> "Rows":
        """The rows of these ids, which must all be there, in their order."""
        if len(ids) == len(self.ids):
            return self
        place = np.searchsorted(self.ids, ids)
        return Rows(self.ids[place], self.target[place], self.prediction[place], self.names, self.task)

    def same_targets(self, other: "Rows") -> bool:
        """Whether rows of the same ids have the same targets, up to the last digits of text."""
        if self.target.shape != other.target.shape or self.task != other.task:
            return False
        return (
            bool((self.target == other.target).all())
            if self.task == CLASSES
            else np.allclose(self.target, other.target, rtol=1e-6)
        )

    def classes(self) -> np.ndarray:
        """(N,) int64: the target's place among `names`."""
        known = {name: place for place, name in enumerate(self.names)}
        return np.array([known[name] for name in self.target])


def read_rows(files: list[Path], task: str | None = None) -> Rows | None:
    """The rows of all these files together; None where there are none with targets. `task` as in the run's config;
    None: what they look like. Raises ValueError for files that are not lightning_modules/callbacks/predictions.py's."""
    tables = [pd.read_csv(file, dtype=str, keep_default_na=False) for file in files if file.is_file()]
    tables = [
        table
        for table in tables
        if {"target"} & {*table.columns} or any(name.startswith("target_") for name in table.columns)
    ]
    if not tables or not sum(map(len, tables)):
        return None
    table, where = pd.concat(tables, ignore_index=True), files[0]
    outputs = [name for name in table.columns[1:] if name == "prediction" or name.startswith("prediction_")]
    targets = [name for name in table.columns[1:] if name == "target" or name.startswith("target_")]
    if table.isna().any(axis=None) or not outputs:
        raise ValueError(f"{where}: no table of predictions ({', '.join(table.columns[:5])} ...)")
    ids = table.iloc[:, 0].to_numpy(dtype=str)
    order = np.argsort(ids, kind="stable")
    if (ids[order][1:] == ids[order][:-1]).any():
        raise ValueError(f"{where}: an id is there twice")
    table, names = table.iloc[order], [name.removeprefix("prediction_") for name in outputs]
    only_likeliest = outputs == ["prediction"] and "probability" in table.columns
    if only_likeliest or task == CLASSES or task is None and targets == ["target"] and len(outputs) > 1:
        target, task = table["target"].to_numpy(dtype=str), CLASSES
        prediction = (
            table["prediction"].to_numpy(dtype=str) if only_likeliest else table[outputs].astype(float).to_numpy()
        )
        strangers = set() if only_likeliest else {*target} - {*names}
        if strangers:
            raise ValueError(f"{where}: no column prediction_{min(strangers)} for the target {min(strangers)}")
    else:
        target, prediction = table[targets].astype(float).to_numpy(), table[outputs].astype(float).to_numpy()
        task = task or (LABELS if len(targets) > 1 and np.isin(target, (0, 1)).all() else VALUES)
        if target.shape != prediction.shape:
            raise ValueError(f"{where}: {len(targets)} targets and {len(outputs)} predictions")
    return Rows(ids[order], target, prediction, names, task)


def parts(rows: Rows, metric: str) -> np.ndarray | None:
    """(N, M) numbers of each row whose means over rows give the metric (`of_means`); None for a metric that is no such
    thing."""
    target, prediction = rows.target, rows.prediction
    if rows.task == CLASSES and prediction.ndim == 1:
        return (prediction == target)[:, None].astype(float) if metric == "acc1" else None
    if rows.task == VALUES:
        apart = target - prediction
        found = {"rmse": apart**2, "mse": apart**2, "mae": np.abs(apart)}
        return np.concatenate([apart**2, target, target**2], axis=1) if metric == "r2" else found.get(metric)
    if rows.task == LABELS:
        return (
            -np.log(np.where(target > 0.5, prediction, 1 - prediction).clip(TINY, 1))
            if metric in ("loss", "log_loss")
            else None
        )
    own = prediction[np.arange(len(target)), rows.classes()]
    found = {
        "acc1": lambda: np.array(rows.names)[prediction.argmax(1)] == target,
        "acc5": lambda: (prediction > own[:, None]).sum(1) < 5,
        "loss": lambda: -np.log((own / prediction.sum(1)).clip(TINY, 1)),
    }
    found["log_loss"] = found["loss"]
    return found[metric]()[:, None].astype(float) if metric in found else None


def of_means(means: np.ndarray, metric: str) -> np.ndarray:
    """(...,) metric from (..., M) means of `parts`."""
    if metric == "r2":
        error, mean, square = np.split(means, 3, axis=-1)
        return (1 - error / (square - mean**2)).mean(-1)
    return (np.sqrt(means) if metric == "rmse" else means).mean(-1)


def score(rows: Rows, metric: str) -> float:
    """The metric over all rows. Raises ValueError for a metric that these rows do not give."""
    found = parts(rows, metric)
    return float(of_means(found.mean(0), metric)) if found is not None else _slow(rows, metric)


def _slow(rows: Rows, metric: str) -> float:
    """A metric of whole arrays, by lightning_modules.objectives.metrics. Raises ValueError."""
    from lightning_modules.objectives import metrics  # torch: seconds

    if rows.prediction.ndim == 1:
        raise ValueError(f"{metric} needs the probabilities of all classes")
    target = rows.classes() if rows.task == CLASSES else rows.target
    return metrics.score(metric, target, rows.prediction, {"task": rows.task})


def bootstrap(tables: list[Rows], metric: str, draws: int = DRAWS, seed: int = SEED) -> np.ndarray:
    """(B, len(tables)) the metric of each table over the same draws of rows with replacement; all tables have the same
    rows.

    Metrics that are no mean over rows take 300 draws. Raises ValueError for a metric that these rows do not give.
    """
    count, rng = len(tables[0].ids), np.random.default_rng(seed)
    found = [part for rows in tables if (part := parts(rows, metric)) is not None]
    if len(found) < len(tables):
        picked = [rng.integers(count, size=count) for _ in range(min(draws, SLOW_DRAWS))]
        return np.array(
            [
                [
                    _slow(Rows(rows.ids[at], rows.target[at], rows.prediction[at], rows.names, rows.task), metric)
                    for rows in tables
                ]
                for at in picked
            ]
        )
    table, width = np.concatenate(found, axis=1), found[0].shape[1]
    means = (
        np.stack([np.bincount(rng.integers(count, size=count), minlength=count) @ table for _ in range(draws)]) / count
    )
    return of_means(means.reshape(draws, len(tables), width), metric)


def fold_score(files: list[Path], metric: str | None, task: str | None) -> float | None:
    """The metric over the rows that the folds held out, each row by the fold that has not seen it; None where the files
    do not give it."""
    try:
        rows = read_rows(files, task) if files and metric else None
        return score(rows, metric.split("/")[-1]) if rows and metric else None
    except ValueError:
        return None
