"""The path template of a table's images, guessed from its columns and the folders. Only pandas, numpy, Pillow and the
standard library."""

import os
import posixpath
import re
from itertools import islice, product

import pandas as pd

from datamodules.loading.class_folders import SUFFIXES
from datamodules.tables.guess import looks_like_files
from datamodules.tables.images import FIELD, Folder, locate
from datamodules.tables.table import listed

TRIED = 100  # rows looked for in each folder
MOST_FOLDERS = 500  # in which they are looked for
ENOUGH = 0.9  # of the rows: then no template of several columns is looked for


def guess_template(folder: Folder, train: pd.DataFrame, asked: pd.DataFrame | None, id_column: str) -> tuple[str, str]:
    """(template, reason) under which most training rows have an image, and most of `asked`, the rows to predict.

    Raises:
        ValueError: no column and folder fit; lists what was looked for and what exists.
    """
    share, template = _best(folder, train, id_column, "train")
    if not template:
        there = listed(
            f"{name or '.'}/ ({len(folder.listing(name)[0])} pictures)"
            for name in folder.folders()
            if folder.listing(name)[0]
        )
        raise ValueError(
            f"where the pictures are cannot be told: --image says it, as {{split}}/{{{id_column}}}.jpg. Looked for "
            f"the values of "
            f"{id_column}, as {train[id_column].iloc[0]!r}, with and without {' '.join(SUFFIXES[:4])} ..., in: "
            + (there or "no folder with pictures")
            + _packed(folder.root)
        )
    general, reason = re.sub("train", "{split}", template), f"{share:.0%} of the rows looked for have a picture there"
    if asked is None or asked.empty or id_column not in asked:
        return general, reason
    there = _best(folder, asked, id_column, "test")[1]
    if there == template:
        return template, reason
    if not there or re.sub("test", "{split}", there) == general:
        return general, reason
    return f"{template},{there}", f"{reason}; those to predict lie elsewhere"


def _packed(root: str) -> str:
    names = sorted(
        name for name in os.listdir(root) if name.lower().endswith((".zip", ".tar", ".tar.gz", ".tgz", ".7z"))
    )
    return f"; {listed(names)} may hold them: unpack it there" if names else ""


def _best(folder: Folder, frame: pd.DataFrame, id_column: str, split: str) -> tuple[float, str]:
    """(share of rows that have an image, template) of the best one; (0, "") where none has."""
    rows = frame.iloc[:: max(1, len(frame) // TRIED)].head(TRIED)
    columns = [id_column, *(name for name in frame.columns if name != id_column and looks_like_files(frame[name]))]
    holding = [name for name in folder.folders() if folder.listing(name)[0] and "{" not in name]
    flat = [
        posixpath.join(name, f"{{{column}}}")
        for column in columns
        for name in dict.fromkeys(["", *holding[:MOST_FOLDERS]])
    ]
    found = [(_share(folder, each, rows), split in each.lower(), -place, each) for place, each in enumerate(flat)]
    share, _, _, template = max(found)
    if share < ENOUGH:
        deep = [(_share(folder, each, rows), each.count("{"), each) for each in _nested(folder, frame, holding)]
        share, _, template = max([*deep, (share, 1, template)])
    return (share, _with_suffix(folder, template, rows)) if share > 0 else (0.0, "")


def _share(folder: Folder, template: str, rows: pd.DataFrame) -> float:
    return sum(file is not None for file in locate(folder, template, rows, "train")[0]) / max(1, len(rows))


def _with_suffix(folder: Folder, template: str, rows: pd.DataFrame) -> str:
    """With the suffix that all files found have and the column lacks."""
    files = [file for file in locate(folder, template, rows, "train")[0] if file]
    kinds = {os.path.splitext(file)[1] for file in files}
    spelled = posixpath.basename(template)
    if len(kinds) != 1 or spelled.lower().endswith(SUFFIXES) or looks_like_files(rows[FIELD.findall(spelled)[-1]]):
        return template
    return template + kinds.pop()


def _nested(folder: Folder, frame: pd.DataFrame, holding: list[str]) -> list[str]:
    """Templates that spell some file there is: each part of its path a fixed word or the value of a column, several
    columns in all."""
    values = {name: set(frame[name]) for name in frame.columns if "{" not in name and "}" not in name}
    found: dict[str, None] = {}
    deep = [name for name in holding if name]
    for place in deep[:: max(1, len(deep) // 20)][:20]:
        file = next(iter(folder.listing(place)[0]))
        choices = [[part, *(f"{{{name}}}" for name in values if part in values[name])][:6] for part in place.split("/")]
        last = [f"{{{name}}}" for name in values if file in values[name] or os.path.splitext(file)[0] in values[name]]
        for choice in islice(product(*choices, last), 200):
            used = [name for name in FIELD.findall("/".join(choice))]
            if len(set(used)) == len(used) > 1:
                found["/".join(choice)] = None
    return list(found)[:60]
