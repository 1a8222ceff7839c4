"""Pictures in class folders: `train/<class>/*`, `val/<class>/*`, `test/<class>/*`."""

import os
from dataclasses import dataclass

import numpy as np
from PIL import Image

from datamodules.base import PictureData
from datamodules.decode import open_picture
from datamodules.listing import SPLITS, class_folders, picture_names
from datamodules.pictures import Split, at_most


@dataclass(frozen=True)
class Files:
    """A name is the path relative to `root`."""

    root: str

    def __call__(self, name: bytes) -> Image.Image:
        return open_picture(self.path(name))

    def path(self, name: bytes) -> str:
        """The file, for the picture cache (datamodules/cache.py)."""
        return os.path.join(self.root, os.fsdecode(name))


@dataclass(kw_only=True, eq=False, repr=False)
class DataModule(PictureData):
    """Class index = position in `class_names`, or else in the sorted folders of train (of val and test where there is no train).

    Without `val`, `val_fraction` of train is held out. `per_class` N keeps at most N training pictures a class of what is left.
    A `test` without class folders has no labels and is not used.
    """

    per_class: int | None = None

    def read(self) -> tuple[list[str], dict[str, Split]]:
        if self.per_class is not None and self.per_class < 1:
            raise ValueError(f"per_class {self.per_class}: at least 1")
        root = self.find_root()
        folders = {split: found for split in SPLITS if (found := class_folders(root, split))}
        if not folders:
            raise ValueError(f"{os.path.abspath(root)}: no class folders; looked for train/<class>/, val/<class>/, test/<class>/ in it")
        for split in ("train", "val"):
            if split not in folders and os.path.isdir(os.path.join(root, split)):
                raise ValueError(f"{os.path.abspath(root)}/{split} has no class folders: pictures are looked for in {split}/<class>/")
        index, readable = self.classes(folders)
        splits = {split: self._list(root, split, found, index) for split, found in folders.items()}
        if "train" in splits and "val" not in splits:
            splits |= self.with_val(splits["train"], readable)
        if "train" in splits and self.per_class is not None:
            splits["train"] = at_most(splits["train"], self.per_class, self.split_seed)
        return readable, splits

    def find_root(self) -> str:
        """The data folder.

        Raises:
            FileNotFoundError: not given, or not there.
        """
        if self.data_dir is None or not os.path.isdir(self.data_dir):
            where = "is not given" if self.data_dir is None else f"{os.path.abspath(self.data_dir)} is not a folder"
            raise FileNotFoundError(f"--data_dir {where}; it must hold train/<class>/ (to train), val/<class>/ or test/<class>/")
        return self.data_dir

    def classes(self, folders: dict[str, list[str]]) -> tuple[dict[str, int], list[str]]:
        """({folder: class index}, readable names in index order) for the class folders of each split.

        Raises:
            ValueError: a class folder that is not among the known classes (named).
        """
        known = self.class_names or folders.get("train") or sorted({name for found in folders.values() for name in found})
        source = "the given class names" if self.class_names else "train"
        for split, found in folders.items():
            if strange := sorted(set(found) - set(known)):
                raise ValueError(f"{split}/ has class folders that are not in {source}: {', '.join(strange[:5])}")
        return {name: index for index, name in enumerate(known)}, list(known)

    def _list(self, root: str, split: str, folders: list[str], index: dict[str, int]) -> Split:
        names = [picture_names(root, split, folder) for folder in folders]
        targets = np.repeat(np.array([index[folder] for folder in folders], dtype=np.int64), [len(part) for part in names])
        return Split(np.concatenate(names), targets, Files(root))
