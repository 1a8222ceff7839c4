"""One split of pictures with targets, how it becomes samples, and how a part of it is held out."""

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from datamodules.transforms import Transform


@dataclass(frozen=True)
class Split:
    """`names` (N,) bytes, relative; `targets` (N,) int64 class indices, or of other tasks (N, K) float32; `open` turns a name into an RGB
    picture; `ids` (N,) str are a table's own."""

    names: np.ndarray
    targets: np.ndarray
    open: Callable[[bytes], Image.Image]
    ids: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: np.ndarray) -> "Split":
        return Split(self.names[rows], self.targets[rows], self.open, None if self.ids is None else self.ids[rows])


class TrainPictures(Dataset):
    """Key (index, epoch) or (index, epoch, copy) -> image (3, H, W) uint8, target, index; a function of seed and key alone.

    Args:
        transforms: of each epoch; the last holds for all later ones.
        boxes: decides from the image where the device will erase it; the sample then has `erase`, an int64 tensor.
        copies: of a picture in an epoch; of several the sample has `copy`, its number.
    """

    def __init__(
        self,
        split: Split,
        transforms: list[Transform],
        seed: int,
        boxes: Callable[[torch.Tensor], torch.Tensor] | None = None,
        copies: int = 1,
    ) -> None:
        self.split, self.transforms, self.seed, self.boxes, self.copies = split, transforms, seed, boxes, copies

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, ...]) -> dict:
        index, epoch, *copy = key
        picture = self.split.open(self.split.names[index])
        transform, erase = self.transforms[min(epoch, len(self.transforms) - 1)], {}
        number = {"copy": copy[0] if copy else 0} if self.copies > 1 else {}
        with keyed_rng(self.seed, epoch, index, *copy):
            image = transform(picture)
            if self.boxes is not None:
                erase = {"erase": self.boxes(image)}
        return {"image": image, "target": torch.as_tensor(self.split.targets[index]), "index": index, **number, **erase}


class EvalPictures(Dataset):
    """Key (index, valid) -> image (3, H, W) uint8, target, index, valid."""

    def __init__(self, split: Split, transform: Transform) -> None:
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, bool]) -> dict:
        index, valid = key
        image = self.transform(self.split.open(self.split.names[index]))
        return {"image": image, "target": torch.as_tensor(self.split.targets[index]), "index": index, "valid": valid}


@contextmanager
def keyed_rng(seed: int, *key: int) -> Iterator[None]:
    """Seed `random`, `numpy.random` and torch's CPU generator by seed and key; outside a worker the states before are put back.

    timm's transforms draw from all three. The CUDA generators are never touched (`torch.manual_seed` would seed them).
    """
    restore = get_worker_info() is None
    if restore:
        before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    seeds = np.random.SeedSequence(seed, spawn_key=key).generate_state(3).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(seeds[2])
    try:
        yield
    finally:
        if restore:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.default_generator.set_state(before[2])


def hold_out(split: Split, fraction: float, seed: int, class_names: list[str]) -> tuple[Split, Split]:
    """Stratified (rest, held out), both in the split's order.

    Raises:
        ValueError: a class has one sample only (named), or the fraction is smaller than one sample a class.
    """
    from sklearn.model_selection import train_test_split  # not where a picture is only predicted

    counts = np.bincount(split.targets, minlength=len(class_names))
    if (counts == 1).any():
        lonely = class_names[int(np.argmax(counts == 1))]
        raise ValueError(f"class {lonely!r} has one training sample: --val_fraction {fraction} needs two of each class, or a val folder")
    try:
        rest, held = train_test_split(np.arange(len(split)), test_size=fraction, random_state=seed, stratify=split.targets)
    except ValueError as error:
        present = int((counts > 0).sum())
        raise ValueError(
            f"--val_fraction {fraction} of {len(split)} training samples cannot hold each of {present} classes on both sides: {error}"
        ) from error
    return split.take(np.sort(rest)), split.take(np.sort(held))


def at_most(split: Split, per_class: int, seed: int) -> Split:
    """At most `per_class` samples of each class, drawn by `seed`; a smaller number takes a subset of what a larger one takes."""
    kept = []
    for target in np.unique(split.targets):
        rows = np.flatnonzero(split.targets == target)
        kept.append(np.random.RandomState([seed, target]).permutation(rows)[:per_class])
    return split.take(np.sort(np.concatenate(kept)))


def fingerprint(splits: dict[str, Split]) -> str:
    """sha256 over split, relative names and targets: changes when a sample moves, comes, goes or is relabelled; pixels do not count, nor
    what has no targets."""
    digest = hashlib.sha256()
    for name, split in sorted(splits.items()):
        if name != "predict":
            digest.update(f"{name} {len(split)}\n".encode() + b"\n".join(split.names.tolist()) + split.targets.tobytes())
    return digest.hexdigest()
