"""Size of training crops, epoch by epoch."""

import re

MULTIPLE = 32


def training_sizes(train_size: str | int | None, image_size: tuple[int, int], epochs: int) -> list[tuple[int, int]]:
    """(height, width) of each epoch's training crops; the last holds for all later epochs, a single one for all.

    A number is the length of the shorter side, the other keeps the proportion of `image_size`. "128-224" rises linearly
    from the first to the last of `epochs`. Between the ends, and where the proportion is no whole number, sides are
    multiples of 32.

    Raises:
        ValueError: `train_size` is no such text.
    """
    if train_size is None:
        return [image_size]
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", str(train_size))
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 0 < low <= high:
        raise ValueError(
            f"--augment_args.train_size {train_size}: a side in pixels such as 160, or a rising range such as 128-224"
        )
    if low == high:
        return [_scaled(low, image_size)]
    sides = [low + (high - low) * epoch / (epochs - 1) for epoch in range(epochs - 1)] + [high]
    return [
        _scaled(int(side) if side in (low, high) else min(high, max(low, _round(side))), image_size) for side in sides
    ]


def _scaled(side: int, image_size: tuple[int, int]) -> tuple[int, int]:
    short = min(image_size)
    height, width = (
        side * each // short if side * each % short == 0 else _round(side * each / short) for each in image_size
    )
    return height, width


def _round(pixels: float) -> int:
    return max(1, int(pixels / MULTIPLE + 0.5)) * MULTIPLE
