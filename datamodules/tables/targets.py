"""Target columns -> numbers: class indices, 0 and 1 for each label, or quantities; what is wrong goes to a `Report`.
Only pandas and numpy."""

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from datamodules.tables.table import Report, listed, plainly, whole

TRUTH = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}
HOLES = (
    "",
    "nan",
    "na",
    "n/a",
    "<na>",
    "null",
)  # of labels that are numbers; of labels that are texts an empty cell alone
EMPTY = (*HOLES, "none")  # of quantities
NO_LABEL, SKIP = "has no label", " (--data_args.bad_rows skip leaves such rows out)"


def class_names(frame: pd.DataFrame, scheme: dict[str, Any]) -> list[str] | None:
    """The names of the outputs in index order, as the training table has them: numbers by size, text by code point.
    None for a regression."""
    targets = scheme["targets"]
    if scheme["task"] == "regression":
        return None
    if len(targets) > 1:
        return list(targets)
    if scheme["task"] == "multilabel" and scheme["separator"] is None:
        return list(targets)
    names = spellings(frame, scheme)
    plain = plainly(names)
    return in_order({plain.get(name, name) for name in names})


def spellings(frame: pd.DataFrame, scheme: dict[str, Any]) -> set[str]:
    """The labels of a classification's or multilabel's single column, as they are spelled."""
    text = frame[scheme["targets"][0]]
    if scheme["separator"] is not None:
        return {part for value in set(text) for part in labels_of(value, scheme["separator"])}
    return set(text[~_holes(text)])


def unlabelled(frame: pd.DataFrame, scheme: dict[str, Any]) -> np.ndarray:
    """(N,) bool: rows where a target is empty; of joined labels none, since a row may have no label."""
    if scheme["separator"] is not None:
        return np.zeros(len(frame), bool)
    one = scheme["task"] == "classification" and len(scheme["targets"]) == 1
    return np.any(
        [_holes(frame[name]) if one else frame[name].str.lower().isin(EMPTY) for name in scheme["targets"]], axis=0
    )


def _holes(text: pd.Series) -> np.ndarray:
    """(N,) bool: cells without a value."""
    words = text.str.lower().isin(HOLES).to_numpy()
    of_numbers = pd.to_numeric(text[~words], errors="coerce").notna().all()
    return words if of_numbers and not words.all() else (text == "").to_numpy()


def in_order(names: set[str]) -> list[str]:
    """Numbers by size where all are numbers, else by code point."""
    numbers = pd.to_numeric(pd.Series(sorted(names), dtype=object), errors="coerce")
    if len(names) and np.isfinite(numbers).all():
        return [name for _, name in sorted(zip(numbers, sorted(names)))]
    return sorted(names)


def labels_of(text: str, separator: str) -> list[str]:
    """The labels of a joined text."""
    return [part for part in map(str.strip, text.split(separator)) if part]


def read_targets(
    frame: pd.DataFrame, scheme: dict[str, Any], names: list[str] | None, file: str, report: Report, known: str
) -> np.ndarray:
    """(N,) int64 class indices, (N, K) float32 of 0 and 1, or (N, T) float64 in own units; what cannot be read is
    reported and left 0.

    Args:
        names: of the outputs, in index order; a label beyond them is reported as one that `known`, a file, does not
            have.
    """
    targets = scheme["targets"]
    if scheme["task"] == "regression":
        return np.stack([numbers(frame, name, file, report, hint=SKIP) for name in targets], axis=1)
    if len(targets) > 1 or scheme["task"] == "multilabel" and scheme["separator"] is None:
        ones = np.stack([_zero_or_one(frame, name, file, report) for name in targets], axis=1)
        if scheme["task"] == "multilabel":
            return ones
        if (wrong := ones.sum(1) != 1).any():
            report.rows(
                file,
                ", ".join(targets[:3]) + " ..." * (len(targets) > 3),
                wrong,
                "not exactly one 1 (--task multilabel allows it)",
            )
        return ones.argmax(1)
    text = frame[targets[0]]
    index = _index(names or [], spellings(frame, scheme))
    if scheme["separator"] is None:
        holes = _holes(text)
        report.rows(file, targets[0], holes, "no label", hint=SKIP)
        codes = text.map(index)
        strange = codes.isna().to_numpy() & ~holes
        report.rows(file, targets[0], strange, f"labels that {known} does not have", text.to_numpy())
        return codes.fillna(0).to_numpy(np.int64)
    return _joined(text, targets[0], scheme["separator"], index, file, report, known)


def _index(names: list[str], spelled: set[str]) -> dict[str, int]:
    """{label as it is spelled: index of its name}; a whole number is that of the name with its value, where there is
    one such name."""
    index, count = {name: place for place, name in enumerate(names)}, Counter(map(whole, names))
    by_number = {whole(name): place for name, place in index.items() if count[whole(name)] == 1}
    return {text: by_number[whole(text)] for text in spelled if whole(text) in by_number} | index


def _joined(
    text: pd.Series, column: str, separator: str, index: dict[str, int], file: str, report: Report, known: str
) -> np.ndarray:
    ones = np.zeros((len(text), len({*index.values()})), np.float32)
    strange: dict[int, str] = {}
    for row, value in enumerate(text):
        for label in labels_of(value, separator):
            if label in index:
                ones[row, index[label]] = 1
            else:
                strange.setdefault(row, label)
    if strange:
        report.rows(
            file,
            column,
            list(strange),
            f"labels that {known} does not have ({listed(dict.fromkeys(strange.values()))})",
        )
    return ones


def numbers(frame: pd.DataFrame, name: str, file: str, report: Report, hint: str = "") -> np.ndarray:
    """(N,) float64 of a column of quantities; `hint` ends the message on empty cells."""
    text = frame[name]
    numbers = pd.to_numeric(text, errors="coerce").to_numpy(float)
    empty = text.str.lower().isin(EMPTY).to_numpy()
    infinite, strange = np.isinf(numbers), np.isnan(numbers) & ~empty
    report.rows(file, name, empty, "no number (NaN)", hint=hint)
    report.rows(file, name, infinite, "infinite numbers", text.to_numpy())
    comma = " (decimals need a point)" * bool(strange.any() and text[strange].str.fullmatch(r"-?\d+,\d+").any())
    report.rows(file, name, strange, f"no numbers{comma}", text.to_numpy())
    huge = np.isfinite(numbers) & (np.abs(numbers) > np.finfo(np.float32).max)
    report.rows(file, name, huge, "numbers too large for 32 bits", text.to_numpy())
    return np.where(np.isfinite(numbers) & ~huge, numbers, 0.0)


def _zero_or_one(frame: pd.DataFrame, name: str, file: str, report: Report) -> np.ndarray:
    """(N,) float32 of a column of labels that hold or not."""
    text = frame[name]
    numbers = pd.to_numeric(text.str.lower().replace(TRUTH), errors="coerce").to_numpy(float)
    report.rows(
        file,
        name,
        ~np.isin(numbers, (0, 1)),
        "neither 0 nor 1",
        text.replace("", "(empty)").to_numpy(),
        hint=SKIP * bool(text.str.lower().isin(EMPTY).any()),
    )
    return np.where(np.isin(numbers, (0, 1)), numbers, 0).astype(np.float32)


def check_constant(
    targets: np.ndarray, scheme: dict[str, Any], names: list[str] | None, file: str, report: Report
) -> None:
    """Report targets from which nothing can be learned: a single class, a constant quantity, labels that never
    change."""
    columns = scheme["targets"]
    if len(targets) == 0:
        return
    if scheme["task"] == "classification":
        if len(np.unique(targets)) == 1:
            report.add(
                file,
                f"column {', '.join(columns)}: the single class {(names or [])[int(targets[0])]!r}, nothing can be "
                f"learned from it",
            )
        return
    still = np.ptp(targets, axis=0) == 0
    if scheme["task"] == "multilabel":
        if still.all():
            report.add(
                file, f"column {', '.join(columns)}: every row has the same labels, nothing can be learned from them"
            )
        return
    for place in np.flatnonzero(still):
        report.add(
            file, f"column {columns[place]}: the constant {targets[0, place]:.15g}, nothing can be learned from it"
        )


def read_range(given: Any, count: int) -> list[list[float]]:
    """A range [low, high] for each of so many targets, from one pair for all or a pair for each. Raises ValueError."""
    try:
        pairs = [given] * count if len(given) == 2 and not isinstance(given[0], list | tuple) else given
        pairs = [[float(low), float(high)] for low, high in pairs]
    except (TypeError, ValueError):
        pairs = []
    if len(pairs) != count or not all(low < high for low, high in pairs):
        raise ValueError(
            f"--data_args.target_range {given}: [low,high], or a pair for each of {count} targets, low below high"
        )
    return pairs


def check_range(
    targets: np.ndarray, scheme: dict[str, Any], limits: list[list[float]], file: str, report: Report
) -> None:
    """Report quantities outside of a range that was given."""
    for place, (low, high) in enumerate(limits):
        outside = (targets[:, place] < low) | (targets[:, place] > high)
        report.rows(
            file,
            scheme["targets"][place],
            outside,
            f"numbers outside of {low:.15g} to {high:.15g}",
            [f"{value:.15g}" for value in targets[:, place]],
        )
