"""Which pictures predict.py is asked about: the rows of a table, or the files of a folder. pandas and numpy alone."""
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from datamodules.listing import SUFFIXES
from datamodules.table import Report, listed, near_miss, read_table, rows_text
from datamodules.table_pictures import Folder, columns_in, locate


@dataclass(frozen=True)
class Rows:
    """`ids` (N,) under the name of their column; `names` (N,) bytes of the pictures relative to `root`, empty where `missing` says why."""

    root: str
    ids: pd.Series
    names: np.ndarray
    missing: dict[int, str]


def rows_of_folder(folder: str) -> Rows:
    """All pictures of a folder and of the folders within, hidden ones left out; `id` is the relative path, which also sorts them.

    Raises FileNotFoundError, or ValueError when there is none or a link leaves the folder (named).
    """
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
        raise ValueError(f"--folder {folder}: there is no picture in it (looked for {' '.join(SUFFIXES)})")
    found.sort()
    return Rows(folder, pd.Series(found, name="id", dtype=object), np.array([os.fsencode(name) for name in found]), {})


def rows_of_table(csv: str | None, data_dir: str | None, trained_on: str | None, scheme: dict[str, Any], *, image: str | None,
                  id_column: str | None, fill: bool) -> Rows:
    """The rows of `csv`, or of test.csv in the data folder: `data_dir`, else the csv's folder, else the one that the run was trained on.

    Args:
        scheme: `spec["table"]` of the run; image, id_column: in place of the scheme's.
        fill: pictures that are missing go to `Rows.missing`.

    Raises FileNotFoundError, or ValueError: no such column, no rows, an id twice, pictures that are missing or outside the folder, with rows.
    """
    folder = data_dir or (os.path.dirname(csv) or "." if csv else trained_on)
    if not folder:
        raise ValueError("which pictures? Give --data_dir with a test.csv in it, --csv, or --folder")
    file = Path(csv or Path(folder) / "test.csv")
    if not file.is_file():
        where = "" if data_dir or csv else ", in the folder the run was trained on; --data_dir names another"
        raise FileNotFoundError(f"there is no {file}{where} (--folder D predicts all pictures of a folder)")
    frame = read_table(file)
    column = id_column or scheme.get("id_column") or frame.columns[0]
    if column not in frame:
        raise ValueError(f"{file}: there is no column {column!r} for the ids{near_miss(column, frame.columns)}: --id_column")
    report, ids = Report(str(file)), frame[column]
    if not len(frame):
        report.add("all of it", "it has a header and no rows")
    report.rows(str(file), column, (ids == "").to_numpy(), "no id")
    report.rows(str(file), column, (ids.duplicated() & (ids != "")).to_numpy(), "an id that was there before", ids.tolist())
    report.finish()
    split, place = "train" if file.stem.startswith("train") else "test", Folder(folder)
    template = image or scheme.get("image") or _template(place, frame, column, split)
    columns_in(template, list(frame.columns))
    files, missing = locate(place, template, frame, split)
    if missing and (not fill or len(missing) == len(files)):
        advice = "--bad_images fill predicts the mean of the others for them; --image and --data_dir say where they are"
        raise ValueError(f"{file}: {len(missing)} of {len(files)} pictures cannot be used, {rows_text([*missing])} (the header is row 1): "
                         f"{listed(missing.values())}\n  {advice}")
    return Rows(folder, ids, np.array([os.fsencode(name or "") for name in files]), missing)


def _template(place: Folder, frame: pd.DataFrame, column: str, split: str) -> str:
    """For networks that were not trained on a table: the first usual place where the first picture is."""
    usual = [f"{folder}{{{column}}}" for folder in ("{split}/", "{split}_images/", "images/", "")]
    for template in usual:
        if not locate(place, template, frame.head(1), split)[1]:
            return template
    raise ValueError(f"where are the pictures? {place.root} has none of {', '.join(usual)} for the first row: --image, as {usual[0]}.jpg")
