"""Duplicate and near-duplicate images: perceptual hashes, their comparison in blocks, and the resulting groups."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

BITS = 256  # four hashes of 8x8
BLOCK = 2048  # rows compared at once with all others
MOST_PAIRS = 5_000_000
COSINES = np.cos(
    np.pi / 32 * (np.arange(32) + 0.5) * np.arange(8)[:, None]
)  # (8, 32), the first rows of the DCT-II of 32 numbers


def picture_hash(picture: Image.Image) -> np.ndarray:
    """Any image -> (256,) bool: 64 bits each of phash (DCT against its median), dhash across and down (grows to the
    next cell), and ahash (against the mean), as imagehash 4.3 defines them, of the grey image. Kaggle's notebooks
    compare such a concatenation at 0.9."""
    grey = picture.convert("L")

    def cells(width: int, height: int) -> np.ndarray:
        return np.asarray(grey.resize((width, height), Image.Resampling.LANCZOS), np.float64)

    waves = COSINES @ cells(32, 32) @ COSINES.T
    across, down, mean = cells(9, 8), cells(8, 9), cells(8, 8)
    parts = (waves > np.median(waves), across[:, 1:] > across[:, :-1], down[1:] > down[:-1], mean > mean.mean())
    return np.concatenate([part.ravel() for part in parts])


def hashes(
    names: Sequence[bytes], open_name: Callable[[bytes], Image.Image], threads: int
) -> Iterator[tuple[np.ndarray, np.ndarray] | None]:
    """The hash of each image and of its mirror image, in order; None for one that cannot be read (`PictureError`)."""
    from datamodules.loading.decode import PictureError

    def both(name: bytes) -> tuple[np.ndarray, np.ndarray] | None:
        try:
            picture = open_name(name)
        except PictureError:
            return None
        picture.thumbnail((128, 128), Image.Resampling.BOX)  # as good, and the four sizes are then cheap
        return picture_hash(picture), picture_hash(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))

    with ThreadPoolExecutor(threads) as pool:  # Pillow decodes outside of Python's lock
        yield from pool.map(both, names)


def alike(first: np.ndarray, second: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of rows of unit vectors (N, D) and (M, D) float32 whose product is at least `least`: (rows of first, rows
    of second, products), by a matrix product of blocks, exact for hashes (`units`). Raises ValueError when that is true
    of nearly all pairs."""
    found, count = [], 0
    for start in range(0, len(first), BLOCK):
        product = first[start : start + BLOCK] @ second.T
        one, other = np.nonzero(product >= least)
        count += len(one)
        if count > MOST_PAIRS + len(first):
            raise ValueError(f"more than {MOST_PAIRS:,} pairs of pictures are alike: a higher --threshold")
        found.append((one + start, other, product[one, other]))
    one, other, product = (np.concatenate(values) for values in zip(*found))
    return one, other, product


def units(bits: np.ndarray) -> np.ndarray:
    """(N, 256) bool -> (N, 256) float32 of length 1: the product of two is 1 - 2 x the share of bits that differ,
    without rounding."""
    return (bits.astype(np.float32) * 2 - 1) / np.float32(np.sqrt(bits.shape[1]))


def groups(count: int, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(count,) number of each row's group, where pairs, directly or through others, are together."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    return connected_components(coo_matrix((np.ones(len(one)), (one, other)), shape=(count, count)), directed=False)[1]
