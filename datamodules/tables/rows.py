"""The rows of one table with their images and targets, everything that is wrong with them reported. Only pandas,
numpy, Pillow and the standard library, but for `Rows.split`."""

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from datamodules.tables.columns import read_columns
from datamodules.tables.images import Folder, Wrong, columns_in, locate, unreadable
from datamodules.tables.table import Report, counted, listed, near_miss, rows_text
from datamodules.tables.targets import NO_LABEL, read_targets, unlabelled

if TYPE_CHECKING:
    from datamodules.loading.images import Split

MOST_SKIPPED = 0.5  # more rows without an image than that: the template is wrong, not the images


@dataclass(frozen=True)
class Rows:
    """`ids` (N,) str; `files` N paths relative to the data folder or None; `targets` (N, ...); `bad` rows: path and
    reason; `more` (N, C) float64 of further columns."""

    name: str
    ids: np.ndarray
    files: list[str | None]
    targets: np.ndarray
    bad: Wrong
    more: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def good(self) -> np.ndarray:
        """(N,) bool: rows whose image is there."""
        mask = np.ones(len(self.ids), bool)
        mask[list(self.bad)] = False
        return mask

    @property
    def labelled(self) -> np.ndarray:
        """(N,) bool: rows that have a label, or none to have."""
        return np.array([self.bad.get(row, ("", ""))[1] != NO_LABEL for row in range(len(self.ids))], bool)

    def take(self, rows: np.ndarray) -> "Rows":
        """These rows alone, given by (R,) places."""
        bad = {place: self.bad[row] for place, row in enumerate(rows.tolist()) if row in self.bad}
        return Rows(
            self.name,
            self.ids[rows],
            [self.files[row] for row in rows],
            self.targets[rows],
            bad,
            {key: values[rows] for key, values in self.more.items()},
        )

    def split(self, opener: Any) -> "Split":
        """The rows whose image is there."""
        from datamodules.loading.images import Split

        names = np.array([(file or "").encode("utf-8", "surrogateescape") for file in self.files], dtype="S")
        return Split(names, self.targets, opener, self.ids, self.more).take(np.flatnonzero(self.good))

    def skipped(self) -> pd.DataFrame:
        """split, id, file and reason of the rows left out."""
        found = [(self.name, self.ids[row], *found) for row, found in sorted(self.bad.items())]
        return pd.DataFrame(found, columns=["split", "id", "file", "reason"])


def find_rows(
    folder: Folder,
    frame: pd.DataFrame,
    split: str,
    file: str,
    scheme: dict[str, Any],
    names: list[str] | None,
    report: Report,
    *,
    known: str,
    labelled: bool = True,
    skip: bool,
    hollow: np.ndarray | bool = False,
    more: dict[str, list[str]] | None = None,
) -> Rows:
    """Ids, images and targets of a table's rows. With `skip`, images that are missing or cannot be read are not
    reported, but bad; so are rows without a label where they may be `hollow`. `known` is where the names of the outputs
    come from, `more` names further columns, of numbers."""
    targets = scheme["targets"] if labelled else []
    needed = [
        scheme["id_column"],
        *targets,
        *columns_in(scheme["image"], [*frame.columns, *_template_columns(scheme)], split),
    ]
    needed += [name for names in (more or {}).values() for name in names]
    missing = [name for name in dict.fromkeys(needed) if name not in frame]
    for name in missing:
        report.add(file, f"has no column {name!r}{near_miss(name, frame.columns)}")
    ids = frame[scheme["id_column"]] if scheme["id_column"] in frame else pd.Series([""] * len(frame))
    if missing:
        return Rows(split, ids.to_numpy(str), [None] * len(frame), _no_targets(len(frame), scheme, names), {})
    report.rows(file, scheme["id_column"], (ids == "").to_numpy(), "no id")
    twice = ids[ids.duplicated(keep=False) & (ids != "")]
    if len(twice):
        report.rows(
            file,
            scheme["id_column"],
            twice.index.to_numpy(),
            f"{counted(twice.nunique(), 'id')} more than once",
            ids.to_numpy(),
        )
    hollow = unlabelled(frame, scheme) & hollow if labelled else np.zeros(len(frame), bool)
    read = _filled_in(frame, hollow, targets, file, report)
    values = (
        read_targets(read, scheme, names, file, report, known) if labelled else _no_targets(len(frame), scheme, names)
    )
    further = {key: read_columns(frame, columns, file, report) for key, columns in (more or {}).items()}
    files, bad = _pictures(folder, frame, split, file, scheme, report, skip)
    bad |= {row: (files[row] or "", NO_LABEL) for row in np.flatnonzero(hollow).tolist()}
    files = [None if hollow[row] else name for row, name in enumerate(files)]
    if labelled:
        _check_conflicts(files, values, file, report)
    return Rows(split, ids.to_numpy(str), files, values, bad, further)


def _filled_in(frame: pd.DataFrame, hollow: np.ndarray, targets: list[str], file: str, report: Report) -> pd.DataFrame:
    """The table with the first row's targets in the rows that have none and are left out, so that no error is reported
    for them."""
    if not hollow.any():
        return frame
    if hollow.all():
        report.add(file, f"column {', '.join(targets)}: no row has a label")
        return frame
    frame = frame.copy()
    frame.loc[hollow, targets] = frame.loc[~hollow, targets].iloc[0].to_numpy()
    return frame


def _template_columns(scheme: dict[str, Any]) -> list[str]:
    """All columns that a template names, so that a column that one table lacks is reported there."""
    return [re.sub(r"\[[\d:]+\]$", "", name) for name in re.findall(r"\{([^{}]+)\}", scheme["image"])]


def _no_targets(count: int, scheme: dict[str, Any], names: list[str] | None) -> np.ndarray:
    """Zeros in the shape of the task's targets."""
    if scheme["task"] == "classification":
        return np.zeros(count, np.int64)
    return np.zeros(
        (count, len(names or scheme["targets"])), np.float64 if scheme["task"] == "regression" else np.float32
    )


def _pictures(
    folder: Folder, frame: pd.DataFrame, split: str, file: str, scheme: dict[str, Any], report: Report, skip: bool
) -> tuple[list[str | None], Wrong]:
    """(file of each row or None, the rows that have none that can be read)."""
    files, missing, outside = locate(folder, scheme["image"], frame, split)
    if outside:
        shown = listed(map(" ".join, outside.values()))
        report.add(
            file, f"{counted(len(outside), 'path')} outside of the data folder, {rows_text(list(outside))}: {shown}"
        )
    broken = unreadable(folder.root, files, folder.how)
    if not skip or len(missing) + len(broken) > MOST_SKIPPED * len(frame):
        for found, what in ((missing, "missing"), (broken, "that cannot be read")):
            if found:
                report.add(
                    file,
                    f"{counted(len(found), 'picture')} {what}, {rows_text(list(found))}: "
                    f"{listed(map(' '.join, found.values()))}"
                    + " (--bad_images skip leaves such rows out)" * (not skip)
                    + " (more than half: too many to skip)" * skip,
                )
    return files, missing | broken | outside


def _check_conflicts(files: list[str | None], targets: np.ndarray, file: str, report: Report) -> None:
    """Report images that several rows name with different targets."""
    first: dict[str, int] = {}
    pairs = [(first.setdefault(name, row), row) for row, name in enumerate(files) if name]
    apart = [
        (before, row) for before, row in pairs if before != row and not np.array_equal(targets[before], targets[row])
    ]
    if apart:
        before, row = apart[0]
        report.add(
            file,
            f"{counted(len(apart), 'row')} with the picture of another row and another target, as "
            f"{rows_text([before, row])}: "
            f"{files[row]}",
        )
