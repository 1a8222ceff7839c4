"""One split of images with targets, how it becomes samples, and how a part of it is held out."""

import hashlib
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate, get_worker_info

from datamodules.transforms.image_transforms import Transform


@dataclass(frozen=True)
class Split:
    """`names` (N,) bytes, relative; `targets` (N,) int64 class indices, (N, K) float32 labels or (N, T) float64 values;
    `open` turns a name into an RGB image; `ids` (N,) str are a table's own; `more` are values (N, ...) that a sample
    has under their names beside its image."""

    names: np.ndarray
    targets: np.ndarray
    open: Callable[[bytes], Image.Image]
    ids: np.ndarray | None = None
    more: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: np.ndarray) -> "Split":
        more = {name: values[rows] for name, values in self.more.items()}
        return Split(
            self.names[rows], self.targets[rows], self.open, None if self.ids is None else self.ids[rows], more
        )

    def beside(self, index: int) -> dict[str, torch.Tensor]:
        """`more` of one sample."""
        return {name: torch.as_tensor(values[index]) for name, values in self.more.items()}


class TrainPictures(Dataset):
    """Key (index, epoch) or (index, epoch, copy) -> image (3, H, W) uint8, target, index; a function of seed and key
    alone.

    A bare index, as of the sampler that Lightning puts in place of ours for `overfit_batches`, is of epoch 0.

    Args:
        transforms: of each epoch; the last holds for all later ones.
        boxes: decides from the image where the device will erase it; the sample then has `erase`, an int64 tensor.
        copies: of an image in an epoch; of several the sample has `copy`, its number.
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

    def __getitem__(self, key: tuple[int, ...] | int) -> dict:
        return self._sample(_whole(key, 0))

    def __getitems__(self, keys: list[tuple[int, ...] | int]) -> list[dict]:
        """Samples of one batch, for a DataLoader: cached images stand side by side in memory, and `collate` need not
        copy them."""
        whole = [_whole(key, 0) for key in keys]
        transform: Any = self._transform(whole[0][1])
        if not (hasattr(self.split.open, "pixels") and getattr(transform, "plain", False)):
            return [self._sample(key) for key in whole]
        memory = fresh((len(whole), *transform.size, 3)).permute(0, 3, 1, 2)  # (B, 3, H, W)
        return [self._sample(key, out) for key, out in zip(whole, memory)]

    def _transform(self, epoch: int) -> Transform:
        return self.transforms[min(epoch, len(self.transforms) - 1)]

    def _sample(self, key: tuple[int, ...], out: torch.Tensor | None = None) -> dict:
        index, epoch, *copy = key
        transform, erase = self._transform(epoch), {}
        number = {"copy": copy[0] if copy else 0} if self.copies > 1 else {}
        show = shown(self.split, index, transform)
        with keyed_rng(self.seed, epoch, index, *copy, numpy=not getattr(transform, "plain", False)):
            image = show() if out is None else show(out=out)
            if self.boxes is not None:
                erase = {"erase": self.boxes(image)}
        return {
            "image": image,
            "target": torch.as_tensor(self.split.targets[index]),
            "index": index,
            **number,
            **erase,
            **self.split.beside(index),
        }


class EvalPictures(Dataset):
    """Key (index, valid), or a bare index of a valid one -> image (3, H, W) uint8, target, index, valid."""

    def __init__(self, split: Split, transform: Transform) -> None:
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, bool] | int) -> dict:
        index, valid = _whole(key, True)
        image = shown(self.split, index, self.transform)()
        label = {"target": torch.as_tensor(self.split.targets[index]), "index": index, "valid": valid}
        return {"image": image, **label, **self.split.beside(index)}


def _whole(key: tuple[int, ...] | int, rest: int | bool) -> tuple[int, ...]:
    return key if isinstance(key, tuple) else (int(key), rest)


def shown(split: Split, index: int, transform: Transform) -> Callable[..., torch.Tensor]:
    """Function that gives (3, H, W) uint8 of an image that is opened here; straight from the pixels where it is cached
    and the transform can."""
    if hasattr(split.open, "pixels") and hasattr(transform, "of_pixels"):
        return partial(transform.of_pixels, *split.open.pixels(split.names[index]))
    return partial(transform, split.open(split.names[index]))


def fresh(shape: tuple[int, ...]) -> torch.Tensor:
    """An empty uint8 tensor; in a worker one that its loader can read too (as `default_collate` makes them)."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape, torch.empty(shape, device="meta").stride())


def collate(samples: list[dict]) -> dict[str, torch.Tensor]:
    """`default_collate`, where the images stand side by side in memory already (`TrainPictures.__getitems__`) without
    copying them."""
    memory = samples[0]["image"]._base
    if memory is None or len(memory) != len(samples) or any(sample["image"]._base is not memory for sample in samples):
        return default_collate(samples)
    rest = default_collate([{key: value for key, value in sample.items() if key != "image"} for sample in samples])
    return {"image": memory.permute(0, 3, 1, 2), **rest}


@contextmanager
def keyed_rng(seed: int, *key: int, numpy: bool = True) -> Iterator[None]:
    """Seed `random`, `numpy.random` and torch's CPU generator by seed and key; outside a worker the states before are
    put back.

    timm's transforms draw from all three; NumPy's, slow to put back, is left alone without `numpy`. The CUDA generators
    are never touched (`torch.manual_seed` would seed them).
    """
    restore = get_worker_info() is None
    before: Any = None
    if restore:
        before = random.getstate(), np.random.get_state() if numpy else None, torch.default_generator.get_state()
    seeds = np.random.SeedSequence(seed, spawn_key=key).generate_state(3).tolist()
    random.seed(seeds[0])
    if numpy:
        np.random.seed(seeds[1])
    torch.default_generator.manual_seed(seeds[2])
    try:
        yield
    finally:
        if restore:
            random.setstate(before[0])
            if numpy:
                np.random.set_state(before[1])
            torch.default_generator.set_state(before[2])


def hold_out(split: Split, fraction: float, seed: int, class_names: list[str]) -> tuple[Split, Split]:
    """Stratified (rest, held out), both in the split's order.

    Raises:
        ValueError: a class has one sample only (named), or the fraction is smaller than one sample a class.
    """
    from sklearn.model_selection import train_test_split  # not where an image is only predicted

    counts = np.bincount(split.targets, minlength=len(class_names))
    if (counts == 1).any():
        lonely = class_names[int(np.argmax(counts == 1))]
        raise ValueError(
            f"class {lonely!r} has one training sample: --val_fraction {fraction} needs two of each class, or a val "
            f"folder"
        )
    try:
        rest, held = train_test_split(
            np.arange(len(split)), test_size=fraction, random_state=seed, stratify=split.targets
        )
    except ValueError as error:
        present = int((counts > 0).sum())
        raise ValueError(
            f"--val_fraction {fraction} of {len(split)} training samples cannot hold each of {present} classes on "
            f"both sides: {error}"
        ) from error
    return split.take(np.sort(rest)), split.take(np.sort(held))


def at_most(split: Split, per_class: int, seed: int) -> Split:
    """At most `per_class` samples of each class, drawn by `seed`; a smaller number takes a subset of what a larger one
    takes."""
    kept = []
    for target in np.unique(split.targets):
        rows = np.flatnonzero(split.targets == target)
        kept.append(np.random.RandomState([seed, target]).permutation(rows)[:per_class])
    return split.take(np.sort(np.concatenate(kept)))


def spread(split: Split, count: int) -> Split:
    """At most `count` samples, evenly spaced, so that a split in the order of its classes keeps their shares."""
    return split if count >= len(split) else split.take(np.linspace(0, len(split) - 1, count).round().astype(np.int64))


def fingerprint(splits: dict[str, Split]) -> str:
    """sha256 over split, relative names and targets: changes when a sample moves, comes, goes or is relabelled; pixels
    do not count, nor what has no targets."""
    digest = hashlib.sha256()
    for name, split in sorted(splits.items()):
        if name != "predict":
            digest.update(
                f"{name} {len(split)}\n".encode() + b"\n".join(split.names.tolist()) + _digested(split.targets)
            )
            for key, values in sorted(split.more.items()):
                digest.update(key.encode() + values.tobytes())
    return digest.hexdigest()


def _digested(targets: np.ndarray) -> bytes:
    """Values of a regression as float32, which older runs keep the fingerprint of, unless that makes different ones
    equal."""
    short = targets.astype(np.float32) if targets.dtype == np.float64 else targets
    return (short if len(np.unique(short)) == len(np.unique(targets)) else targets).tobytes()
