"""The data room: images and targets, and their batches.

A data set is a file `datamodules/<name>.py` that defines a class `DataModule`; there is no other list. `names()`, and
`detect()` on anything but ImageNet ids, import no torch, so the command line can ask early.
"""

from __future__ import annotations

import os
import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.loading.closest import did_you_mean

if TYPE_CHECKING:
    from datamodules.base import PictureData


NAMES = {"kaggle_csv": "csv"}  # files whose data set has a shorter name


def names() -> list[str]:
    """Registered data sets, sorted: the files beside this one that define `class DataModule`."""
    return sorted(NAMES.get(stem, stem) for stem in _stems())


def _stems() -> list[str]:
    files = Path(__file__).parent.glob("*.py")
    return [f.stem for f in files if re.search(r"^class DataModule\b", f.read_text(encoding="utf-8"), re.MULTILINE)]


def __getattr__(name: str) -> type[PictureData]:
    """A data set's class by its file's name in capitals: `datamodules.ImageNet`, `Folder`, `KaggleCSV`, `Pawpularity`,
    `Digits`; loaded when it is asked for."""
    for stem in _stems() if name[:1].isupper() else ():
        if stem.replace("_", "") == name.lower():
            return import_module(f"{__name__}.{stem}").DataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def accepted(name: str) -> list[str]:
    """Keywords that `create(name, ...)` takes.

    Raises:
        ValueError: unknown data set; names the closest and lists all.
    """
    from dataclasses import fields

    return [field.name for field in fields(data_class(name)) if field.init]


def create(name: str, **kwargs: Any) -> PictureData:
    """Build the data module `name`; reads the folder's listing, opens no image.

    Raises:
        ValueError: unknown name or keyword (names the closest), or data that cannot be used as asked.
        FileNotFoundError: the data folder does not exist; names the places.
    """
    known = accepted(name)
    for key in kwargs:
        if key not in known:
            near = did_you_mean(key, known)
            raise ValueError(f"data set {name!r} has no keyword {key!r}{near} (it takes {', '.join(known)})")
    return data_class(name)(**kwargs)


def detect(data_dir: str) -> str:
    """Name of the data set that a folder holds: `train.csv` is `csv`, class folders named by ImageNet ids `imagenet`,
    other class folders `folder`.

    Raises:
        FileNotFoundError: `data_dir` is not a folder.
        ValueError: it holds none of these; lists what was looked for.
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
        raise ValueError(f"there is no data set {name!r}{did_you_mean(name, names())} (there are {', '.join(names())})")
    return import_module(module(name)).DataModule


def module(name: str) -> str:
    """The module of a data set's name."""
    return f"datamodules.{next((file for file, short in NAMES.items() if short == name), name)}"
