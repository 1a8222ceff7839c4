"""ImageNet-1k (Russakovsky et al. 2015) in class folders named by WordNet ids: `train/n01440764/*.JPEG`,
`val/n01440764/*.JPEG`."""

import os
from collections import Counter

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo

from datamodules import folder
from datamodules.loading.class_folders import SPLITS, class_folders
from datamodules.loading.images import Split

TRAIN_PICTURES, VAL_PICTURES = 1_281_167, 50_000


class DataModule(folder.DataModule):
    """Class index = position among timm's 1,000 sorted ids, whatever folders are present; a `val` alone is enough to
    evaluate."""

    def find_root(self) -> str:
        """`data_dir`, or else `$IMAGENET_DIR`, or else `data/imagenet`.

        Raises:
            FileNotFoundError: none of them holds class folders; lists the places and the remedy.
        """
        variable = os.environ.get("IMAGENET_DIR")
        places = (
            {"--data_dir": self.data_dir}
            if self.data_dir
            else {"$IMAGENET_DIR": variable, "data/imagenet": "data/imagenet"}
        )
        for place in places.values():
            if place and any(class_folders(place, split) for split in SPLITS):
                return place
        looked = [f"  {name}: {_why_not(place)}" for name, place in places.items()]
        raise FileNotFoundError(
            "\n".join(
                [
                    "ImageNet was not found. Looked for train/ or val/ with class folders such as n01440764 in",
                    *looked,
                    "Name its folder: --data_dir DIR (val/ alone is enough for --eval_only). To try something now: "
                    "--data digits",
                ]
            )
        )

    def classes(self, folders: dict[str, list[str]]) -> tuple[dict[str, int], list[str]]:
        info = ImageNetInfo()
        index = {wnid: position for position, wnid in enumerate(info.label_names())}
        for split, found in folders.items():
            if strange := sorted(set(found) - set(index)):
                raise ValueError(
                    f"{split}/ has folders that are not ImageNet ids: {', '.join(strange[:5])}; use --data folder for "
                    f"them"
                )
        readable = _unique([*info.label_descriptions()], info.label_names())
        if self.class_names not in (None, readable):
            raise ValueError(
                "the given class names are not ImageNet's 1,000 in timm's order; use --data folder to keep them"
            )
        return index, readable


class Published(DataModule):
    """ImageNet-1k by its published numbers of images, without a file: for a plan where the data are not. Give
    `unreadable` []."""

    def read(self) -> tuple[list[str], dict[str, Split]]:
        self.listed, self.folders = "", {}
        _, names = self.classes({})
        sizes = {"train": TRAIN_PICTURES, "val": VAL_PICTURES}
        return names, {
            split: Split(np.zeros(size, "S1"), np.arange(size) % len(names), _no_picture)
            for split, size in sizes.items()
        }


def _no_picture(name: bytes) -> Image.Image:
    raise FileNotFoundError("these pictures are only counted")


def _unique(descriptions: list[str], wnids: list[str]) -> list[str]:
    """Two animals and machines share a name ("crane"): those get their id behind it."""
    counts = Counter(descriptions)
    return [text if counts[text] == 1 else f"{text} ({wnid})" for text, wnid in zip(descriptions, wnids)]


def _why_not(place: str | None) -> str:
    if not place:
        return "not set"
    return f"{os.path.abspath(place)} {'has no class folders' if os.path.isdir(place) else 'does not exist'}"
