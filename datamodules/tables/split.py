"""Held-out rows of a table: folds, a fold column, or a share; stratified, and groups whole."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pandas as pd
from PIL import Image

from datamodules.tables.guess import part_of_word
from datamodules.tables.table import counted, listed, rows_text

FINEST = 20  # parts that rows are divided into for a share


def share_held_out(
    targets: np.ndarray, task: str, fraction: float, seed: int, groups: np.ndarray | None, ids: Sequence[str]
) -> np.ndarray:
    """(N,) bool, True for about `fraction` of the rows: some of k folds (`folds.assign`), with k up to 20 where the
    share is not smaller.

    Raises:
        ValueError: too few rows or groups to divide.
    """
    share = Fraction(fraction).limit_denominator(FINEST)
    if share.numerator in (0, share.denominator):
        share = Fraction(1, round(1 / min(fraction, 1 - fraction)))
        share = share if fraction < 0.5 else 1 - share
    units = len(targets) if groups is None else len(set(groups) - {""}) + int((groups == "").sum())
    if units < 2:
        raise ValueError(
            f"{'rows' if groups is None else 'groups'}: {units}; --val_fraction {fraction} needs two at least, "
            f"--val_fraction 0 none"
        )
    parts = min(share.denominator, units)
    return by_rule(targets, task, parts, seed, groups, None, ids) < min(parts - 1, max(1, round(fraction * parts)))


def stratified(
    targets: np.ndarray, fraction: float, seed: int, names: list[str], ids: Sequence[str], places: np.ndarray
) -> np.ndarray:
    """(N,) bool, True for a share of each class, as `images.hold_out` draws it from class folders, of the rows in the
    order of their ids. `places` are their rows in the table, for messages.

    Raises:
        ValueError: classes with one row (named), or a share smaller than a row a class.
    """
    from datamodules.loading.images import Split, hold_out
    from datamodules.tables.folds import by_id

    alone = np.flatnonzero(np.bincount(targets, minlength=len(names)) == 1)
    if lonely := [f"{names[place]} ({rows_text(places[targets == place])})" for place in alone]:
        raise ValueError(
            f"classes with one row each: {listed(lonely)}; --val_fraction {fraction} needs two of each class: drop "
            f"them, or --folds K, "
            "or --val_fraction 0"
        )
    present, held = len(np.unique(targets)), int(np.ceil(fraction * len(targets)))
    if held < present:
        raise ValueError(
            f"--val_fraction {fraction} of {len(targets):,} rows is {held}, and each of {present} classes needs one: "
            f"--val_fraction "
            f"{np.ceil(100 * present / len(targets)) / 100:g} or more, or --folds K"
        )
    order = by_id(ids)
    return np.isin(
        np.arange(len(targets)), hold_out(Split(order, targets[order], no_image), fraction, seed, names)[1].names
    )


def no_image(name: bytes) -> Image.Image:
    """Opener of a split that is only divided."""
    raise FileNotFoundError(name)


def by_rule(
    targets: np.ndarray,
    task: str,
    count: int,
    seed: int,
    groups: np.ndarray | None,
    names: list[str] | None,
    ids: Sequence[str],
) -> np.ndarray:
    """`folds.assign`, which imports scikit-learn."""
    from datamodules.tables.folds import assign

    return assign(targets, task, count, seed, groups, ids=ids, class_names=names)


def together(groups: list[np.ndarray], ids: Sequence[str]) -> np.ndarray:
    """`folds.union`, numbered in the order of the ids."""
    from datamodules.tables.folds import by_id, union

    order, found = by_id(ids), np.empty(len(ids), np.int64)
    found[order] = union(*(each[order] for each in groups))
    return found.astype(str)


def notes(fold: np.ndarray, targets: np.ndarray, task: str, names: list[str] | None) -> list[str]:
    """`folds.notes`."""
    from datamodules.tables.folds import notes

    return notes(fold, targets, task, names or [])


def never_learned(train: np.ndarray, val: np.ndarray, names: list[str]) -> list[str]:
    """A line on classes or labels that val has and train has not."""
    counts = [np.bincount(each, minlength=len(names)) if each.ndim == 1 else (each > 0).sum(0) for each in (train, val)]
    missing = [
        f"{name} ({counted(there, 'row')})" for name, learned, there in zip(names, *counts) if there and not learned
    ]
    return (
        [f"table val has classes that train has no row of, so they are never learned: {listed(missing)}"]
        if missing
        else []
    )


def parts(column: pd.Series) -> np.ndarray:
    """(N,) train, val or test of a split column (`guess.part_of_word`).

    Raises:
        ValueError: other words, or no row for train.
    """
    words = {word: part_of_word(column.name, word) for word in set(column)}
    if strange := sorted(word for word, part in words.items() if part is None):
        raise ValueError(
            f"column {column.name}: {listed(map(repr, strange))} is none of train, val, test or their usual words: "
            "--data_args.split_column none does without the column"
        )
    if "train" not in words.values():
        raise ValueError(
            f"column {column.name}: no row is for train: --data_args.split_column none does without the column"
        )
    return column.map(words).to_numpy(str)


def from_column(numbers: pd.Series, name: str, count: int) -> np.ndarray:
    """(N,) int folds from 0 on, of a column that numbers them from 0 or 1.

    Raises:
        ValueError: other numbers than those of `count` folds.
    """
    values = pd.to_numeric(numbers, errors="coerce")
    kinds = np.unique(values.dropna())
    if (
        values.isna().any()
        or len(kinds) == 0
        or not np.array_equal(kinds, np.arange(count) + kinds[0])
        or kinds[0] not in (0, 1)
    ):
        shown = ", ".join(sorted(set(numbers))[:8])
        parts = f"; --data_args.split_column {name} takes a column of train, val and test" * any(
            part_of_word(name, each) for each in numbers
        )
        raise ValueError(
            f"column {name}: holds {shown}; --folds {count} needs the numbers 0 to {count - 1}, or 1 to {count}{parts}"
        )
    return (values - kinds[0]).to_numpy(np.int64)
