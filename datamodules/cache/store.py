"""Pictures decoded and resized once, into a memory-mapped file that workers, ranks, folds and runs share.

A cache is a folder `<cache_dir>/pictures-<side>-<filter>-<key>/`; N pictures of all splits, each once, sorted by name:
    pixels.bin  uint8, one picture (H, W, 3) after the other
    index.npy   (N, 5) int64: first byte, height, width, and height and width of the original
    names.npy   (N,) bytes
    about.json  what it holds, for people
The key is of names, sizes and times of the files and of the settings, so changed files get another cache; nothing is
ever changed in place.
"""

import errno
import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from datamodules.loading.images import Split
from datamodules.transforms.array_transforms import filter_name

if TYPE_CHECKING:
    from datamodules.base import PictureData

FORMAT = 1
PIXELS, INDEX, NAMES, ABOUT = "pixels.bin", "index.npy", "names.npy", "about.json"


def planned(data: "PictureData") -> "PictureCache | None":
    """The cache that `cache_dir` asks for, built or not; None without it, for data in memory and for pictures that are
    no files.

    Raises:
        ValueError: `cache_side` without `cache_dir`.
    """
    if data.cache_side is not None and not data.cache_dir:
        raise ValueError(f"--cache_side {data.cache_side} is the size of pictures in --cache_dir, which is not given")
    if not data.cache_dir or data.in_memory or not all(hasattr(split.open, "path") for split in data.splits.values()):
        return None
    side = data.cache_side or default_side(data.image_size, data.crop_pct, data.train_sizes)
    return PictureCache(str(data.cache_dir), side, data.interpolation, dict(data.splits), data.workers)


def notes(data: "PictureData") -> list[str]:
    """Lines for people on the cache of the data, or on why there is none where one was asked for."""
    if data.cache is None:
        return (
            ["cache_dir is not used: these data are in memory, or their pictures are no files"]
            if data.cache_dir
            else []
        )
    lines, shown = [data.cache.note()], max(max(size) for size in (data.image_size, *data.train_sizes))
    if data.cache.side < shown:
        lines.append(
            f"cache_side {data.cache.side} is less than the {shown} pixels that are shown: pictures are enlarged from "
            f"it"
        )
    ready = (
        data.crop_mode == "center"
        and len({*data.image_size}) == 1
        and data.cache.side == math.floor(data.image_size[0] / data.crop_pct)
    )
    if not ready:
        lines.append(
            f"evaluation resizes a second time, from the cached {data.cache.side} pixels: scores are near, but not "
            f"equal to those of files"
        )
    return lines


def tell_filter(data: "PictureData", before: str | None) -> None:
    """Say on resuming that crops will come from another filter than `before`, so their pixels differ a little."""
    now = crops(data)
    if None not in (before, now) and before != now:
        print(
            f"training crops were resized by {before}, from here on by {now}: near, but not equal to a run on one "
            f"machine"
        )


def crops(data: "PictureData") -> str | None:
    """What resizes cached training crops here; None without a cache."""
    return data.cache and filter_name(data.interpolation)


def default_side(image_size: tuple[int, int], crop_pct: float, train_sizes: list[tuple[int, int]]) -> int:
    """What evaluation resizes the shorter side to before its centre crop, so that it finds its pixels ready (of an
    image_size that is not square, or whole training crops that are larger: the largest side)."""
    return max(math.floor(max(image_size) / crop_pct), *(max(size) for size in train_sizes))


@dataclass(eq=False)
class PictureCache:
    """All pictures of `splits` with a shorter side of at most `side` pixels; a picture is never enlarged.

    Args:
        root: folder of all caches. interpolation: timm's word. splits: their `open` has `path(name)`, the file.
            workers: that build; None: all cores.
    """

    root: str
    side: int
    interpolation: str
    splits: dict[str, Split]
    workers: int | None = None

    def __post_init__(self) -> None:
        self.openers: list[Callable[[bytes], Image.Image]] = []
        for _, split in sorted(self.splits.items()):
            if split.open not in self.openers:
                self.openers.append(split.open)

    @cached_property
    def names(self) -> np.ndarray:
        """(N,) bytes, sorted, each once; of several openers each name behind the number of its own."""
        parts = [(self.prefix(split.open), split.names) for split in self.splits.values()]
        return np.unique(np.concatenate([np.char.add(prefix, names) if prefix else names for prefix, names in parts]))

    @cached_property
    def folder(self) -> str:
        """Where this cache is or will be: looks at every file, opens none.

        Raises:
            FileNotFoundError: a file that is not there.
        """
        stats = np.array([self._stat(name) for name in self.names.tolist()], dtype=np.int64).reshape(
            -1, 2
        )  # bytes, nanoseconds
        digest = hashlib.sha256(f"{FORMAT} {self.side} {self.interpolation} {len(self.names)}\n".encode())
        digest.update(b"\n".join(self.names.tolist()) + stats.tobytes())
        digest.update(
            "".join(f"white {opener.how.white}\n" for opener in self.openers if opener.how.white is not None).encode()
        )
        return os.path.join(self.root, f"pictures-{self.side}-{self.interpolation}-{digest.hexdigest()[:16]}")

    @property
    def ready(self) -> bool:
        return os.path.isfile(os.path.join(self.folder, ABOUT))

    def prefix(self, opener: Callable[[bytes], Image.Image]) -> bytes:
        return b"%d/" % self.openers.index(opener) if len(self.openers) > 1 else b""

    def opened(self, name: bytes) -> tuple[Callable[[bytes], Image.Image], bytes]:
        """Who opens the entry, and under which name."""
        if len(self.openers) == 1:
            return self.openers[0], name
        number, own = name.split(b"/", 1)
        return self.openers[int(number)], own

    def build(self) -> None:
        """Make it unless it is there (`build.build`)."""
        if not self.ready:
            from datamodules.cache import build as cache_build

            cache_build.build(self)

    def serve(self, split: Split) -> Split:
        """The split with its pictures out of the cache, which is built first where it is not there."""
        self.build()
        self.store.maps  # noqa: B018  what is damaged is said here, not by a worker
        return replace(split, open=CachedFiles(self.store, self.prefix(split.open)))

    @cached_property
    def store(self) -> "Store":
        return Store(self.folder)

    def note(self) -> str:
        """A line for people: where it is, whether it must be built, what resizes its crops."""
        from datamodules.cache import build as cache_build

        state = "ready" if self.ready else cache_build.forecast(self)[1]
        return (
            f"picture cache {self.folder}: {len(self.names):,} pictures, {state}; training crops by "
            f"{filter_name(self.interpolation)}"
        )

    def _stat(self, name: bytes) -> tuple[int, int]:
        opener, own = self.opened(name)
        path = opener.path(own)
        try:
            found = os.stat(path)
        except OSError as error:
            raise FileNotFoundError(f"cannot read picture {path}: {error.strerror}") from None
        return found.st_size, found.st_mtime_ns


class Store:
    """The files of a built cache. Mapped at the first look, by each process for itself where it is not forked.

    Raises:
        ValueError: they do not belong together (by the first look).
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __getstate__(self) -> dict[str, str]:
        return {"folder": self.folder}  # never the pixels

    @cached_property
    def maps(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pixels (bytes,) uint8, index (N, 5) and names (N,), read-only; plain arrays: slicing a `np.memmap` is slow.

        The pixels are one shared mapping: a private one, which could be written to, must find room for all of them in
        memory and swap.
        """
        try:
            index, names = (np.load(os.path.join(self.folder, file), mmap_mode="r") for file in (INDEX, NAMES))
            pixels = np.memmap(os.path.join(self.folder, PIXELS), np.uint8, mode="r")
            whole = index.shape == (len(names), 5) and index[-1, 0] + index[-1, 1] * index[-1, 2] * 3 == len(pixels)
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise ValueError(
                    f"the picture cache {self.folder} is damaged ({error}): delete it, and it is built again"
                ) from None
            why = f"{error.strerror}, which is no damage" + "; ulimit -v may be too small for it" * (
                error.errno == errno.ENOMEM
            )
            raise ValueError(f"the picture cache {self.folder} cannot be read: {why}") from None
        except ValueError as error:
            raise ValueError(
                f"the picture cache {self.folder} cannot be read ({error}): delete it, and it is built again"
            ) from None
        if not whole:
            raise ValueError(f"the picture cache {self.folder} is damaged: delete it, and it is built again")
        return pixels.view(np.ndarray), index.view(np.ndarray), names.view(np.ndarray)

    def pixels(self, name: bytes) -> tuple[np.ndarray, tuple[int, int]]:
        """Picture (H, W, 3) uint8, a view of the file, and (height, width) of the original."""
        pixels, index, names = self.maps
        row = int(names.searchsorted(name))
        if row == len(names) or names[row] != name:
            raise KeyError(f"{name!r} is not in the picture cache {self.folder}")
        first, height, width, *whole = index[row].tolist()
        return pixels[first : first + height * width * 3].reshape(height, width, 3), tuple(whole)


@dataclass(frozen=True)
class CachedFiles:
    """Opens a name as `folder.Files` does, out of the cache: an RGB picture with the cache's size; `pixels` is without
    a copy."""

    store: Store
    prefix: bytes

    def __call__(self, name: bytes) -> Image.Image:
        return Image.fromarray(self.pixels(name)[0])

    def pixels(self, name: bytes) -> tuple[np.ndarray, tuple[int, int]]:
        """`Store.pixels`."""
        return self.store.pixels(self.prefix + name)
