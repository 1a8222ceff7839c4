"""The path template of a table's pictures, guessed from its columns and the folders. Only pandas, numpy, Pillow and the standard library."""

import os
import posixpath
import re
from collections import Counter
from itertools import product

import pandas as pd

from datamodules.listing import SUFFIXES
from datamodules.table import listed
from datamodules.table_guess import looks_like_files
from datamodules.table_pictures import Folder, locate

TRIED = 200  # rows looked for in each folder


def guess_template(folder: Folder, train: pd.DataFrame, asked: pd.DataFrame | None, id_column: str) -> tuple[str, str]:
    """(template, reason) under which most of the first training rows have a picture. `asked` are the rows to predict.

    Raises:
        ValueError: no column and folder fit; says what was looked for and what is there.
    """
    spread = train.iloc[:: max(1, len(train) // TRIED)].head(TRIED)
    columns = [id_column, *(name for name in train.columns if name != id_column and looks_like_files(train[name]))]
    holding = [name for name in folder.folders() if folder.listing(name)[0]]
    found = [(_share(folder, template, spread), template) for column in columns for name in ["", *holding]
             for template in [posixpath.join(name, f"{{{column}}}")] if "{" not in name]
    best = max((share for share, _ in found), default=0)
    if best > 0:
        good = [template for share, template in found if share == best]
        template = next((each for each in good if "train" in each.lower()), good[0])
        template = _with_suffix(folder, _with_split(folder, template, train, asked), spread)
        return template, f"{best:.0%} of {len(spread)} rows have a picture there"
    if nested := _nested(folder, spread, holding):
        return nested, "these columns spell the folders and files"
    there = listed(f"{name or '.'}/ ({len(folder.listing(name)[0])} pictures)" for name in holding) or "no picture in any folder"
    raise ValueError(f"where the pictures are cannot be told: --image says it, as {{split}}/{{{id_column}}}.jpg. Looked for the values of "
                     f"{' and '.join(columns)}, as {train[id_column].iloc[0]!r}, with and without {' '.join(SUFFIXES[:4])} ...; there is: {there}")


def _share(folder: Folder, template: str, rows: pd.DataFrame, split: str = "train") -> float:
    return sum(file is not None for file in locate(folder, template, rows, split)[0]) / max(1, len(rows))


def _with_split(folder: Folder, template: str, train: pd.DataFrame, asked: pd.DataFrame | None) -> str:
    """`train` in a folder's name becomes {split} where the other rows lie beside it."""
    place, name = posixpath.split(template)
    if "train" not in place:
        return template
    general = posixpath.join(re.sub("train", "{split}", place), name)
    known = asked is not None and set(re.findall(r"\{(.+?)\}", name)) <= set(asked.columns)
    if known and len(asked) and _share(folder, template, asked.head(TRIED)) > _share(folder, general, asked.head(TRIED), "test"):
        return template
    return general


def _with_suffix(folder: Folder, template: str, rows: pd.DataFrame) -> str:
    """With the suffix that all files found have and the column lacks."""
    files = [file for file in locate(folder, template, rows, "train")[0] if file]
    kinds = {os.path.splitext(file)[1] for file in files}
    column = re.findall(r"\{(.+?)\}", posixpath.basename(template))[0]
    if len(kinds) != 1 or looks_like_files(rows[column]):
        return template
    return template + kinds.pop()


def _nested(folder: Folder, rows: pd.DataFrame, holding: list[str]) -> str | None:
    """A template of several columns: each part of a file's path is a fixed word or the value of a column, all in one row."""
    votes: Counter[str] = Counter()
    values = {name: rows[name].str.strip() for name in rows.columns}
    for place in [name for name in holding if "/" in name][:50]:
        for file in list(folder.listing(place)[0])[:2]:
            stem, suffix = os.path.splitext(file)
            parts = [*place.split("/"), stem]
            choices = [[part, *(f"{{{name}}}" for name in values if (values[name] == part).any())] for part in parts]
            for choice in product(*choices):
                fields = [(word[1:-1], part) for word, part in zip(choice, parts) if word != part]
                if len({name for name, _ in fields}) == len(fields) > 1 and choice[-1] != stem and len(votes) < 1000:
                    votes["/".join(choice) + suffix] += 1
    shares = [(_share(folder, each, rows), each.count("{"), each) for each, _ in votes.most_common(40)]
    share, _, template = max(shares, default=(0, 0, ""))
    return _with_split(folder, template, rows, None) if share > 0 else None
