"""Reads an image cache: images decoded and resized once, in a memory-mapped file that workers, ranks, folds and runs
share.

A cache is a folder `<cache_dir>/pictures-<side>-<filter>-<key>/`; N images of all splits, each once, sorted by name:
    pixels.bin  uint8, one image (H, W, 3) after the other
    index.npy   (N, 5) int64: first byte, height, width, and height and width of the original
    names.npy   (N,) bytes
    about.json  a description to read
The key is of names, sizes and times of the files and of the settings, so changed files get another cache; nothing is
ever changed in place.
"""

import errno
import os
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

FORMAT = 1
PIXELS, INDEX, NAMES, ABOUT = "pixels.bin", "index.npy", "names.npy", "about.json"


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
        """Image (H, W, 3) uint8, a view of the file, and (height, width) of the original."""
        pixels, index, names = self.maps
        row = int(names.searchsorted(name))
        if row == len(names) or names[row] != name:
            raise KeyError(f"{name!r} is not in the picture cache {self.folder}")
        first, height, width, *whole = index[row].tolist()
        return pixels[first : first + height * width * 3].reshape(height, width, 3), tuple(whole)


@dataclass(frozen=True)
class CachedFiles:
    """Opens a name as `folder.Files` does, out of the cache: an RGB image with the cache's size; `pixels` is without
    a copy."""

    store: Store
    prefix: bytes

    def __call__(self, name: bytes) -> Image.Image:
        return Image.fromarray(self.pixels(name)[0])

    def pixels(self, name: bytes) -> tuple[np.ndarray, tuple[int, int]]:
        """`Store.pixels`."""
        return self.store.pixels(self.prefix + name)
