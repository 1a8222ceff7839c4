"""Class folders and picture files of a data folder, in a fixed order and without opening a picture."""

import os

import numpy as np

SPLITS = ("train", "val", "test")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def class_folders(root: str, split: str) -> list[str]:
    """Sorted visible folders in `<root>/<split>`; empty when there is no such split or it is flat."""
    path = os.path.join(root, split)
    if not os.path.isdir(path):
        return []
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def picture_names(root: str, split: str, folder: str) -> np.ndarray:
    """Names relative to `root` of the pictures directly in `<root>/<split>/<folder>`: (N,) bytes, sorted, hidden files left out.

    One bytes array instead of a list of str: worker processes share its memory. `root` and `<root>/<split>` may be links.

    Raises:
        ValueError: no picture in the folder, or a link that is broken or leaves the data folder (named).
    """
    path = os.path.join(root, split, folder)
    inside = [os.path.realpath(root), os.path.realpath(os.path.join(root, split))]
    if os.path.islink(path):
        _check_link(path, inside)
    found = []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith(".") or not entry.name.lower().endswith(SUFFIXES):
                continue
            if entry.is_symlink():
                _check_link(entry.path, inside)
            if not entry.is_dir():
                found.append(os.fsencode(f"{split}/{folder}/{entry.name}"))
    if not found:
        raise ValueError(f"class folder {path} holds no picture (looked for {' '.join(SUFFIXES)} directly in it)")
    return np.array(sorted(found))


def _check_link(path: str, inside: list[str]) -> None:
    target = os.path.realpath(path)
    if not os.path.exists(target):
        raise ValueError(f"{path} is a broken link to {target}")
    if not any(os.path.commonpath([target, folder]) == folder for folder in inside):
        raise ValueError(f"{path} is a link that leaves the data folder (to {target}); copy the files, or link the whole data folder")
