"""Which rows of a table are held out: folds, a fold column, or a share; stratified, and groups whole."""

from fractions import Fraction

import numpy as np
import pandas as pd

from datamodules.table import listed, rows_text

FINEST = 20  # parts that rows are divided into for a share


def share_held_out(targets: np.ndarray, task: str, fraction: float, seed: int, groups: np.ndarray | None) -> np.ndarray:
    """(N,) bool, True for about `fraction` of the rows: some of k folds (`folds.assign`), with k up to 20 where the share is not smaller.

    Raises:
        ValueError: too few rows or groups to divide.
    """
    share = Fraction(fraction).limit_denominator(FINEST)
    if share.numerator in (0, share.denominator):
        share = Fraction(1, round(1 / min(fraction, 1 - fraction)))
        share = share if fraction < 0.5 else 1 - share
    units = len(targets) if groups is None else len(set(groups) - {""}) + int((groups == "").sum())
    if units < 2:
        raise ValueError(f"{'rows' if groups is None else 'groups'}: {units}; --val_fraction {fraction} needs two at least, --val_fraction 0 none")
    parts = min(share.denominator, units)
    return by_rule(targets, task, parts, seed, groups, None) < min(parts - 1, max(1, round(fraction * parts)))


def stratified(targets: np.ndarray, rows: np.ndarray, fraction: float, seed: int, names: list[str]) -> np.ndarray:
    """(R,) bool, True for a share of each class among these rows of the table, as `pictures.hold_out` draws it from class folders.

    Raises:
        ValueError: classes with one row (named), or a share smaller than a row a class.
    """
    from datamodules.pictures import Split, hold_out

    targets = targets[rows]
    alone = np.flatnonzero(np.bincount(targets, minlength=len(names)) == 1)
    if lonely := [f"{names[place]} ({rows_text(rows[targets == place])})" for place in alone]:
        raise ValueError(f"classes with one row each: {listed(lonely)}; --val_fraction {fraction} needs two of each class: drop them, or --folds K, "
                         "or --val_fraction 0")
    present, held = len(np.unique(targets)), int(np.ceil(fraction * len(rows)))
    if held < present:
        raise ValueError(f"--val_fraction {fraction} of {len(rows):,} rows is {held}, and each of {present} classes needs one: --val_fraction "
                         f"{np.ceil(100 * present / len(rows)) / 100:g} or more, or --folds K")
    return np.isin(rows, hold_out(Split(rows, targets, lambda name: None), fraction, seed, names)[1].names)


def by_rule(targets: np.ndarray, task: str, count: int, seed: int, groups: np.ndarray | None, names: list[str] | None) -> np.ndarray:
    """`folds.assign`, which imports scikit-learn."""
    from datamodules.folds import assign

    return assign(targets, task, count, seed, groups, class_names=names)


def together(groups: list[np.ndarray]) -> np.ndarray:
    """`folds.union`."""
    from datamodules.folds import union

    return union(*groups).astype(str)


def notes(fold: np.ndarray, targets: np.ndarray, task: str, names: list[str] | None) -> list[str]:
    """`folds.notes`."""
    from datamodules.folds import notes

    return notes(fold, targets, task, names or [])


def from_column(numbers: pd.Series, name: str, count: int) -> np.ndarray:
    """(N,) int folds from 0 on, of a column that numbers them from 0 or 1.

    Raises:
        ValueError: other numbers than those of `count` folds.
    """
    values = pd.to_numeric(numbers, errors="coerce")
    kinds = np.unique(values.dropna())
    if values.isna().any() or len(kinds) == 0 or not np.array_equal(kinds, np.arange(count) + kinds[0]) or kinds[0] not in (0, 1):
        shown = ", ".join(sorted(set(numbers))[:8])
        raise ValueError(f"column {name}: holds {shown}; --folds {count} needs the numbers 0 to {count - 1}, or 1 to {count}")
    return (values - kinds[0]).to_numpy(np.int64)
