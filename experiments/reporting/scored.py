"""Numbers on the predictions of a scored split: the worst errors, confusion, calibration; average precision of labels;
of a regression predicted against true. The run's page and the trackers show them.

Legend: N pictures, K classes or labels, T targets.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lightning_modules.objectives.metrics import average_precisions
from models.spec import Spec

WORST, MOST_ROWS, BINS = 32, 20, 15
MOST_LABELS, MOST_TARGETS = 100, 4
TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Scored:
    """`target` (N,) int64 classes, (N, K) 0 or 1, (N, T) own units; `prediction` (N, K) or (N, T), None where only the
    likeliest class was written. Of a classification `likeliest` (N,) and its probability `confidence` (N,), else both
    are empty. `dropped`: rows whose prediction is no number."""

    file: str
    task: str
    names: list[str]
    ids: np.ndarray
    target: np.ndarray
    prediction: np.ndarray | None
    likeliest: np.ndarray = field(default_factory=lambda: np.empty(0))
    confidence: np.ndarray = field(default_factory=lambda: np.empty(0))
    dropped: int = 0

    @property
    def outputs(self) -> np.ndarray:
        """`prediction` where it is known to be there: of labels and targets."""
        if self.prediction is None:
            raise ValueError(f"{self.file} has the likeliest class alone")
        return self.prediction


def output_names(spec: Spec) -> list[str]:
    """The names of the classes, labels or targets."""
    return list(spec["class_names"] or spec["target_names"] or ())


def read(folder: Path, spec: Spec, split: str = "") -> Scored | None:
    """predictions.csv where it has targets, else oof.csv; None without either, or for an empty one. `split`: what
    predictions.csv is of, for people."""
    names = output_names(spec)
    targets = (
        ["target"] if spec["task"] == "classification" or len(names) == 1 else [f"target_{name}" for name in names]
    )
    for name in ("predictions.csv", "oof.csv"):
        if not (folder / name).is_file():
            continue
        columns = list(pd.read_csv(folder / name, nrows=0).columns)
        if set(targets) <= set(columns):
            scored = _read(folder / name, spec, names, targets, columns)
            return (
                replace(scored, file=f"{name} ({split})") if scored and split and name == "predictions.csv" else scored
            )
    return None


def _read(file: Path, spec: Spec, names: list[str], targets: list[str], columns: list[str]) -> Scored | None:
    classes, predictions = spec["task"] == "classification", [f"prediction_{name}" for name in names]
    if len(names) == 1:
        predictions = ["prediction"]
    likeliest_only = classes and not set(predictions) <= set(columns)
    numbers = ["probability"] if likeliest_only else predictions
    identity = spec.get("id_column") if spec.get("id_column") in columns else columns[0]
    words = [identity] + targets * classes + ["prediction"] * likeliest_only
    numeric = numbers + targets * (not classes)
    rows = pd.read_csv(
        file,
        usecols=[*words, *numeric],
        dtype=dict.fromkeys(words, str) | dict.fromkeys(numeric, np.float32 if classes else np.float64),
        keep_default_na=False,
        na_values={column: [""] for column in numeric},
    )
    whole = np.isfinite(rows[numeric].to_numpy()).all(1)
    dropped, rows = int((~whole).sum()), rows[whole]
    if not len(rows):
        return None
    values, ids, place = rows[numbers].to_numpy(), rows[identity].to_numpy(), {name: k for k, name in enumerate(names)}
    if not classes:
        return Scored(file.name, spec["task"], names, ids, rows[targets].to_numpy(), values, dropped=dropped)
    target = rows["target"].map(place).to_numpy(np.int64)
    if likeliest_only:
        likeliest = rows["prediction"].map(place).to_numpy(np.int64)
        return Scored(file.name, spec["task"], names, ids, target, None, likeliest, values[:, 0], dropped)
    return Scored(file.name, spec["task"], names, ids, target, values, values.argmax(1), values.max(1), dropped)


def calibration(
    confidence: np.ndarray, right: np.ndarray, bins: int = BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """(count, mean confidence, share right) of each of `bins` equal bins of 0-1, 0 for an empty one, and the expected
    calibration error: the mean distance of the two weighted by count (Guo et al. 2017, arXiv 1706.04599)."""
    place = np.minimum((np.asarray(confidence, np.float64) * bins).astype(int), bins - 1)
    counts = np.bincount(place, minlength=bins)
    sure, hits = (np.bincount(place, weights=values, minlength=bins) / counts.clip(1) for values in (confidence, right))
    return counts, sure, hits, float((counts * np.abs(sure - hits)).sum() / counts.sum())


def confused(target: np.ndarray, likeliest: np.ndarray, classes: int) -> np.ndarray:
    """(P, 3) true class, predicted class, count of every pair that is confused, the most frequent first; of equals the
    first."""
    wrong = target != likeliest
    pairs, counts = np.unique(target[wrong].astype(np.int64) * classes + likeliest[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return np.stack([pairs // classes, pairs % classes, counts], 1)[order]


def confusion(target: np.ndarray, likeliest: np.ndarray, classes: int, picked: np.ndarray | None = None) -> np.ndarray:
    """(M, M + 1) counts of the rows whose true class is one of the M picked ones (left out: all), by the class
    predicted: each of them, and any other."""
    picked = np.arange(classes) if picked is None else picked
    size, place = len(picked), np.full(classes, len(picked))
    place[picked] = np.arange(size)
    rows, columns = place[target], place[likeliest]
    inside = rows < size
    return np.bincount(rows[inside] * (size + 1) + columns[inside], minlength=size * (size + 1)).reshape(size, -1)


def worst_confused(target: np.ndarray, likeliest: np.ndarray, classes: int, most: int) -> np.ndarray:
    """At most so many classes, in order: all of few, else those of the pairs that are most often confused."""
    if classes <= most:
        return np.arange(classes)
    picked: list[int] = []
    for pair in confused(target, likeliest, classes)[:, :2].tolist():
        new = [each for each in pair if each not in picked]
        if len(picked) + len(new) > most:
            break
        picked += new
    return np.sort(np.array(picked, np.int64))


def by_class(target: np.ndarray, likeliest: np.ndarray, classes: int) -> np.ndarray:
    """(K, 5): rows of the class, recall, rows predicted as it, precision, F1; NaN of none."""
    return by_counts(
        *(np.bincount(each, minlength=classes) for each in (target, likeliest, target[target == likeliest]))
    )


def by_label(target: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """As `by_class` of labels (N, K), which are predicted above 0.5."""
    there, predicted = target > 0.5, prediction > 0.5
    return by_counts(there.sum(0), predicted.sum(0), (there & predicted).sum(0))


def by_counts(there: np.ndarray, predicted: np.ndarray, hits: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.stack([there, hits / there, predicted, hits / predicted, 2 * hits / (there + predicted)], 1)


def deciles(target: np.ndarray, residual: np.ndarray) -> list[dict[str, float]]:
    """Tenths of the rows by true value (N,): lowest and highest, count, mean residual, its 10 % and 90 % quantile, root
    mean square."""
    groups = [rows for rows in np.array_split(np.argsort(target, kind="stable"), 10) if len(rows)]
    return [
        {
            "low": target[rows].min(),
            "high": target[rows].max(),
            "count": len(rows),
            "mean": residual[rows].mean(),
            "q10": np.quantile(residual[rows], 0.1),
            "q90": np.quantile(residual[rows], 0.9),
            "rms": np.sqrt((residual[rows] ** 2).mean()),
        }
        for rows in groups
    ]


def summary(scored: Scored) -> dict[str, Any]:
    """What a page shows: `worst` rows (an id each, and what makes it wrong), the `order` they stand in, and the numbers
    of the task."""
    return {"classification": _classes, "multilabel": _labels, "regression": _targets}[scored.task](scored)


def _classes(scored: Scored) -> dict[str, Any]:
    names, classes = scored.names, len(scored.names)
    wrong = np.flatnonzero(scored.target != scored.likeliest)
    true = (
        None if scored.prediction is None else scored.prediction[np.arange(len(scored.target)), scored.target]
    )  # (N,)
    rows = wrong[np.argsort(-scored.confidence[wrong] if true is None else true[wrong], kind="stable")[:WORST]]
    worst = [
        {
            "id": str(scored.ids[row]),
            "true": names[scored.target[row]],
            "true_probability": None if true is None else float(true[row]),
            "predicted": names[scored.likeliest[row]],
            "probability": float(scored.confidence[row]),
        }
        for row in rows
    ]
    order = "The most confident wrong answers" if true is None else "Those whose true class was rated least probable"
    each = by_class(scored.target, scored.likeliest, classes)
    counts = confusion(scored.target, scored.likeliest, classes)[:, :-1] if classes <= MOST_ROWS else None
    return {
        "worst": worst,
        "order": f"{order} first.",
        "pairs": [
            (names[a], names[b], count, count / each[a, 0])
            for a, b, count in confused(scored.target, scored.likeliest, classes)[:MOST_ROWS].tolist()
        ],
        "classes": [
            (names[k], each[k, 0], each[k, 1], each[k, 3])
            for k in np.argsort(np.nan_to_num(each[:, 1], nan=2), kind="stable")[:MOST_ROWS]
        ],
        "confusion": counts,
        "share": None if counts is None else counts / counts.sum(1, keepdims=True).clip(1),
        "calibration": _calibration(scored.confidence, scored.target == scored.likeliest),
    }


def _calibration(confidence: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    counts, mean, share, error = calibration(confidence, right)
    return {
        "bins": (counts, mean, share),
        "error": error,
        "confidence": float(confidence.mean(dtype=np.float64)),
        "right": float(right.mean()),
    }


def _labels(scored: Scored) -> dict[str, Any]:
    names, there = scored.names, scored.target > 0.5  # (N, K)
    predicted = np.clip(scored.outputs, TINY, 1 - 1e-7)
    loss = -np.where(there, np.log(predicted), np.log1p(-predicted)).mean(1)

    def mistakes(row: int) -> list[tuple[str, str, float]]:
        """At most two labels missed and two predicted wrongly."""
        kinds = {"missed": there[row] & (predicted[row] <= 0.5), "wrongly": ~there[row] & (predicted[row] > 0.5)}
        return [
            (kind, names[k], float(scored.outputs[row, k]))
            for kind, which in kinds.items()
            for k in np.flatnonzero(which)[:2]
        ]

    precision = average_precisions(scored.target, scored.outputs)
    each, present = by_label(scored.target, scored.outputs), np.flatnonzero(there.any(0))
    order = present[np.argsort(precision[present], kind="stable")][:MOST_LABELS]
    return {
        "worst": [
            {"id": str(scored.ids[row]), "mistakes": mistakes(row)} for row in np.argsort(-loss, kind="stable")[:WORST]
        ],
        "order": "Those with the largest mean cross entropy first.",
        "map": float(precision[present].mean()) if len(present) else None,
        "more": max(0, len(present) - MOST_LABELS),
        "labels": [(names[k], precision[k], each[k, 0], each[k, 2]) for k in order],
        "calibration": _calibration(scored.outputs.ravel(), there.ravel()),
    }


def _targets(scored: Scored) -> dict[str, Any]:
    names, residual = scored.names[:MOST_TARGETS], scored.outputs - scored.target  # (N, T)
    scale = np.maximum(scored.target.std(0), TINY)
    rows = np.argsort(-np.abs(residual / scale).mean(1), kind="stable")[:WORST]
    return {
        "worst": [
            {
                "id": str(scored.ids[row]),
                "values": [
                    (name if len(scored.names) > 1 else "", scored.target[row, t], scored.outputs[row, t])
                    for t, name in enumerate(names)
                ],
            }
            for row in rows
        ],
        "order": "The largest distance between predicted and true first"
        + (", in standard deviations, mean over targets." if len(scale) > 1 else "."),
        "targets": [
            {
                "name": name,
                "true": scored.target[:, t],
                "predicted": scored.outputs[:, t],
                "rmse": float(np.sqrt((residual[:, t] ** 2).mean())),
                "mae": float(np.abs(residual[:, t]).mean()),
                "deciles": deciles(scored.target[:, t], residual[:, t]),
            }
            for t, name in enumerate(names)
        ],
    }
