"""Drawings for a tracker: confusion of classes or labels, predicted against true values, and a sheet of examples."""

import numpy as np

from experiments.reporting import drawing
from experiments.reporting.drawing import Drawing
from experiments.reporting.media_tables import Table, words
from experiments.reporting.scored import MOST_TARGETS, Scored, by_label, confusion, worst_confused

MOST_CLASSES, MOST_POINTS = 30, 5000


def confused(scored: Scored) -> Drawing:
    """A matrix of classes and labels; predicted against true of a regression."""
    return {"classification": _classes, "multilabel": _labels, "regression": _targets}[scored.task](scored)


def _classes(scored: Scored) -> Drawing:
    classes = len(scored.names)
    picked = worst_confused(scored.target, scored.likeliest, classes, MOST_CLASSES)
    if not len(picked):
        line = f"All {len(scored.target):,} rows are right."
        return Drawing(line, height=60, marks=[drawing.Text(drawing.WIDTH / 2, 34, line, "middle")])
    some = len(picked) < classes
    counts = confusion(scored.target, scored.likeliest, classes, picked)
    counts = counts if some else counts[:, :-1]
    names = [words(scored.names[k], 24) for k in picked]
    right = f"{100 * (scored.target == scored.likeliest).mean():.2f} % of {len(scored.target):,} rows right"
    title = right + f"; the {len(picked)} of {classes:,} classes confused most" * some
    share = counts / counts.sum(1, keepdims=True).clip(1)
    return drawing.matrix(counts, share, names, names + ["any other"] * some, title, ("true class", "predicted"))


def _labels(scored: Scored) -> Drawing:
    """A line for each label: the rows with it and those without, each as predicted and not predicted; the labels with
    the smallest F1."""
    each, rows = by_label(scored.target, scored.outputs), len(scored.target)
    there, predicted = each[:, 0], each[:, 2]
    hits = ((scored.target > 0.5) & (scored.outputs > 0.5)).sum(0)
    counts = np.stack([hits, there - hits, predicted - hits, rows - there - predicted + hits], 1).astype(int)  # (K, 4)
    worst = np.sort(np.argsort(np.nan_to_num(each[:, 4], nan=2), kind="stable")[:MOST_CLASSES])
    share = counts / np.repeat(np.stack([there, rows - there], 1), 2, axis=1).clip(1)
    some = f"; the {len(worst)} of {len(each):,} labels with the smallest F1" * (len(worst) < len(each))
    names, columns = [words(scored.names[k], 24) for k in worst], ["hit", "missed", "false", "absent"]
    title = f"{rows:,} rows, predicted above 50 %{some}"
    return drawing.matrix(counts[worst], share[worst], names, columns, title, ("label", "rows"))


def _targets(scored: Scored) -> Drawing:
    charts = []
    for t, name in enumerate(scored.names[:MOST_TARGETS]):
        true, predicted = scored.target[:, t], scored.outputs[:, t]
        title = f"{words(name, 36)}: RMSE {np.sqrt(((predicted - true) ** 2).mean()):.4g}, {len(true):,} rows"
        charts.append(drawing.scatter(title, true, predicted, MOST_POINTS))
    return drawing.sheet(charts, 2)


def sheet(table: Table) -> Drawing:
    """The images of `media_tables.examples`, each with its target and its prediction; a wrong one in red."""
    place = {name: k for k, name in enumerate(table.columns)}
    images, captions = [], []
    for row in table.rows:
        found = [row[place[name]] for name in table.columns if name.startswith(("target", "prediction"))][:2]
        target, prediction = (f"{each:.4g}" if isinstance(each, float) else words(each, 20) for each in found)
        colour = "ink" if "right" not in place or row[place["right"]] else "bad"
        images.append(None if row[0] is None else np.asarray(row[0]))
        captions.append([(target, colour), (f"\u2192 {prediction}", colour)])
    return drawing.gallery(images, captions)
