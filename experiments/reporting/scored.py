"""What the predictions of a scored split tell, for a run's page: the worst errors, confusion, calibration; average
precision of labels; of a regression predicted against true. The numbers are functions of arrays; the sections make HTML
of them.

Legend: N pictures, K classes or labels, T targets.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from experiments.reporting import charts
from experiments.reporting.charts import number, section, text

WORST, MOST_ROWS, BINS = 32, 20, 15
MOST_LABELS, MOST_TARGETS = 100, 4
TINY = np.finfo(np.float32).tiny
Opener = Callable[[list[str]], list[Image.Image | None]]


@dataclass(frozen=True)
class Scored:
    """`target` (N,) int64 classes, (N, K) 0 or 1, (N, T) own units; `prediction` (N, K) or (N, T), None where only the
    likeliest class was written. Of a classification `likeliest` (N,) and its probability `confidence` (N,). `dropped`:
    rows whose prediction is no number."""

    file: str
    task: str
    names: list[str]
    ids: np.ndarray
    target: np.ndarray
    prediction: np.ndarray | None
    likeliest: np.ndarray | None = None
    confidence: np.ndarray | None = None
    dropped: int = 0


def read(folder: Path, spec: dict[str, Any], split: str = "") -> Scored | None:
    """predictions.csv where it has targets, else oof.csv; None without either, or for an empty one. `split`: what
    predictions.csv is of, for people."""
    names = list(spec["class_names"] or spec["target_names"])
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


def _read(file: Path, spec: dict[str, Any], names: list[str], targets: list[str], columns: list[str]) -> Scored | None:
    classes, told = (
        spec["task"] == "classification",
        ["prediction"] if len(names) == 1 else [f"prediction_{name}" for name in names],
    )
    likeliest_only = classes and not set(told) <= set(columns)
    identity = spec.get("id_column") if spec.get("id_column") in columns else columns[0]
    numbers = ["probability"] if likeliest_only else told
    numbers = numbers if classes else [*numbers, *targets]
    words = {
        column: str for column in (identity, *(targets if classes else ()), *(["prediction"] if likeliest_only else ()))
    }
    rows = pd.read_csv(
        file,
        usecols=[*words, *numbers],
        dtype=words | {column: np.float32 if classes else np.float64 for column in numbers},
        keep_default_na=False,
        na_values={column: [""] for column in numbers},
    )
    whole = np.isfinite(rows[numbers].to_numpy()).all(1)
    dropped, rows = int((~whole).sum()), rows[whole]
    if not len(rows):
        return None
    found, place = {}, {name: k for k, name in enumerate(names)}
    values = rows[numbers].to_numpy()
    if classes:
        target = rows["target"].map(place).to_numpy(np.int64)
        found = (
            {"likeliest": rows["prediction"].map(place).to_numpy(np.int64), "confidence": values[:, 0]}
            if likeliest_only
            else {"likeliest": values.argmax(1), "confidence": values.max(1)}
        )
    else:
        target, values = rows[targets].to_numpy(), values[:, : len(told)]
    return Scored(
        file.name,
        spec["task"],
        names,
        rows[identity].to_numpy(),
        target,
        None if likeliest_only else values,
        dropped=dropped,
        **found,
    )


def calibration(
    confidence: np.ndarray, right: np.ndarray, bins: int = BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """(count, mean confidence, share right) of each of `bins` equal bins of 0-1, 0 for an empty one, and the expected
    calibration error: the mean distance of the two weighted by count (Guo et al. 2017, arXiv 1706.04599)."""
    place = np.minimum((np.asarray(confidence, np.float64) * bins).astype(int), bins - 1)
    counts = np.bincount(place, minlength=bins)
    sure, hits = (np.bincount(place, weights=values, minlength=bins) / counts.clip(1) for values in (confidence, right))
    return counts, sure, hits, float((counts * np.abs(sure - hits)).sum() / counts.sum())


def confused(
    target: np.ndarray, likeliest: np.ndarray, classes: int, most: int = MOST_ROWS
) -> list[tuple[int, int, int]]:
    """(true, predicted, count) of the pairs most often confused; of equals the first."""
    wrong = target != likeliest
    pairs, counts = np.unique(target[wrong] * classes + likeliest[wrong], return_counts=True)
    return [
        (int(pairs[k] // classes), int(pairs[k] % classes), int(counts[k]))
        for k in np.argsort(-counts, kind="stable")[:most]
    ]


def by_class(target: np.ndarray, likeliest: np.ndarray, classes: int) -> np.ndarray:
    """(K, 4): pictures, share of them found (recall), times predicted, share of those right (precision); NaN of
    none."""
    there, said, hits = (
        np.bincount(each, minlength=classes) for each in (target, likeliest, target[target == likeliest])
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.stack([there, hits / there, said, hits / said], 1)


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


def sections(scored: Scored, opened: Opener) -> str:
    """All that is known of the scored split, as HTML."""
    note = (
        f"<p>{scored.dropped:,} rows of {text(scored.file)} have no prediction that is a number; they are left "
        f"out.</p>\n" * bool(scored.dropped)
    )
    if scored.task == "classification":
        return note + _worst_classes(scored, opened) + _confusion(scored) + _calibration(scored)
    return note + (_labels if scored.task == "multilabel" else _regression)(scored, opened)


def _gallery(scored: Scored, rows: np.ndarray, captions: list[str], order: str, opened: Opener) -> str:
    ids = [str(each) for each in scored.ids[rows]]
    body = f"<p>{order} Of {len(scored.ids):,} rows of {text(scored.file)}.</p>\n"
    return section(
        "worst", f"The worst {len(rows)} errors", body + charts.pictures(list(zip(opened(ids), captions, ids)))
    )


def _worst_classes(scored: Scored, opened: Opener) -> str:
    wrong = np.flatnonzero(scored.target != scored.likeliest)
    if not len(wrong):
        return section("worst", "No errors", f"<p>All {len(scored.ids):,} rows of {text(scored.file)} are right.</p>\n")
    true = None if scored.prediction is None else scored.prediction[wrong, scored.target[wrong]]  # (errors,)
    rows = wrong[np.argsort(-scored.confidence[wrong] if true is None else true, kind="stable")[:WORST]]
    captions = []
    for row in rows:
        share = "" if true is None else number(float(scored.prediction[row, scored.target[row]]), True)
        captions.append(
            f"<b>{text(scored.names[scored.target[row]])}</b> {share}<br>taken for "
            f"{text(scored.names[scored.likeliest[row]])} "
            f"{number(float(scored.confidence[row]), True)}"
        )
    order = (
        "The likeliest wrong answers first."
        if true is None
        else "Those whose true class was thought least likely first."
    )
    return _gallery(scored, rows, captions, order, opened)


def _confusion(scored: Scored) -> str:
    names, classes = scored.names, len(scored.names)
    pairs = confused(scored.target, scored.likeliest, classes)
    each = by_class(scored.target, scored.likeliest, classes)
    if not pairs:
        return ""
    listed = charts.table(
        ["true", "taken for", "pictures", "of the class"],
        [[text(names[a]), text(names[b]), number(count), number(count / each[a, 0], True)] for a, b, count in pairs],
        "pairs",
    )
    worst = np.argsort(np.nan_to_num(each[:, 1], nan=2), kind="stable")[:MOST_ROWS]
    table = charts.table(
        ["class", "pictures", "found", "precision"],
        [[text(names[k]), number(each[k, 0]), number(each[k, 1], True), number(each[k, 3], True)] for k in worst],
        "classes",
    )
    body = (
        f'<div class="charts"><div><h3>Most often confused</h3>{listed}</div><div><h3>Worst '
        f"classes</h3>{table}</div></div>\n"
    )
    if classes <= MOST_ROWS:
        counts = np.bincount(scored.target * classes + scored.likeliest, minlength=classes**2).reshape(classes, classes)
        body += f"<h3>Confusion</h3>{charts.matrix(names, counts)}"
    return section("confusion", "Confusion", body)


def _calibration(scored: Scored) -> str:
    if scored.task == "multilabel":
        confidence, right = scored.prediction.ravel(), scored.target.ravel() > 0.5
        about, sure = (
            "Every label of every picture counts: how likely it was said to be, and how often it was there.",
            "probability of a label",
        )
        hits = "there"
    else:
        confidence, right = scored.confidence, scored.target == scored.likeliest
        about, sure, hits = (
            "How sure the network was of its likeliest class, and how often that was right.",
            "confidence",
            "right",
        )
    counts, mean, share, error = calibration(confidence, right)
    rows = [
        [f"{k / len(counts):.3f}", number(counts[k]), number(mean[k], True), number(share[k], True)]
        for k in np.flatnonzero(counts)
    ]
    words = (
        f"{about} Mean {number(confidence.mean(dtype=np.float64), True)} against {number(right.mean(), True)}. "
        f"Expected calibration error in "
        f'{len(counts)} bins: <b id="ece">{number(error, True)}</b>.'
    )
    table = (
        f"<details><summary>The bins as "
        f"numbers</summary>{charts.table(['bin from', 'number', sure, hits], rows, 'bins')}</details>"
    )
    drawn = charts.reliability(counts, mean, share, sure, hits)
    return section(
        "calibration", "Calibration", f'<p>{words}</p>\n<div class="charts">{drawn}<div>{table}</div></div>\n'
    )


def _labels(scored: Scored, opened: Opener) -> str:
    from sklearn.metrics import average_precision_score

    said, there = np.clip(scored.prediction, TINY, 1 - 1e-7), scored.target > 0.5  # (N, K)
    loss = -np.where(there, np.log(said), np.log1p(-said)).mean(1)
    rows, captions = np.argsort(-loss, kind="stable")[:WORST], []
    for row in rows:
        missed, wrongly = (
            np.flatnonzero(which)[:2] for which in (there[row] & (said[row] <= 0.5), ~there[row] & (said[row] > 0.5))
        )
        captions.append(
            "<br>".join(
                f"{word} {text(scored.names[k])} {number(float(scored.prediction[row, k]), True)}"
                for word, which in (("missed", missed), ("wrongly", wrongly))
                for k in which
            )
            or "right at 50 %, and unsure"
        )
    gallery = _gallery(scored, rows, captions, "Those with the largest mean cross entropy first.", opened)
    present = np.flatnonzero(there.any(0))
    precision = np.array([average_precision_score(there[:, k], scored.prediction[:, k]) for k in present])
    body = [
        [
            text(scored.names[present[k]]),
            number(precision[k]),
            number(there[:, present[k]].sum()),
            number((scored.prediction[:, present[k]] > 0.5).sum()),
        ]
        for k in np.argsort(precision, kind="stable")[:MOST_LABELS]
    ]
    some = f", the worst {MOST_LABELS} below" if len(present) > MOST_LABELS else ""
    words = (
        f'<p>Average precision of each label that any picture has{some}; their mean is <b id="map">'
        f"{number(float(precision.mean()) if len(precision) else None)}</b>.</p>\n"
    )
    table = charts.table(["label", "average precision", "pictures with it", "said of (above 50 %)"], body, "labels")
    return gallery + section("labels", "Labels", words + table) + _calibration(scored)


def _regression(scored: Scored, opened: Opener) -> str:
    residual = scored.prediction - scored.target  # (N, T)
    scale = np.maximum(scored.target.std(0), TINY)
    rows, captions = np.argsort(-np.abs(residual / scale).mean(1), kind="stable")[:WORST], []
    for row in rows:
        captions.append(
            "<br>".join(
                f"{text(name) + ' ' if len(scored.names) > 1 else ''}true <b>{number(scored.target[row, t])}</b>, "
                f"predicted "
                f"{number(scored.prediction[row, t])}"
                for t, name in enumerate(scored.names[:MOST_TARGETS])
            )
        )
    order = "The largest distance between predicted and true first" + (
        ", in standard deviations, mean over targets." if len(scale) > 1 else "."
    )
    parts = []
    for t, name in enumerate(scored.names[:MOST_TARGETS]):
        tenths = deciles(scored.target[:, t], residual[:, t])
        drawn = [
            (
                each["q10"],
                each["mean"],
                each["q90"],
                f"true {each['low']:g} to {each['high']:g}: mean {each['mean']:.4g}",
            )
            for each in tenths
        ]
        cells = [
            [number(each[column]) for column in ("low", "high", "count", "mean", "q10", "q90", "rms")]
            for each in tenths
        ]
        table = charts.table(
            ["true from", "to", "pictures", "mean residual", "10 %", "90 %", "root mean square"], cells, "deciles"
        )
        square, absolute = float(np.sqrt((residual[:, t] ** 2).mean())), float(np.abs(residual[:, t]).mean())
        parts.append(
            f"<h3>{text(name)}</h3><p>Root mean squared error <b>{number(square)}</b>, mean absolute error "
            f"<b>{number(absolute)}</b>.</p>"
            f'<div class="charts">'
            f"{charts.scatter('Predicted against true', scored.target[:, t], scored.prediction[:, t])}"
            f"{charts.ranges('Residual by tenths of the true value', drawn, 'tenth')}</div>{table}"
        )
    note = (
        "<p>Residual: predicted - true. Where the pictures tell little the predictions stay near the mean, and it "
        "falls from tenth to tenth.</p>"
    )
    return _gallery(scored, rows, captions, order, opened) + section(
        "regression", "Predicted against true", note + "".join(parts)
    )
