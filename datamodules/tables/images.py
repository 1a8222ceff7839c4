"""Rows of a table -> image files inside the data folder: the path template, the folders' listing, what is missing or
cannot be read.

A template names columns in braces, as `{split}/{Id}.jpg`; `{split}` is train or test, `{Id[0]}` and `{Id[0:2]}` are
characters of a column. A suffix that is left out is found. Two templates by a comma are for train and for test. Only
pandas, numpy, Pillow and the standard library.
"""

import os
import posixpath
import re
from contextlib import suppress
from functools import cache

import pandas as pd

from datamodules.loading.class_folders import composed
from datamodules.loading.decode import SUFFIXES, USUALLY, Decoding
from datamodules.loading.image_check import faults
from datamodules.tables.table import near_miss

FIELD = re.compile(r"\{([^{}]+)\}")


def part_of(template: str, split: str) -> str:
    """The template of train or of test, where there are two; a comma within the name of a folder divides none."""
    commas = [place for place, sign in enumerate(template) if sign == ","]
    for place in commas:
        parts = template[:place], template[place + 1 :]
        if all(FIELD.search(part) for part in parts):
            return parts[split != "train"].strip()
    return template


def columns_in(template: str, columns: list[str], split: str = "test") -> list[str]:
    """The columns that a template names, without `split`.

    Raises:
        ValueError: it names none, or one that does not exist; names the closest.
    """
    found = [_column(name, columns)[0] for name in FIELD.findall(part_of(template, split))]
    for name in found:
        if name != "split" and name not in columns:
            raise ValueError(f"--image {template}: there is no column {name!r}{near_miss(name, columns)}")
    if not set(found) - {"split"}:
        raise ValueError(f"--image {template}: names no column in braces, as {{split}}/{{{columns[0]}}}.jpg")
    return [name for name in found if name != "split"]


def _column(name: str, columns: list[str]) -> tuple[str, slice | None]:
    part = re.fullmatch(r"(.+)\[(\d+)(?::(\d+))?\]", name)
    if name in columns or not part:
        return name, None
    return part[1], slice(int(part[2]), int(part[3] or int(part[2]) + 1))


def paths(template: str, frame: pd.DataFrame, split: str) -> list[str]:
    """Paths of the rows as the template spells them, relative to the data folder."""
    columns, made = list(frame.columns), [""] * len(frame)
    for place, part in enumerate(FIELD.split(part_of(template, split))):
        if place % 2 == 0 or part == "split":
            text = part if place % 2 == 0 else split
            made = [path + text for path in made]
        else:
            name, cut = _column(part, columns)
            values = frame[name]
            made = [path + value for path, value in zip(made, values if cut is None else values.str[cut])]
    return made


class Folder:
    """A data folder, each of its folders listed once. A link may lead elsewhere in it; the folder itself, and one that
    the template names as a plain word directly in it, may be links."""

    def __init__(self, root: str, how: Decoding = USUALLY):
        self.root, self.how, self.listing, self.folders = root, how, cache(self._listing), cache(self._folders)
        self.likely, self.real_folder = cache(self._likely), cache(self._real_folder)
        self.suffix_guessed = False  # of a template, so that ids with several images are reported
        self.taken: dict[str, dict[str, str]] = {}  # what was taken in place of the table's path: kind -> path -> file

    def _listing(self, folder: str) -> tuple[dict[str, str | None], dict[str, str]]:
        """({file name: why it cannot be used, or None}, {name without the suffix or with it in lower case: file name})
        of the images in it."""
        names: dict[str, str | None] = {}
        stems: dict[str, str] = {}
        inside = self._inside(folder)
        try:
            with os.scandir(os.path.join(self.root, folder)) as entries:
                for entry in sorted(entries, key=lambda each: each.name):
                    stem, suffix = os.path.splitext(entry.name)
                    if entry.name.startswith(".") or suffix.lower() not in SUFFIXES:
                        continue
                    names[entry.name] = self._fault(entry, inside)
                    stems.setdefault(stem, entry.name)
                    stems.setdefault(stem + suffix.lower(), entry.name)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            pass
        return names, stems

    def _likely(self, folder: str) -> dict[tuple[str, str | int, str], list[str]]:
        """{(kind, stem, suffix in lower case or ""): names} of the images in it: `number` for stems of digits alone,
        `spelling` in Unicode's NFC, `several` as it is."""
        found: dict[tuple[str, str | int, str], list[str]] = {}
        for name in [name for name, fault in self.listing(folder)[0].items() if fault is None]:
            stem, suffix = os.path.splitext(name)
            ends = ("", suffix.lower())
            keys: list[tuple[str, str | int, str]] = [("several", stem, "")]
            keys += [("spelling", composed(stem), each) for each in ends]
            keys += [("number", int(stem), each) for each in ends] if re.fullmatch(r"[0-9]+", stem) else []
            for key in keys:
                found.setdefault(key, []).append(name)
        return found

    def _real_folder(self, folder: str) -> str:
        """The folder as the disk spells it: a Mac's é may be two characters there and one in the table."""
        if not folder or os.path.isdir(os.path.join(self.root, folder)):
            return folder
        parent, name = posixpath.split(folder)
        parent = self.real_folder(parent)
        with suppress(OSError):
            for each in sorted(os.listdir(os.path.join(self.root, parent))):
                if composed(each) == composed(name):
                    return posixpath.join(parent, each)
        return folder

    def notes(self) -> list[str]:
        """A line for each kind of image that was taken in place of the table's path."""
        words = {
            "number": "ids are the numbers of files that are written otherwise",
            "spelling": "names are spelled otherwise in Unicode on the disk",
            "several": "ids have several pictures, and the first by name is taken (--image with a suffix chooses)",
            "backslash": "paths have Windows' backslashes",
            "elsewhere": "paths are absolute, of another place, and are looked for in the data folder",
        }
        return [
            f"table {len(found):,} {words[kind]}, as "
            f"{', '.join(' for '.join(pair[::-1]) for pair in [*found.items()][:2])}"
            for kind, found in self.taken.items()
        ]

    def _inside(self, folder: str) -> list[str]:
        first = folder.split("/")[0]
        return [os.path.realpath(self.root), os.path.realpath(os.path.join(self.root, first))]

    @staticmethod
    def _fault(entry: os.DirEntry, inside: list[str]) -> str | None:
        if entry.is_symlink():
            target = os.path.realpath(entry.path)
            if not any(_under(target, folder) for folder in inside):
                return f"is a link that leaves the data folder, to {target}; copy the picture, or link the whole folder"
            if not os.path.exists(target):
                return f"is a broken link to {target}"
        return "is a folder" if entry.is_dir() else None

    def _folders(self, depth: int = 3, most: int = 3000) -> list[str]:
        """Visible folders, the nearest first, relative; `` is the data folder itself."""
        found, level = [""], [""]
        for _ in range(depth):
            below = []
            for folder in level:
                with os.scandir(os.path.join(self.root, folder)) as entries:
                    below += sorted(
                        posixpath.join(folder, entry.name)
                        for entry in entries
                        if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=folder == "")
                    )
                if len(found) + len(below) > most:
                    break
            level = below
            found += below
        return found[:most]

    def resolve(self, path: str) -> tuple[str | None, str]:
        """(file relative to the data folder or None, why not) of a path as a template spells it. Raises Outside for one
        that leaves it."""
        given, kinds = path, []
        if "\\" in path:
            path, kinds = path.replace("\\", "/"), ["backslash"]
        if path.startswith("/") or re.match(r"[A-Za-z]:/", path):
            file, why = self._below(path), "is missing"
            kinds = ["elsewhere"]
            if file is None:
                raise Outside("is not relative to the data folder")
        else:
            file, why = self._find(path, kinds)
        if file is not None:
            for kind in kinds:
                self.taken.setdefault(kind, {}).setdefault(given, file)
        return file, why

    def _below(self, path: str) -> str | None:
        """The file at the longest end of an absolute path that is in the data folder."""
        parts = [part for part in path.split("/") if part]
        for start in range(len(parts)):
            try:
                if file := self._find("/".join(parts[start:]), [])[0]:
                    return file
            except Outside:
                continue
        return None

    def _find(self, path: str, kinds: list[str]) -> tuple[str | None, str]:
        """`resolve` of a relative path with slashes; adds to `kinds` why another name was taken."""
        if path.startswith("~"):
            raise Outside("is not relative to the data folder")
        path = posixpath.normpath(path)
        if path == ".." or path.startswith("../"):
            raise Outside("leaves the data folder")
        folder, name = posixpath.split(path)
        folder = self.real_folder(folder)
        names, stems = self.listing(folder)
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in SUFFIXES:  # as it is, or in capitals, or twice, as of an id that has one already
            found = name if name in names else stems.get(stem + suffix.lower())
            found = found or (stem if stem in names else None)
            several = self.suffix_guessed and found == name
        else:
            found, stem, suffix, several = stems.get(name), name, "", True
        if several and len(self.likely(folder).get(("several", stem, ""), ())) > 1:
            kinds.append("several")
        if found is None:
            found = self._near(folder, stem, suffix.lower(), kinds)
        if found is None:
            return (
                None,
                f"is missing (there is {posixpath.join(folder, stems[stem])})" if stem in stems else "is missing",
            )
        fault = names[found] or ""
        if "leaves" in fault:
            raise Outside(fault)
        return (None, fault) if fault else (posixpath.join(folder, found), "")

    def _near(self, folder: str, stem: str, suffix: str, kinds: list[str]) -> str | None:
        """The one image whose name is the same in Unicode's NFC, or the same number."""
        number = re.fullmatch(r"([0-9]+)(\.0+)?", stem)
        for kind, key in (("spelling", composed(stem)), ("number", int(number[1]) if number else "")):
            near = self.likely(folder).get((kind, key, suffix), [])
            if len(near) == 1:
                kinds.append(kind)
                return near[0]
        return None


class Outside(Exception):
    """A path that leaves the data folder; the message describes how."""


def _under(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


Wrong = dict[int, tuple[str, str]]  # row from 0 on: path and what is wrong with it


def locate(folder: Folder, template: str, frame: pd.DataFrame, split: str) -> tuple[list[str | None], Wrong, Wrong]:
    """(file of each row or None, the rows whose image is missing, those whose path leaves the data folder)."""
    files, missing, outside = [], {}, {}
    strange = _strange_links(folder, template, split)
    for row, path in enumerate(paths(template, frame, split)):
        file = None
        try:
            file, why = folder.resolve(path)
            if file is None:
                missing[row] = path, why
            elif link := strange(posixpath.dirname(file)):
                file, outside[row] = None, (path, f"leaves the data folder through {link}")
        except Outside as error:
            outside[row] = path, str(error)
        files.append(file)
    return files, missing, outside


def _strange_links(folder: Folder, template: str, split: str):
    """A function of a folder: its real place where that is neither in the data folder nor in a linked one the template
    names itself."""
    template = part_of(template, split)
    first = template.split("/")[0].replace("{split}", split) if "/" in template else ""
    trusted = [os.path.realpath(folder.root)]
    if first and not FIELD.search(first):
        trusted.append(os.path.realpath(os.path.join(folder.root, first)))

    @cache
    def strange(name: str) -> str | None:
        real = os.path.realpath(os.path.join(folder.root, name))
        return None if any(_under(real, place) for place in trusted) else f"the link {name} to {real}"

    return strange


def unreadable(root: str, files: list[str | None], how: Decoding = USUALLY) -> Wrong:
    """The rows whose image cannot be read (`image_check.picture_fault`)."""
    return {row: (str(files[row]), f"is broken: {why}") for row, why in faults(root, files, how)[0].items()}
