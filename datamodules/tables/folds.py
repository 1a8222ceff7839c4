"""Folds of a table: which row is held out when. The same for every model; scikit-learn's wherever it has the scheme."""

import csv
import hashlib
import os
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from datamodules.loading.files import whole_file
from datamodules.tables.table import WHOLE, counted, listed, paired, whole

MOST_BINS = 20  # of a regression's target


def assign(
    targets: np.ndarray,
    task: str,
    k: int,
    seed: int,
    groups: np.ndarray | None = None,
    *,
    ids: Sequence[str] | None = None,
    stratified: bool = True,
    class_names: list[str] | None = None,
) -> np.ndarray:
    """Fold of each row, (N,) int64 in 0..k-1; rows of one group share it.

    classification: scikit-learn's StratifiedKFold, with groups StratifiedGroupKFold. regression: the same over `bins`
    of the target. multilabel, and several targets of a regression (their bins as labels): `iterative`.
    `stratified=False`: KFold, GroupKFold. All shuffled by `seed`.

    Args:
        targets: (N,) class indices, (N, K) labels 0 or 1, or (N,) or (N, T) values.
        groups: (N,) of any kind; an empty string is a row of its own.
        ids: N texts; the rows are divided in their order (`by_id`), so that the folds do not depend on the order of the
            rows.
        class_names: for messages.

    Raises:
        ValueError: fewer rows, groups or members of every class than folds; a target that is no number; folds that stay
            empty.
    """
    from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

    targets = np.asarray(targets)
    if ids is not None:
        order, fold = by_id(ids), np.empty(len(targets), np.int64)
        fold[order] = assign(
            targets[order],
            task,
            k,
            seed,
            None if groups is None else np.asarray(groups)[order],
            stratified=stratified,
            class_names=class_names,
        )
        return fold
    groups = None if groups is None else _numbered(np.asarray(groups))
    labels = _labels(targets, task, k)
    _check(labels, k, groups, class_names if task == "classification" else None)
    shuffled = {"shuffle": True, "random_state": seed}
    if not stratified:
        splitter = KFold(k, **shuffled) if groups is None else GroupKFold(k, **shuffled)
    elif labels.ndim == 2:
        return _filled(iterative(labels, k, seed, groups), k)
    else:
        splitter = StratifiedKFold(k, **shuffled) if groups is None else StratifiedGroupKFold(k, **shuffled)
    fold = np.full(len(labels), -1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")  # `notes` names it
        for number, (_, held_out) in enumerate(splitter.split(labels, labels, groups)):
            fold[held_out] = number
    return _filled(fold, k)


def by_id(ids: Sequence[str]) -> np.ndarray:
    """(N,) rows in the order of their ids: by size where all are whole numbers, else by code point."""
    numbers = all(map(WHOLE.fullmatch, ids))
    return np.array(
        sorted(range(len(ids)), key=lambda row: (int(whole(ids[row])) if numbers else 0, ids[row])), np.int64
    )


def bins(values: np.ndarray, k: int) -> np.ndarray:
    """(N,) values -> (N,) number of their quantile bin, as pandas.qcut: 20 bins, fewer by Rice's rule (2 n^(1/3)) or
    where a bin would have fewer members than folds. Quantiles, since bins of equal width are next to empty in the tail
    of a skewed target."""
    count = max(1, min(MOST_BINS, round(2 * len(values) ** (1 / 3)), len(values) // k))
    edges = np.unique(np.quantile(values, np.linspace(0, 1, count + 1)))
    return np.searchsorted(edges[1:-1], values, side="left")


def iterative(labels: np.ndarray, k: int, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Iterative stratification (Sechidis, Tsoumakas, Vlahavas 2011, algorithm 1) of (N, L) labels 0 or 1 -> (N,) folds.

    The rarest label left is dealt out first, each row to the fold that lacks that label most; of several to the one
    that lacks its other labels most (not in the paper, and better), then to the one with most room. With groups (N,)
    0.., whole groups are dealt out, those with most rows of the label first. No library here has it.
    """
    rng = np.random.RandomState(seed)
    item = np.arange(len(labels)) if groups is None else groups  # (N,) what is dealt out: rows, or groups
    size = np.bincount(item)  # (M,)
    has = np.zeros((len(size), labels.shape[1]), np.int64)  # (M, L)
    np.add.at(has, item, labels.astype(np.int64))
    wanted, room = np.tile(has.sum(0) / k, (k, 1)), np.full(k, len(labels) / k)
    fold, left = np.full(len(size), -1), has.sum(0)

    def deal(members: np.ndarray, label: int | None) -> None:
        members = rng.permutation(members)
        for member in members[np.argsort(-(size if label is None else has[:, label])[members], kind="stable")]:
            best = np.arange(k)
            for lack in [room] if label is None else [wanted[:, label], wanted @ has[member], room]:
                best = best[np.isclose(lack[best], lack[best].max())]
            fold[member] = place = rng.choice(best)
            wanted[place] -= has[member]
            room[place] -= size[member]
            left[:] -= has[member]

    while left.any():
        rarest = int(np.where(left > 0, left, np.iinfo(np.int64).max).argmin())
        deal(np.flatnonzero((fold < 0) & (has[:, rarest] > 0)), rarest)
    deal(np.flatnonzero(fold < 0), None)
    return fold[item]


def union(*groups: np.ndarray) -> np.ndarray:
    """(N,) group of each row when rows that share any of these groups belong together, directly or through others;
    numbered from 0 in order of first appearance. An empty string is a row of its own."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    rows = len(groups[0])
    numbers = [_numbered(np.asarray(each)) for each in groups]
    starts = rows + np.cumsum([0, *(int(each.max(initial=-1)) + 1 for each in numbers)])
    ends = np.concatenate([each + start for each, start in zip(numbers, starts)])
    edges = coo_matrix(
        (np.ones(len(ends)), (np.tile(np.arange(rows), len(groups)), ends)), shape=(starts[-1], starts[-1])
    )
    _, first, number = np.unique(
        connected_components(edges, directed=False)[1][:rows], return_index=True, return_inverse=True
    )
    return np.argsort(np.argsort(first))[number]


def notes(fold: np.ndarray, targets: np.ndarray, task: str, names: list[str]) -> list[str]:
    """A line on classes or labels that one fold never learns, all their rows being held out there, and one on those
    with fewer rows than folds, which some folds cannot be scored on."""
    if task == "regression":
        return []
    folds, columns = int(fold.max()) + 1, np.asarray(targets)
    columns = columns[:, None] == np.arange(len(names)) if task == "classification" else columns > 0  # (N, K)
    counts, lines = columns.sum(0), []
    within = np.stack([columns[fold == number].sum(0) for number in range(folds)])  # (folds, K)
    alone = [
        f"fold {within[:, i].argmax()}: {names[i]} ({counted(counts[i], 'row')})"
        for i in range(len(names))
        if 0 < counts[i] == within[:, i].max()
    ]
    if alone:
        lines.append(
            f"folds: a class whose rows lie in one fold whole is never learned by that fold, which gets all of them "
            f"wrong; {listed(alone)}"
        )
    rare = [f"{names[i]} ({counts[i]})" for i in np.argsort(counts, kind="stable") if 0 < counts[i] < folds]
    if rare:
        lines.append(
            f"folds: {len(rare)} of {len(names)} classes have fewer rows than the {folds} folds, so not every fold "
            f"holds one out: "
            f"{listed(rare)}"
        )
    return lines


def file_name(
    data: str,
    ids: Sequence[str],
    targets: np.ndarray,
    task: str,
    k: int,
    seed: int,
    groups: np.ndarray | None = None,
    *,
    stratified: bool = True,
) -> str:
    """`<data>-<fingerprint>-k<K>-s<seed>.csv`: another table, or another way to assign it, is another file. `kept`
    looks for one."""
    digest = hashlib.sha256(f"{task} {stratified}\n".encode() + "\n".join(map(str, ids)).encode())
    digest.update(
        np.asarray(targets).astype(np.float32 if task == "regression" else np.float64).astype(np.float64).tobytes()
    )  # as files are named
    digest.update(b"" if groups is None else _numbered(np.asarray(groups)).astype(np.int64).tobytes())
    return f"{data}-{digest.hexdigest()[:8]}-k{k}-s{seed}.csv"


def kept(
    folder: str,
    data: str,
    ids: Sequence[str],
    targets: np.ndarray,
    task: str,
    k: int,
    seed: int,
    groups: np.ndarray | None,
) -> str:
    """The file of a table's folds in a folder: named by its rows in the order of their ids, or, where there is one, by
    the rows as they stand, with which files were named before."""
    named = partial(file_name, data, task=task, k=k, seed=seed)
    before = [groups] if groups is None else [groups, union(groups).astype(str)]
    for path in (os.path.join(folder, named(ids, targets, groups=each)) for each in before):
        if os.path.isfile(path):
            return path
    order = by_id(ids)
    return os.path.join(
        folder, named([ids[row] for row in order], targets[order], groups=None if groups is None else groups[order])
    )


def read(path: str | Path, ids: Sequence[str], k: int, groups: np.ndarray | None = None) -> np.ndarray:
    """(N,) folds of these ids in a file that `write` left, whatever the order of its rows.

    Raises:
        ValueError: other columns, ids or folds than there should be, or a group on both sides; names file and row.
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    away = f"; delete {path} to have it written anew"
    if not rows or len(rows[0]) != 2 or rows[0][1] != "fold" or any(len(row) != 2 for row in rows):
        raise ValueError(f"{path} is no file of folds: two columns, the id and fold{away}")
    found, numbers = [row[0] for row in rows[1:]], [row[1] for row in rows[1:]]
    ids = [*map(str, ids)]
    known = paired(found, ids)
    line = {known[each]: row for row, each in enumerate(found) if each in known}
    if not len(line) == len(found) == len(ids):
        other = next((row for row, each in enumerate(found) if line.get(known.get(each, "")) != row), len(found) - 1)
        raise ValueError(f"{path} is of another table: {len(found)} ids for {len(ids)}, see line {other + 2}{away}")
    if strange := [i for i, number in enumerate(numbers) if not number.isdecimal() or int(number) >= k]:
        raise ValueError(f"{path}: line {strange[0] + 2} has fold {numbers[strange[0]]!r}; they are 0 to {k - 1}{away}")
    lines = [line[each] for each in ids]
    fold = _filled(np.array(numbers, np.int64)[lines], k)
    if groups is not None:
        number = _numbered(np.asarray(groups))
        split = np.flatnonzero(fold[np.unique(number, return_index=True)[1]][number] != fold)
        if len(split):
            raise ValueError(
                f"{path}: line {lines[split[0]] + 2} lies in another fold than the rest of its group{away}"
            )
    return fold


def write(path: str | Path, ids: Sequence[str], fold: np.ndarray, id_column: str = "id") -> None:
    """Write `id,fold`, whole or not at all; a file that is there stays."""
    if Path(path).exists():
        return
    with whole_file(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([[id_column, "fold"], *zip(ids, fold.tolist())])


def _labels(targets: np.ndarray, task: str, k: int) -> np.ndarray:
    """Labels that are spread evenly: (N,) classes or (N, L) labels 0 or 1."""
    if task == "classification":
        return targets.reshape(len(targets))
    if task == "multilabel":
        return targets.reshape(len(targets), -1) > 0
    values = targets.reshape(len(targets), -1).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(
            f"folds: row {int(np.argmin(np.isfinite(values).all(1)))} (from 0) has a target that is no finite number"
        )
    if len(values) < k:
        return np.zeros(len(values), np.int64)  # refused next
    binned = [bins(column, k) for column in values.T]
    return (
        binned[0]
        if len(binned) == 1
        else np.concatenate([column[:, None] == np.arange(column.max() + 1) for column in binned], 1)
    )


def _check(labels: np.ndarray, k: int, groups: np.ndarray | None, class_names: list[str] | None) -> None:
    if len(labels) < k:
        raise ValueError(f"--folds {k}: the table has {len(labels)} rows; --folds {max(2, len(labels))} at most")
    if groups is not None and (there := int(groups.max()) + 1) < k:
        raise ValueError(
            f"--folds {k}: there are {there} groups, and a group lies in one fold whole; "
            + (f"--folds {there} at most" if there > 1 else "with a single group there are no folds: another --group")
        )
    if labels.ndim == 1:
        values, counts = np.unique(labels, return_counts=True)
        if counts.max() < k:
            largest = values[counts.argmax()]
            name = class_names[int(largest)] if class_names else largest
            raise ValueError(
                f"--folds {k}: no class has {k} rows (the largest, {str(name)!r}, has {counts.max()}); is the target "
                f"a class? "
                f"--folds {max(2, counts.max())}, or --task regression"
            )


def _filled(fold: np.ndarray, k: int) -> np.ndarray:
    if empty := [number for number in range(k) if not (fold == number).any()]:
        raise ValueError(
            f"--folds {k}: fold {empty[0]} would be empty, since a few groups hold most of the rows; fewer --folds, "
            f"or another --group"
        )
    return fold.astype(np.int64)


def _numbered(groups: np.ndarray) -> np.ndarray:
    """(N,) 0.. in sorted order; empty strings become numbers of their own."""
    number = np.unique(groups, return_inverse=True)[1].reshape(len(groups))
    if groups.dtype.kind in "UO" and (alone := np.array([not str(each).strip() for each in groups])).any():
        number[alone] = len(groups) + np.arange(alone.sum())
        number = np.unique(number, return_inverse=True)[1]
    return number
