"""Tables on the best weights for a tracker: a line for each class, label or target, and a fixed set of rows with their
images. They come from predictions alone, without a tracker.

Legend: N pictures, K classes or labels, T targets.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from experiments.reporting.scored import MOST_TARGETS, Scored, by_class, by_label, confused, deciles
from lightning_modules.callbacks.prediction_table import fixed_rows
from lightning_modules.objectives.metrics import average_precisions

MOST_LINES, PICTURE_SIDE, TOP = 10_000, 224, 5
Opener = Callable[[list[str]], list[Image.Image | None]]


@dataclass(frozen=True)
class Table:
    """Cells are text, numbers, None for what is not defined, and pictures."""

    columns: list[str]
    rows: list[list[Any]]


def words(value: Any, most: int = 100) -> str:
    """A name as text that any file takes: letters that cannot be printed become `?`, a longer text loses its middle, as
    `abc...xyz`, since long names often differ at their ends alone."""
    text = "".join(letter if letter.isprintable() else "?" for letter in str(value))
    kept = most - 3
    return text if len(text) <= most else text[: kept - kept // 2] + "..." + text[-(kept // 2) :]


def per_class(scored: Scored) -> Table:
    """A line for each class, label or target; of more than 10,000 those found worst."""
    return {"classification": _classes, "multilabel": _labels, "regression": _targets}[scored.task](scored)


def _classes(scored: Scored) -> Table:
    each = by_class(scored.target, scored.likeliest, len(scored.names))
    pairs = confused(scored.target, scored.likeliest, len(scored.names))
    mistaken, first = np.unique(pairs[:, 0], return_index=True)  # the most frequent pair of each class
    wrong = dict(zip(mistaken.tolist(), pairs[first, 1:].tolist()))
    rows: list[list[Any]] = []
    for k in _lines(each[:, 1]):
        there, recall, _, precision, f1 = each[k]
        other, times = wrong.get(int(k), (None, 0))
        row = [words(scored.names[k]), int(there), _number(recall), _number(precision), _number(f1)]
        rows.append([*row, None if other is None else words(scored.names[other]), times])
    return Table(["class", "rows", "recall", "precision", "f1", "most often taken for", "times"], rows)


def _labels(scored: Scored) -> Table:
    each, average = by_label(scored.target, scored.outputs), average_precisions(scored.target, scored.outputs)
    rows: list[list[Any]] = []
    for k in _lines(each[:, 4]):
        there, recall, _, precision, f1 = each[k]
        row = [words(scored.names[k]), int(there), _number(precision), _number(recall), _number(f1)]
        rows.append([*row, _number(average[k])])
    return Table(["label", "rows", "precision", "recall", "f1", "average precision"], rows)


def _targets(scored: Scored) -> Table:
    rows = []
    for t, name in enumerate(scored.names):
        residual, spread = scored.outputs[:, t] - scored.target[:, t], scored.target[:, t].var()
        square = float((residual**2).mean())
        bias = [float(each["mean"]) for each in deciles(scored.target[:, t], residual)]
        rows.append(
            [
                words(name),
                len(residual),
                square**0.5,
                float(np.abs(residual).mean()),
                1 - square / float(spread) if spread else None,
                float(residual.mean()),
                *bias,
                *[None] * (10 - len(bias)),
            ]
        )
    return Table(["target", "rows", "rmse", "mae", "r2", "bias", *(f"bias, decile {k}" for k in range(1, 11))], rows)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _lines(found: np.ndarray) -> np.ndarray:
    """All of them in order, or so many as a table takes: those with the smallest values, in order."""
    return np.arange(len(found)) if len(found) <= MOST_LINES else np.sort(np.argsort(found, kind="stable")[:MOST_LINES])


def examples(scored: Scored, shown: Mapping[str, np.ndarray], opened: Opener, count: int = 32) -> Table:
    """The fixed rows of the split (`prediction_table.fixed_rows`): picture, id, target, prediction and how far apart
    they are.

    shown: id -> (K,) probabilities, where the split's table has only the likeliest class.
    """
    rows = fixed_rows(list(scored.ids), count)
    ids = [str(scored.ids[row]) for row in rows]
    cells = {"classification": _example_class, "multilabel": _example_labels, "regression": _example_targets}[
        scored.task
    ]
    found = [cells(scored, row, shown.get(identity)) for row, identity in zip(rows, ids)]
    pictures = [None if image is None else small(image) for image in opened(ids)]
    return Table(
        ["picture", "id", *(found[0] if found else ())],
        [[picture, words(identity), *each.values()] for picture, identity, each in zip(pictures, ids, found)],
    )


def small(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BICUBIC)
    return image


def _example_class(scored: Scored, row: int, probabilities: np.ndarray | None) -> dict[str, Any]:
    target, likeliest = int(scored.target[row]), int(scored.likeliest[row])
    if scored.prediction is not None:
        probabilities = scored.prediction[row]
    if probabilities is None:  # only the likeliest is known
        known = {likeliest: float(scored.confidence[row])}
    else:
        known = {int(k): float(probabilities[k]) for k in {*np.argsort(-probabilities, kind="stable")[:TOP], target}}
    return {
        "right": target == likeliest,
        "target": words(scored.names[target]),
        "prediction": words(scored.names[likeliest]),
        "probability": float(scored.confidence[row]),
        "probability of target": known.get(target),
        "top 5": _likeliest(scored.names, known),
    }


def _example_labels(scored: Scored, row: int, _: Any) -> dict[str, Any]:
    there, predicted = scored.target[row] > 0.5, scored.outputs[row]
    top = {int(k): float(predicted[k]) for k in np.argsort(-predicted, kind="stable")[:TOP]}
    return {
        "right": bool((there == (predicted > 0.5)).all()),
        "target": _joined(scored.names, there),
        "prediction": _joined(scored.names, predicted > 0.5),
        "mean probability of target": float(np.where(there, predicted, 1 - predicted).mean()),
        "top 5": _likeliest(scored.names, top),
    }


def _example_targets(scored: Scored, row: int, _: Any) -> dict[str, Any]:
    found: dict[str, float] = {}
    for t, name in enumerate(scored.names[:MOST_TARGETS]):
        of = f" {words(name)}" if len(scored.names) > 1 else ""
        true, predicted = float(scored.target[row, t]), float(scored.outputs[row, t])
        found |= {f"target{of}": true, f"prediction{of}": predicted, f"error{of}": predicted - true}
    return found


def _likeliest(names: list[str], known: dict[int, float]) -> str:
    """`cat 91.2 %, dog 5.0 %`, the likeliest first."""
    ordered = sorted(known, key=lambda k: (-known[k], k))[:TOP]
    return ", ".join(f"{words(names[k], 40)} {100 * known[k]:.1f} %" for k in ordered)


def _joined(names: list[str], which: np.ndarray) -> str:
    return words(", ".join(words(names[k], 40) for k in np.flatnonzero(which)) or "none", 300)
