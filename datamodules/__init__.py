"""Where pictures and targets come from and how they become batches.

A data set is a file `datamodules/<name>.py` that defines a class `DataModule`; there is no other list. `names()`, and
`detect()` on anything but ImageNet ids, import no torch, so the command line can ask early.
"""

from __future__ import annotations

import difflib
import os
import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.base import PictureData


NAMES = {"kaggle_csv": "csv"}  # files whose data set has a shorter name


def names() -> list[str]:
    """Registered data sets, sorted: the files beside this one that define `class DataModule`."""
    files = Path(__file__).parent.glob("*.py")
    return sorted(
        NAMES.get(f.stem, f.stem)
        for f in files
        if re.search(r"^class DataModule\b", f.read_text(encoding="utf-8"), re.MULTILINE)
    )


def accepted(name: str) -> list[str]:
    """Keywords that `create(name, ...)` takes.

    Raises:
        ValueError: unknown data set; names the closest and lists all.
    """
    from dataclasses import fields

    return [field.name for field in fields(data_class(name)) if field.init]


def create(name: str, **kwargs: Any) -> PictureData:
    """Build the data module `name`; reads the folder's listing, opens no picture.

    Raises:
        ValueError: unknown name or keyword (names the closest), or data that cannot be used as asked.
        FileNotFoundError: the data folder is not there; says what was looked for and where.
    """
    known = accepted(name)
    for key in kwargs:
        if key not in known:
            raise ValueError(f"data set {name!r} has no keyword {_closest(key, known)}")
    return data_class(name)(**kwargs)


def detect(data_dir: str) -> str:
    """Which data set a folder holds: `train.csv` is `csv`, class folders named by ImageNet ids `imagenet`, other class
    folders `folder`.

    Raises:
        FileNotFoundError: `data_dir` is not a folder.
        ValueError: it holds none of these; says what was looked for.
    """
    from datamodules.loading.class_folders import SPLITS, class_folders

    if not os.path.isdir(data_dir):
        raise FileNotFoundError(f"--data_dir {data_dir}: there is no such folder ({os.path.abspath(data_dir)})")
    if os.path.isfile(os.path.join(data_dir, "train.csv")):
        return "csv"
    found = {name for split in SPLITS for name in class_folders(data_dir, split)}
    if not found:
        looked = "train.csv, train/<class>/, val/<class>/ and test/<class>/"
        raise ValueError(f"--data_dir {data_dir}: cannot tell what it holds; looked for {looked}")
    if all(re.fullmatch(r"n\d{8}", name) for name in found):
        from timm.data import ImageNetInfo

        return "imagenet" if found <= set(ImageNetInfo().label_names()) else "folder"
    return "folder"


def data_class(name: str) -> type[PictureData]:
    """The class behind a data set's name. Raises ValueError for an unknown one."""
    if name not in names():
        raise ValueError(f"there is no data set {_closest(name, names())}")
    return import_module(module(name)).DataModule


def module(name: str) -> str:
    """The module of a data set's name."""
    return f"datamodules.{next((file for file, short in NAMES.items() if short == name), name)}"


def _closest(word: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"{word!r}{f'; closest: {nearest[0]!r}' if nearest else ''}; there are: {', '.join(known)}"
