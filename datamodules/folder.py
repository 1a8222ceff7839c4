"""Images in class folders: `train/<class>/**`, `val/<class>/**`, `test/<class>/**`."""

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from datamodules.base import PictureData
from datamodules.knobs import ImageFiles
from datamodules.loading.class_folders import (
    SPLITS,
    class_folders,
    composed,
    counted_suffixes,
    loose_pictures,
    picture_names,
)
from datamodules.loading.decode import MAX_PIXELS, USUALLY, Decoding, open_picture
from datamodules.loading.image_check import faults
from datamodules.loading.images import Split, at_most, fingerprint
from datamodules.tables.table import counted, listed

SECONDS = 10  # of a start for looking at images: some hundred thousand on a disk nearby
MOST_SKIPPED = 0.5  # with more images that cannot be read it is not the images


@dataclass(frozen=True)
class Files:
    """A name is the path relative to `root`."""

    root: str
    how: Decoding = USUALLY

    def __call__(self, name: bytes) -> Image.Image:
        return open_picture(self.path(name), self.how)

    def path(self, name: bytes) -> str:
        """The file, for the image cache (datamodules/cache/store.py)."""
        return os.path.join(self.root, os.fsdecode(name))


@dataclass(kw_only=True, eq=False, repr=False)
class DataModule(ImageFiles, PictureData):
    """Class index = position in `class_names`, or else in the sorted folders of train (of val and test where there is
    no train). Images in folders within a class folder belong to the class.

    Without `val`, `val_fraction` of train is held out. `per_class` N keeps at most N training images a class of what
    is left. A `test` without class folders has no labels and is not used.

    Args:
        bad_images: of images that cannot be read. error: header and end of each are looked at before the start, as
            many as SECONDS allow, evenly spread; of an image cache that is ready none, it has decoded them all. skip:
            all are looked at, and those are left out, after the split, which they do not move (`skipped`).
        max_pixels, white: `Decoding`.
        unreadable: names of those that are known, then none is looked at.

    Attributes:
        skipped: DataFrame of split, id, file and reason.

    Raises:
        ValueError: images that cannot be read (named), or with skip more than half of them.
    """

    per_class: int | None = None
    max_pixels: int = MAX_PIXELS
    white: float | None = None
    unreadable: list[str] | None = None

    def __post_init__(self) -> None:
        if self.bad_images not in ("error", "skip"):
            raise ValueError(f"bad_images {self.bad_images!r}: error or skip")
        self.lines: list[str] = []
        self.skipped = pd.DataFrame(columns=["split", "id", "file", "reason"])
        super().__post_init__()
        if self.unreadable is None and not (self.cache and self.cache.ready):
            self._refuse_unreadable()

    def read(self) -> tuple[list[str], dict[str, Split]]:
        if self.per_class is not None and self.per_class < 1:
            raise ValueError(f"per_class {self.per_class}: at least 1")
        root, others = self.find_root(), Counter[str]()
        self.folders: dict[str, str] = {}
        self.files = Files(root, Decoding(self.max_pixels, self.white))
        folders = {split: found for split in SPLITS if (found := class_folders(root, split))}
        if not folders:
            raise ValueError(
                f"{os.path.abspath(root)}: no class folders; looked for train/<class>/, val/<class>/, test/<class>/ "
                f"in it"
            )
        for split in ("train", "val"):
            if split not in folders and os.path.isdir(os.path.join(root, split)):
                raise ValueError(
                    f"{os.path.abspath(root)}/{split} has no class folders: pictures are looked for in {split}/<class>/"
                )
        index, readable = self.classes(folders)
        splits = {split: self._list(split, found, index, others) for split, found in folders.items()}
        if "train" in splits and "val" not in splits:
            splits |= self.with_val(splits["train"], readable)
        if "train" in splits and self.per_class is not None:
            splits["train"] = at_most(splits["train"], self.per_class, self.split_seed)
        self.listed = fingerprint(splits)
        self._note_left_out(root, others)
        return readable, self._readable(splits) if self.bad_images == "skip" else splits

    @property
    def identity(self) -> dict[str, Any]:
        """With what is there before images that cannot be read are left out: `listed`, its fingerprint, and for each
        class folder the number of its images and a digest of their names."""
        return super().identity | {"listed": self.listed, "folders": self.folders}

    def notes(self) -> list[str]:
        return self.lines + super().notes()

    def find_root(self) -> str:
        """The data folder.

        Raises:
            FileNotFoundError: not given, or not there.
        """
        if self.data_dir is None or not os.path.isdir(self.data_dir):
            where = "is not given" if self.data_dir is None else f"{os.path.abspath(self.data_dir)} is not a folder"
            raise FileNotFoundError(
                f"--data_dir {where}; it must hold train/<class>/ (to train), val/<class>/ or test/<class>/"
            )
        return self.data_dir

    def classes(self, folders: dict[str, list[str]]) -> tuple[dict[str, int], list[str]]:
        """({folder: class index}, readable names in index order) for the class folders of each split.

        Raises:
            ValueError: a class folder that is not among the known classes (named).
        """
        known = (
            self.class_names or folders.get("train") or sorted({name for found in folders.values() for name in found})
        )
        source = "the given class names" if self.class_names else "train"
        index = {composed(name): number for number, name in enumerate(known)}
        if len(index) < len(known):
            twice = [name for name, count in Counter(map(composed, known)).items() if count > 1]
            raise ValueError(
                f"{source} has class folders of one name in two spellings of Unicode: {listed(twice)}; join them"
            )
        for split, found in folders.items():
            if strange := sorted(name for name in found if composed(name) not in index):
                raise ValueError(f"{split}/ has class folders that are not in {source}: {', '.join(strange[:5])}")
        return {name: index[composed(name)] for found in (known, *folders.values()) for name in found}, list(known)

    def _list(self, split: str, folders: list[str], index: dict[str, int], others: Counter[str]) -> Split:
        """The images of a split; `others` counts files of other suffixes."""
        names = []
        for folder in folders:
            found, more = picture_names(self.files.root, split, folder)
            names.append(found)
            others.update(more)
            self.folders[f"{split}/{folder}"] = f"{len(found)} {hashlib.sha256(found.tobytes()).hexdigest()[:8]}"
        targets = np.repeat(
            np.array([index[folder] for folder in folders], dtype=np.int64), [len(part) for part in names]
        )
        return Split(np.concatenate(names), targets, self.files)

    def _note_left_out(self, root: str, others: Counter[str]) -> None:
        if others:
            self.lines.append(
                f"data left out {counted(others.total(), 'file')} whose suffix is of no picture that Pillow reads: "
                f"{counted_suffixes(others)}"
            )
        for split in SPLITS:
            if number := loose_pictures(root, split):
                self.lines.append(
                    f"data left out {counted(number, 'picture')} directly in {split}/: a class folder says what they "
                    f"show" + " (predict.py --folder predicts them)" * (split == "test")
                )

    def _used(self, splits: dict[str, Split]) -> dict[str, Split]:
        """Those that a run reads."""
        return {name: split for name, split in splits.items() if name != "train" or not self.eval_only}

    def _refuse_unreadable(self) -> None:
        """Look at images for as long as a start may take. Raises ValueError with those that cannot be read."""
        used = self._used(self.splits)
        names = np.concatenate([split.names for split in used.values()]) if used else np.array([], "S1")
        found, looked_at = faults(self.files.root, names, self.files.how, SECONDS)
        if found and self.bad_images == "error":
            shown = listed(f"{os.fsdecode(names[row])} is broken: {why}" for row, why in found.items())
            raise ValueError(
                f"--data_dir {self.data_dir}: {counted(len(found), 'picture')} that cannot be read: {shown} "
                f"(--bad_images skip leaves "
                f"{'it' if len(found) == 1 else 'them'} out)"
            )
        if looked_at < len(names):
            self.lines.append(
                f"data looked at {looked_at:,} of {len(names):,} pictures in {SECONDS} seconds, and all are sound; a "
                f"broken one of the "
                "others ends the run when it comes (--bad_images skip looks at all now, and leaves it out)"
            )

    def _readable(self, splits: dict[str, Split]) -> dict[str, Split]:
        """The splits without images that cannot be read, which go to `skipped` and `unreadable`. Raises ValueError
        for too many."""
        kept, rows = dict(splits), []
        for name, split in self._used(splits).items():
            if self.unreadable is None:
                bad = faults(self.files.root, split.names, self.files.how)[0]
            else:
                bad = dict.fromkeys(
                    np.flatnonzero(np.isin(split.names, [os.fsencode(each) for each in self.unreadable])).tolist(), ""
                )
            files = {row: os.fsdecode(split.names[row]) for row in bad}
            if len(bad) > MOST_SKIPPED * len(split):
                shown = listed(f"{files[row]} is broken: {why}" for row, why in bad.items())
                raise ValueError(
                    f"--data_dir {self.data_dir}: {len(bad):,} of {counted(len(split), 'picture')} of {name} cannot "
                    f"be read (more than "
                    f"half: too many to skip): {shown}"
                )
            kept[name] = split.take(np.setdiff1d(np.arange(len(split)), list(bad))) if bad else split
            rows += [(name, files[row], files[row], f"is broken: {why}") for row, why in bad.items()]
        self.skipped = pd.DataFrame(rows, columns=self.skipped.columns)
        if self.unreadable is None:
            self.unreadable = self.skipped["file"].tolist()
        if rows:
            counts = " and ".join(
                f"{counted(count, 'picture')} of {split}"
                for split, count in self.skipped["split"].value_counts().items()
            )
            self.lines.append(
                f"data skipped {counts}, listed in skipped.csv: "
                f"{listed(self.skipped['file'] + ' ' + self.skipped['reason'])}"
            )
        return kept
