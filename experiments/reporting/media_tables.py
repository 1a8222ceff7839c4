"""What a tracker is told of the best weights, as tables: a line for each class, label or target, and a fixed set of
rows with their pictures. From predictions alone, without a tracker.

Legend: N pictures, K classes or labels, T targets.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from experiments.reporting.scored import MOST_TARGETS, Scored, deciles
from lightning_modules.callbacks.prediction_table import fixed_rows

MOST_LINES, PICTURE_SIDE, TOP = 10_000, 224, 5
Opener = Callable[[list[str]], list[Image.Image | None]]


@dataclass(frozen=True)
class Table:
    """Cells are text, numbers, None for what is not defined, and pictures."""

    columns: list[str]
    rows: list[list[Any]]


def words(value: Any, most: int = 100) -> str:
    """What a person has named, as text that any file takes: what cannot be printed becomes `?`, what is longer loses
    its middle, as `abc...xyz`: long names often differ at their ends alone."""
    told = "".join(letter if letter.isprintable() else "?" for letter in str(value))
    kept = most - 3
    return told if len(told) <= most else told[: kept - kept // 2] + "..." + told[-(kept // 2) :]


def per_class(scored: Scored) -> Table:
    """A line for each class, label or target; of more than 10,000 those found worst."""
    return {"classification": _classes, "multilabel": _labels, "regression": _targets}[scored.task](scored)


def recall_precision_f1(
    there: np.ndarray, said: np.ndarray, hits: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each (K,), from how often a class is there, is said, and is both; NaN where none is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return hits / there, hits / said, 2 * hits / (there + said)


def taken_for(target: np.ndarray, likeliest: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(K,) the class that each one is most often mistaken for (of equals the first; -1 for none), and (K,) how
    often."""
    wrong, which, times = target != likeliest, np.full(classes, -1), np.zeros(classes, np.int64)
    pairs, counts = np.unique(target[wrong].astype(np.int64) * classes + likeliest[wrong], return_counts=True)
    order = np.argsort(
        counts[::-1], kind="stable"
    )  # the most frequent last, of equals the first pair: what is written last stays
    for pair, count in zip(pairs[::-1][order], counts[::-1][order]):
        which[pair // classes], times[pair // classes] = pair % classes, count
    return which, times


def _classes(scored: Scored) -> Table:
    classes = len(scored.names)
    there, said, hits = (
        np.bincount(each, minlength=classes)
        for each in (scored.target, scored.likeliest, scored.target[scored.target == scored.likeliest])
    )
    recall, precision, f1 = recall_precision_f1(there, said, hits)
    which, times = taken_for(scored.target, scored.likeliest, classes)
    rows = [
        [
            words(scored.names[k]),
            int(there[k]),
            _number(recall[k]),
            _number(precision[k]),
            _number(f1[k]),
            words(scored.names[which[k]]) if which[k] >= 0 else None,
            int(times[k]),
        ]
        for k in _lines(recall)
    ]
    return Table(["class", "rows", "recall", "precision", "f1", "most often taken for", "times"], rows)


def _labels(scored: Scored) -> Table:
    there, said = scored.target > 0.5, scored.prediction > 0.5  # (N, K)
    recall, precision, f1 = recall_precision_f1(there.sum(0), said.sum(0), (there & said).sum(0))
    average = [average_precision(there[:, k], scored.prediction[:, k]) for k in range(len(scored.names))]
    rows = [
        [
            words(scored.names[k]),
            int(there[:, k].sum()),
            _number(precision[k]),
            _number(recall[k]),
            _number(f1[k]),
            _number(average[k]),
        ]
        for k in _lines(f1)
    ]
    return Table(["label", "rows", "precision", "recall", "f1", "average precision"], rows)


def average_precision(there: np.ndarray, said: np.ndarray) -> float:
    """Mean, over the rows that have a label, of the precision at their probability (N,); NaN when none has it.
    scikit-learn's average_precision_score, which sorts (row, probability) pairs and takes several times as long."""
    found, every = np.sort(said[there]), np.sort(said)
    if not len(found):
        return float("nan")
    above, all_above = (len(values) - np.searchsorted(values, found) for values in (found, every))
    return float((above / all_above).mean())


def _targets(scored: Scored) -> Table:
    rows = []
    for t, name in enumerate(scored.names):
        residual, spread = scored.prediction[:, t] - scored.target[:, t], scored.target[:, t].var()
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


def worst_confused(target: np.ndarray, likeliest: np.ndarray, classes: int, most: int) -> np.ndarray:
    """At most so many classes, in order: all of few, else those of the pairs that are most often confused."""
    if classes <= most:
        return np.arange(classes)
    wrong, picked = target != likeliest, []
    pairs, counts = np.unique(target[wrong].astype(np.int64) * classes + likeliest[wrong], return_counts=True)
    for pair in pairs[np.argsort(-counts, kind="stable")]:
        new = [each for each in divmod(int(pair), classes) if each not in picked]
        if len(picked) + len(new) > most:
            break
        picked += new
    return np.sort(np.array(picked, np.int64))


def confusion(target: np.ndarray, likeliest: np.ndarray, classes: int, picked: np.ndarray) -> np.ndarray:
    """(M, M + 1) counts of the rows whose true class is one of the M picked: taken for each of them, and for any
    other."""
    place = np.full(classes, len(picked))
    place[picked] = np.arange(len(picked))
    rows, columns = place[target], place[likeliest]
    inside = rows < len(picked)
    return np.bincount(
        rows[inside] * (len(picked) + 1) + columns[inside], minlength=len(picked) * (len(picked) + 1)
    ).reshape(len(picked), -1)


def examples(scored: Scored, shown: Mapping[str, np.ndarray], opened: Opener, count: int = 32) -> Table:
    """The fixed rows of the split (`prediction_table.fixed_rows`): picture, id, target, prediction and how far apart
    they are.

    shown: id -> (K,) probabilities, where the split's table has only the likeliest class.
    """
    rows = fixed_rows(scored.ids, count)
    ids = [str(scored.ids[row]) for row in rows]
    cells = {"classification": _example_class, "multilabel": _example_labels, "regression": _example_targets}[
        scored.task
    ]
    told = [cells(scored, row, shown.get(identity)) for row, identity in zip(rows, ids)]
    pictures = [None if image is None else small(image) for image in opened(ids)]
    return Table(
        ["picture", "id", *(told[0] if told else ())],
        [[picture, words(identity), *each.values()] for picture, identity, each in zip(pictures, ids, told)],
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
    there, said = scored.target[row] > 0.5, scored.prediction[row]
    top = {int(k): float(said[k]) for k in np.argsort(-said, kind="stable")[:TOP]}
    return {
        "right": bool((there == (said > 0.5)).all()),
        "target": _joined(scored.names, there),
        "prediction": _joined(scored.names, said > 0.5),
        "mean probability of target": float(np.where(there, said, 1 - said).mean()),
        "top 5": _likeliest(scored.names, top),
    }


def _example_targets(scored: Scored, row: int, _: Any) -> dict[str, Any]:
    found = {}
    for t, name in enumerate(scored.names[:MOST_TARGETS]):
        of = f" {words(name)}" if len(scored.names) > 1 else ""
        true, said = float(scored.target[row, t]), float(scored.prediction[row, t])
        found |= {f"target{of}": true, f"prediction{of}": said, f"error{of}": said - true}
    return found


def _likeliest(names: list[str], known: dict[int, float]) -> str:
    """`cat 91.2 %, dog 5.0 %`, the likeliest first."""
    ordered = sorted(known, key=lambda k: (-known[k], k))[:TOP]
    return ", ".join(f"{words(names[k], 40)} {100 * known[k]:.1f} %" for k in ordered)


def _joined(names: list[str], which: np.ndarray) -> str:
    return words(", ".join(words(names[k], 40) for k in np.flatnonzero(which)) or "none", 300)
