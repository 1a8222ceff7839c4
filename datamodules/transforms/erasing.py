"""Random erasing in two halves: a worker decides the boxes, the device fills them after normalisation, as timm does."""

import random

import torch
from timm.data.random_erasing import RandomErasing


class Boxes:
    """Draws boxes as timm's `RandomErasing` does, from `random`: image (C, H, W) -> (count, 5) int64 top, bottom, left,
    right, seed.

    Rows of zeros are no box; the seed is of the noise.
    """

    def __init__(self, probability: float, count: int) -> None:
        self.erasing, self.count = RandomErasing(probability, mode="const", max_count=count, device="cpu"), count

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        recorder = _Recorder(*image.shape[1:])
        self.erasing(recorder)
        rows = torch.zeros(self.count, 5, dtype=torch.int64)
        for row, box in enumerate(recorder.boxes):
            rows[row] = torch.tensor([*box, random.getrandbits(63)])
        return rows


class _Recorder:
    """Stands for an image; writes down where it is erased."""

    dtype = torch.float32

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.boxes: list[tuple[int, int, int, int]] = []

    def size(self) -> tuple[int, int, int]:
        return 1, self.height, self.width

    def __setitem__(self, where: tuple[slice, slice, slice], pixels: torch.Tensor) -> None:
        _, rows, columns = where
        self.boxes.append((rows.start, rows.stop, columns.start, columns.stop))


def fill(image: torch.Tensor, boxes: list[list[list[int]]], mode: str, generator: torch.Generator) -> None:
    """Erase in place. image (B, C, H, W) normalised; boxes: for each image rows as of `Boxes`, on the host, so the
    device is not waited for.

    `mode` pixel: N(0,1) for each value; rand: N(0,1) for each channel; const: 0. The noise depends on seed and kind of
    device only.
    """
    for number, rows in enumerate(boxes):
        for top, bottom, left, right, seed in rows:
            if not bottom:
                continue
            patch = image[number, :, top:bottom, left:right]
            generator.manual_seed(seed)
            if mode == "const":
                patch.zero_()
            else:
                shape = patch.shape if mode == "pixel" else (len(patch), 1, 1)
                patch.copy_(torch.randn(shape, generator=generator, device=image.device, dtype=image.dtype))
