"""Builds an image cache (datamodules/cache/store.py): estimates its size, decodes on all cores, resumes after a crash.

It grows in a hidden folder beside its place and is renamed when it is whole, so it is there as a whole or not at all.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, BinaryIO

import numpy as np
import PIL
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Resize
from torchvision.transforms.functional import InterpolationMode
from tqdm import tqdm

from datamodules.cache.store import ABOUT, FORMAT, INDEX, NAMES, PIXELS, CachedFiles, Store
from datamodules.loading.cores import cores
from datamodules.loading.decode import PictureError
from datamodules.loading.images import Split
from datamodules.loading.workers import ignore_terminal_signals
from datamodules.transforms.array_transforms import filter_name

ROWS = "rows.bin"  # of the index, as far as the pixels are on disk
LOCK = "lock"
SAMPLE = 200  # images whose size is looked at for the forecast
BATCH = 16  # images a worker hands over at once
COMMIT_BYTES = 2**26  # of pixels lost at most by a kill
WAIT_SECONDS = 0.5


def default_side(image_size: tuple[int, int], crop_pct: float, train_sizes: list[tuple[int, int]]) -> int:
    """Size that evaluation resizes the shorter side to before its centre crop, so that it finds its pixels ready (of an
    image_size that is not square, or whole training crops that are larger: the largest side)."""
    return max(math.floor(max(image_size) / crop_pct), *(max(size) for size in train_sizes))


@dataclass(eq=False)
class ImageCache:
    """All images of `splits` with a shorter side of at most `side` pixels; an image is never enlarged.

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
        self.openers: list[Any] = []  # of the splits; each has `path(name)` and `how`, as folder.Files
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
        """Folder of this cache, built or not; looks at every file, opens none.

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

    def opened(self, name: bytes) -> tuple[Any, bytes]:
        """Opener of an entry, and the name it knows the entry under."""
        if len(self.openers) == 1:
            return self.openers[0], name
        number, own = name.split(b"/", 1)
        return self.openers[int(number)], own

    def build(self) -> None:
        """Make it unless it is there (`build.build`)."""
        if not self.ready:
            build(self)

    def serve(self, split: Split) -> Split:
        """The split with its images out of the cache, which is built first where it is not there."""
        self.build()
        self.store.maps  # noqa: B018  a damaged cache raises here, not in a worker
        return replace(split, open=CachedFiles(self.store, self.prefix(split.open)))

    @cached_property
    def store(self) -> Store:
        return Store(self.folder)

    def note(self) -> str:
        """A line on the cache: its folder, whether it must be built, the filter of its crops."""
        state = "ready" if self.ready else forecast(self)[1]
        return (
            f"picture cache {self.folder}: {len(self.names):,} pictures, {state}; training crops by {self.crop_filter}"
        )

    def notes(self, shown: list[tuple[int, int]], evaluated: float | None) -> list[str]:
        """Lines on the cache, and on what it changes.

        Args:
            shown: (height, width) of evaluation and of all training crops. evaluated: the side in pixels that
                evaluation resizes a square image to before a centre crop; None for another evaluation.
        """
        lines, largest = [self.note()], max(max(size) for size in shown)
        if self.side < largest:
            lines.append(f"cache_side {self.side} is less than the {largest} pixels shown: images are enlarged from it")
        if evaluated is None or self.side != math.floor(evaluated):
            lines.append(
                f"evaluation resizes a second time, from the cached {self.side} pixels: scores are near, but not "
                f"equal to those of files"
            )
        return lines

    @property
    def crop_filter(self) -> str:
        """Library and filter that resize training crops on this machine."""
        return filter_name(self.interpolation)

    def _stat(self, name: bytes) -> tuple[int, int]:
        opener, own = self.opened(name)
        path = opener.path(own)
        try:
            found = os.stat(path)
        except OSError as error:
            raise FileNotFoundError(f"cannot read picture {path}: {error.strerror}") from None
        return found.st_size, found.st_mtime_ns


class Resized(Dataset):
    """Row of a cache -> image (H, W, 3) uint8, its shorter side at most the cache's, by the filter of timm's
    evaluation; (height, width) of the original."""

    def __init__(self, cache: ImageCache) -> None:
        self.openers, self.opened, self.names = cache.openers, cache.opened, cache.names
        self.side, self.resize = cache.side, Resize(cache.side, InterpolationMode(cache.interpolation))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> tuple[np.ndarray, tuple[int, int]]:
        opener, name = self.opened(self.names[row])
        picture = opener(name)
        width, height = picture.size
        if min(width, height) > self.side:
            picture = self.resize(picture)
        return np.array(picture), (height, width)


def build(cache: ImageCache) -> None:
    """Make the cache, or go on with what a killed process has left; of several processes one builds and the others
    wait.

    Raises:
        PictureError: the first image that cannot be read, in one line.
        ValueError: the disk has no room for it, or the folder cannot be written.
    """
    try:
        with _alone(cache) as partial:
            if partial:
                _build(cache, partial)
    except PictureError as error:
        line = [line for line in str(error).splitlines() if "cannot read picture" in line][
            -1
        ]  # after a worker's own traceback
        raise PictureError(line[line.find("cannot read picture") :]) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(
                f"--cache_dir {cache.root} is full ({_free(cache)} free): what is done of the picture cache is kept, "
                f"and the same command goes on"
                f" when there is room; or delete {_partial(cache)}, and name another place"
            ) from None
        raise ValueError(f"--cache_dir {cache.root} cannot be written: {error.strerror or error}") from None


def forecast(cache: ImageCache) -> tuple[int, str]:
    """(bytes that the cache will take, estimated from some of its images; a phrase)."""
    rows = np.unique(np.linspace(0, len(cache.names) - 1, min(SAMPLE, len(cache.names))).astype(int))
    taken = []
    for name in cache.names[rows].tolist():
        opener, own = cache.opened(name)
        try:
            with Image.open(opener.path(own)) as picture:
                width, height = picture.size
        except Exception:  # noqa: S112  who builds will say so, with the name
            continue
        scale = min(1.0, cache.side / min(width, height))
        taken.append(3 * round(width * scale) * round(height * scale))
    total = round(np.mean(taken) * len(cache.names)) if taken else 0
    return total, f"to be built, about {_spelled(total)} ({_free(cache)} free)"


def _build(cache: ImageCache, partial: str) -> None:
    done = _resumed(partial)
    needed, phrase = forecast(cache)
    needed -= os.path.getsize(os.path.join(partial, PIXELS))
    if needed > shutil.disk_usage(partial).free:
        raise ValueError(
            f"--cache_dir {cache.root}: {len(cache.names):,} pictures with a shorter side of {cache.side} take about "
            f"{_spelled(needed)} more,"
            f" and {_free(cache)} are free: name another place, or a smaller --data_args.cache_side"
        )
    print(
        f"picture cache {cache.folder}: {len(cache.names):,} pictures, shorter side {cache.side} "
        f"({cache.interpolation}), {phrase}" + f", {done:,} done before" * bool(done),
        flush=True,
    )
    with open(os.path.join(partial, PIXELS), "ab") as pixels, open(os.path.join(partial, ROWS), "ab") as rows:
        _write(cache, pixels, rows, done)
    index = np.fromfile(os.path.join(partial, ROWS), np.int64).reshape(-1, 5)
    np.save(os.path.join(partial, INDEX), index)
    np.save(os.path.join(partial, NAMES), cache.names)
    opener, first = cache.opened(cache.names[0])
    about = {
        "format": FORMAT,
        "pictures": len(index),
        "side": cache.side,
        "interpolation": cache.interpolation,
        "pillow": PIL.__version__,
        "bytes": os.path.getsize(os.path.join(partial, PIXELS)),
        "first": os.path.abspath(opener.path(first)),
    }
    with open(os.path.join(partial, ABOUT), "w", encoding="utf-8") as file:
        file.write(json.dumps(about, indent=1) + "\n")
    os.unlink(os.path.join(partial, ROWS))
    for name in (INDEX, NAMES, ABOUT, "."):
        descriptor = os.open(os.path.join(partial, name), os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    try:
        os.rename(partial, cache.folder)
    except OSError:
        if not cache.ready:  # else another process without locks was first
            raise


def _resumed(partial: str) -> int:
    """Cut what was half written when a process was killed. Returns the number of whole images."""
    pixels, rows = (os.path.join(partial, name) for name in (PIXELS, ROWS))
    for file in (pixels, rows):
        open(file, "ab").close()
    index = np.fromfile(rows, np.int64)
    index = index[: len(index) // 5 * 5].reshape(-1, 5)
    ends = index[:, 0] + index[:, 1] * index[:, 2] * 3
    done = int(np.searchsorted(ends, os.path.getsize(pixels), side="right"))
    os.truncate(pixels, int(ends[done - 1]) if done else 0)
    os.truncate(rows, done * 40)
    return done


def _write(cache: ImageCache, pixels: BinaryIO, rows: BinaryIO, done: int) -> None:
    """Append the images from number `done` on. A row is written only when its pixels are on disk."""
    workers = cores() if cache.workers is None else cache.workers
    loader = DataLoader(
        Resized(cache),
        batch_size=BATCH,
        sampler=range(done, len(cache.names)),
        num_workers=workers,
        collate_fn=_joined,
        worker_init_fn=ignore_terminal_signals,
        generator=torch.Generator(),
    )
    pending: list[list[int]] = []
    position = synced = pixels.tell()

    def commit() -> None:
        pixels.flush()
        os.fsync(pixels.fileno())
        rows.write(np.array(pending, np.int64).tobytes())
        rows.flush()
        os.fsync(rows.fileno())
        pending.clear()

    bar = tqdm(
        total=len(cache.names), initial=done, unit="picture", mininterval=0.1 if sys.stderr.isatty() else 30, delay=1
    )
    with bar:
        for content, sizes in loader:
            pixels.write(content.numpy())
            for height, width, *whole in sizes.tolist():
                pending.append([position, height, width, *whole])
                position += height * width * 3
            if position - synced >= COMMIT_BYTES:
                commit()
                synced = position
            bar.update(len(sizes))
        commit()


def _joined(samples: list[tuple[np.ndarray, tuple[int, int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """All pixels in a row, and (B, 4): height, width, those of the original."""
    sizes = [[*pixels.shape[:2], *whole] for pixels, whole in samples]
    return torch.from_numpy(np.concatenate([pixels.ravel() for pixels, _ in samples])), torch.tensor(sizes)


@contextmanager
def _alone(cache: ImageCache) -> Iterator[str | None]:
    """The folder to build in, for this process alone; None when another one has finished the cache meanwhile."""
    partial = _partial(cache)
    with _lock_file(partial) as lock:
        try:
            _wait_for(lock, cache)
        except OSError:  # a file system without locks: everyone builds his own, the first one's stays
            partial = f"{partial}-{socket.gethostname()}-{os.getpid()}"
            os.makedirs(partial)
        if not cache.ready:
            yield partial
        else:
            yield None
        if cache.ready:
            shutil.rmtree(partial, ignore_errors=True)  # what came too late
            with_lock = os.path.join(cache.folder, LOCK)
            if os.path.exists(with_lock):
                os.unlink(with_lock)


def _lock_file(partial: str) -> BinaryIO:
    while True:
        os.makedirs(partial, exist_ok=True)
        try:
            return open(os.path.join(partial, LOCK), "ab")
        except FileNotFoundError:  # finished and renamed in between
            continue


def _wait_for(lock: BinaryIO, cache: ImageCache) -> None:
    printed = False
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not printed:
                print(f"picture cache {cache.folder}: another process is building it; waiting", flush=True)
            printed = True
            time.sleep(WAIT_SECONDS)


def _partial(cache: ImageCache) -> str:
    return os.path.join(cache.root, f".{os.path.basename(cache.folder)}.partial")


def _free(cache: ImageCache) -> str:
    """Free on the disk of the cache, or of the nearest folder that is there already."""
    place = os.path.abspath(cache.root)
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    return _spelled(shutil.disk_usage(place).free)


def _spelled(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
