"""Class folders and image files of a data folder, in a fixed order and without opening an image."""

import os
import unicodedata
from collections import Counter

import numpy as np

from datamodules.loading.decode import SUFFIXES, USUAL

SPLITS = ("train", "val", "test")
KNOWN = frozenset(SUFFIXES)


def class_folders(root: str, split: str) -> list[str]:
    """Sorted visible folders in `<root>/<split>`; empty when there is no such split or it is flat."""
    path = os.path.join(root, split)
    if not os.path.isdir(path):
        return []
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def loose_pictures(root: str, split: str) -> int:
    """The number of images directly in `<root>/<split>`, in no class folder."""
    path = os.path.join(root, split)
    if not os.path.isdir(path):
        return 0
    with os.scandir(path) as entries:
        return sum(
            not entry.name.startswith(".") and suffix_of(entry.name) in KNOWN and entry.is_file() for entry in entries
        )


def picture_names(root: str, split: str, folder: str) -> tuple[np.ndarray, Counter[str]]:
    """(names relative to `root` of the images in `<root>/<split>/<folder>` and the folders in it: (N,) bytes, sorted,
    hidden ones left out; how many files of each other suffix there are).

    One bytes array instead of a list of str: worker processes share its memory. `root` and `<root>/<split>` may be
    links.

    Raises:
        ValueError: no image in the folder, or a link that is broken or leaves the data folder (named).
    """
    path = os.path.join(root, split, folder)
    inside = [os.path.realpath(root), os.path.realpath(os.path.join(root, split))]
    if os.path.islink(path):
        _check_link(path, inside)
    found, others, places = [], Counter[str](), [f"{split}/{folder}"]
    for place in places:  # grows
        with os.scandir(os.path.join(root, place)) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                link, suffix = entry.is_symlink(), suffix_of(name)
                if entry.is_dir():
                    if not link or _leads_elsewhere(entry.path, path, inside):
                        places.append(f"{place}/{name}")
                elif suffix in KNOWN:
                    if link:
                        _check_link(entry.path, inside)
                    found.append(os.fsencode(f"{place}/{name}"))
                else:
                    others[suffix] += 1
    if not found:
        there = f"; of other files it has {counted_suffixes(others)}" if others else ""
        raise ValueError(
            f"class folder {path} holds no picture (looked for {' '.join(USUAL[:4])} and whatever else Pillow "
            f"reads{there})"
        )
    return np.array(sorted(found)), others


def suffix_of(name: str) -> str:
    """In lower case with its dot; empty where there is none."""
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def counted_suffixes(counts: Counter[str]) -> str:
    """`15 .heic, 3 .txt`, the most first; with what helps against the former."""
    first = sorted(counts.items(), key=lambda each: (-each[1], each[0]))[:5]
    words = ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in first)
    more = f" and {len(counts) - 5} other suffixes" if len(counts) > 5 else ""
    return words + more + " (pip install pillow-heif reads .heic and .heif)" * bool(counts.keys() & {".heic", ".heif"})


def composed(name: str) -> str:
    """The name as most systems spell it (Unicode NFC); a Mac's zip spells é as e and an accent (NFD)."""
    return unicodedata.normalize("NFC", name)


def _leads_elsewhere(link: str, class_folder: str, inside: list[str]) -> bool:
    """Whether a link to a folder shows images that are not listed anyway, or for ever. Raises ValueError for one that
    leaves the data folder."""
    _check_link(link, inside)
    target, here = os.path.realpath(link), os.path.realpath(os.path.dirname(link))
    return not _under(target, os.path.realpath(class_folder)) and not _under(here, target)


def _under(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _check_link(path: str, inside: list[str]) -> None:
    target = os.path.realpath(path)
    if not os.path.exists(target):
        raise ValueError(f"{path} is a broken link to {target}")
    if not any(_under(target, folder) for folder in inside):
        raise ValueError(
            f"{path} is a link that leaves the data folder (to {target}); copy the files, or link the whole data folder"
        )
