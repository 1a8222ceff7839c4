"""Images to predict: the rows of a table, or the files of a folder. pandas and numpy alone."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from datamodules.loading.decode import SUFFIXES, USUAL, Decoding
from datamodules.tables.columns import read_columns
from datamodules.tables.images import Folder, columns_in, locate, unreadable
from datamodules.tables.scheme import FILES
from datamodules.tables.table import Report, listed, near_miss, read_table, rows_text


@dataclass(frozen=True)
class Rows:
    """`ids` (N,) under the name of their column; `names` (N,) bytes of the pictures relative to `root`, empty where
    `bad` says why; `columns` (N, I) float64 in own units, that the networks take beside the picture."""

    root: str
    ids: pd.Series
    names: np.ndarray
    bad: dict[int, str]
    columns: np.ndarray | None = None


def rows_of_folder(folder: str, inputs: Sequence[str] = ()) -> Rows:
    """All pictures of a folder and of the folders within, hidden ones left out; `id` is the relative path, which also
    sorts them.

    Raises FileNotFoundError, or ValueError when there is none or a link leaves the folder (named), or the networks take
    columns, `inputs`.
    """
    if inputs:
        raise ValueError(
            f"--folder {folder}: the network takes columns beside the picture ({', '.join(inputs)}): give a table, "
            f"--csv"
        )
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"--folder {folder}: there is no such folder")
    found, inside = [], os.path.realpath(folder)
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = os.path.join(place, name)
            if name.startswith(".") or not name.lower().endswith(SUFFIXES):
                continue
            if os.path.commonpath([os.path.realpath(path), inside]) != inside:
                raise ValueError(f"{path} is a link that leaves the folder (to {os.path.realpath(path)})")
            found.append(Path(path).relative_to(folder).as_posix())
    if not found:
        raise ValueError(
            f"--folder {folder}: there is no picture in it (looked for {' '.join(USUAL[:4])} and whatever else Pillow "
            f"reads)"
        )
    found.sort()
    return Rows(folder, pd.Series(found, name="id", dtype=object), np.array([os.fsencode(name) for name in found]), {})


def rows_of_table(
    csv: str | None,
    data_dir: str | None,
    trained_on: dict[str, Any],
    scheme: dict[str, Any],
    *,
    image: str | None,
    id_column: str | None,
    fill: bool,
    how: Decoding,
    inputs: Sequence[str] = (),
) -> Rows:
    """The rows of `csv`, or of test.csv, else sample_submission.csv, in the data folder: `data_dir`, else the csv's
    folder, else that of the run.

    Args:
        trained_on: config of the run, of which data_dir and data_args are used.
        scheme: `spec["table"]` of the run; image, id_column: in place of the scheme's.
        inputs: columns that the networks take.
        how: pictures are read.
        fill: pictures that are missing or cannot be read go to `Rows.bad`.

    Raises FileNotFoundError, or ValueError, one report: no such column, no numbers in one of `inputs`, no rows,
    an id twice, pictures that are missing, unreadable or outside.
    """
    root = data_dir or (os.path.dirname(csv) or "." if csv else trained_on.get("data_dir"))
    if data_dir and not os.path.isdir(data_dir):
        raise FileNotFoundError(f"--data_dir {data_dir}: there is no such folder")
    if not root:
        raise ValueError("which pictures? Give --data_dir with a test.csv in it, --csv, or --folder")
    file = (
        Path(csv)
        if csv
        else _table_in(
            root, trained_on, "" if data_dir else ", the folder the run was trained on (--data_dir names another)"
        )
    )
    frame, folder, report = read_table(file), Folder(root), Report(str(file))
    column = id_column or scheme.get("id_column") or frame.columns[0]
    if column not in frame:
        raise ValueError(
            f"{file}: there is no column {column!r} for the ids{near_miss(column, frame.columns)}: --id_column"
        )
    if frame.empty:
        raise ValueError(f"{file}: has a header and no row")
    ids, split = frame[column].str.strip(), "train" if file.stem.startswith("train") else "test"
    report.rows(file.name, column, (ids == "").to_numpy(), "no id")
    report.rows(
        file.name, column, (ids.duplicated(keep=False) & (ids != "")).to_numpy(), "ids more than once", ids.tolist()
    )
    columns = read_columns(frame, list(inputs), file.name, report) if inputs else None
    template = image or scheme.get("image") or _template(folder, frame, column, split)
    columns_in(template, list(frame.columns))
    files, missing, outside = locate(folder, template, frame, split)
    unread = unreadable(root, files, how)
    bad = {row: " ".join(found) for row, found in sorted((missing | unread).items())}
    for found, what in (
        (outside, "are outside of the data folder"),
        (missing, "are missing"),
        (unread, "cannot be read"),
    ):
        if found and (not fill or found is outside or len(bad) == len(files)):
            report.add(
                file.name,
                f"{len(found)} of {len(files)} pictures {what}, {rows_text([*found])}: "
                f"{listed(map(' '.join, found.values()))}"
                + " (--bad_images fill predicts the mean of the others for them)"
                * (not fill and found is not outside),
            )
    report.finish()
    names = np.array([b"" if row in bad else os.fsencode(name) for row, name in enumerate(files)])
    return Rows(root, ids, names, bad, columns)


def _table_in(root: str, trained_on: dict[str, Any], whose: str) -> Path:
    """test.csv, or the names the run was given, else the sample submission, as in training. Raises
    FileNotFoundError."""
    given = trained_on.get("data_args") or {}
    looked = [
        name
        for part in ("test", "sample")
        for name in ([given[f"{part}_csv"]] if given.get(f"{part}_csv") else FILES[part])
    ]
    found = [name for name in looked if (Path(root) / name).is_file()]
    if not found:
        raise FileNotFoundError(
            f"there is no {' or '.join(looked[:2])} in {root}{whose}; --csv names a table, --folder D predicts all "
            f"pictures of D"
        )
    return Path(root) / found[0]


def _template(folder: Folder, frame: pd.DataFrame, column: str, split: str) -> str:
    """For networks that were not trained on a table: the first usual place where the first picture is."""
    usual = [f"{place}{{{column}}}" for place in ("{split}/", "{split}_images/", "images/", "")]
    for template in usual:
        if locate(folder, template, frame.head(1), split)[0][0]:
            return template
    raise ValueError(
        f"where are the pictures? {folder.root} has none of {', '.join(usual)} for the first row: --image, as "
        f"{usual[0]}.jpg"
    )
