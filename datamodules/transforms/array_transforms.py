"""Training views of cached images: timm's draws, the crop a view of the memory map, resized by the fastest filter
that is near PIL's.

Filters, for bilinear and bicubic (others are Pillow's):
    cv2    OpenCV where it is installed and the crop shrinks by at most SHRINK: two or four taps, no antialiasing. There
           it is nearer to Pillow's bicubic than Pillow's own bilinear is.
    torch  elsewhere: antialiased as in Pillow, equal to it but for rounding.
"""

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import str_to_pil_interp
from torchvision import transforms as tv

SHRINK = 1.25  # beyond it what is left out would alias
FAST = {"bilinear": torch.ops.aten._upsample_bilinear2d_aa.out, "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out}
POINT = torch.empty(1, 1, 1)


@lru_cache(maxsize=1)
def opencv() -> ModuleType | None:
    """cv2, single threaded (its threads do not survive a fork), or None."""
    try:
        import cv2
    except ImportError:
        return None
    cv2.setNumThreads(0)
    return cv2


def filter_name(interpolation: str) -> str:
    """Library and filter that resize crops on this machine, for notes and the checkpoint."""
    if interpolation not in FAST:
        return f"Pillow's {interpolation}"
    cv2 = opencv()
    return f"{f'OpenCV {cv2.__version__}' if cv2 else f'PyTorch {torch.__version__}'}'s {interpolation}"


class TrainTransform(tv.Compose):
    """timm's training transform in its three parts, of RGB images; `of_pixels` does the same to a cached image,
    drawing the same numbers.

    Args:
        crop: timm's `RandomResizedCropAndInterpolation`, then flips. colours: policy or colour jitter. to_tensor: PIL
            -> (3, H, W) uint8.
    """

    def __init__(
        self,
        size: tuple[int, int],
        interpolation: str,
        crop: list[Any],
        colours: list[Callable],
        to_tensor: list[Callable],
    ) -> None:
        super().__init__([*crop, *colours, *to_tensor])
        self.size, self.interpolation = size, interpolation
        self.crop, *self.flips = crop
        self.rest = [*colours, *to_tensor] if colours else []

    @property
    def plain(self) -> bool:
        """Crop and flips only: nothing draws from NumPy, and `of_pixels` can write into a batch."""
        return not self.rest

    def of_pixels(self, pixels: np.ndarray, whole: tuple[int, int], out: torch.Tensor | None = None) -> torch.Tensor:
        """(H, W, 3) uint8 and (height, width) of the original -> (3, h, w) uint8, channels last in memory. The box is
        drawn in the original and moved to the nearest pixels here. A plain one is written into `out`, of that kind, and
        returned."""
        top, left, height, width = self.crop.get_params(POINT.expand(1, *whole), self.crop.scale, self.crop.ratio)
        rows, columns = nearest(top, height, whole[0], pixels.shape[0]), nearest(left, width, whole[1], pixels.shape[1])
        axes = [1 if isinstance(flip, tv.RandomHorizontalFlip) else 0 for flip in self.flips if torch.rand(1) < flip.p]
        image = torch.empty(*self.size, 3, dtype=torch.uint8).permute(2, 0, 1) if out is None else out
        resize(pixels[rows, columns], self.interpolation, axes, image)
        if self.plain:
            return image
        picture: Any = Image.fromarray(image.permute(1, 2, 0).numpy())
        for transform in self.rest:
            picture = transform(picture)
        return picture


def nearest(start: int, length: int, whole: int, here: int) -> slice:
    """`length` from `start` of a side of `whole` pixels, where the side has `here`; at least one pixel."""
    first = min(round(start * here / whole), here - 1)
    return slice(first, max(first + 1, round((start + length) * here / whole)))


def resize(pixels: np.ndarray, interpolation: str, axes: list[int], out: torch.Tensor) -> None:
    """(H, W, 3) uint8, rows of a larger image or not, into out (3, h, w), channels last in memory, flipped along
    `axes` (0 height, 1 width)."""
    size, cv2 = (out.shape[1], out.shape[2]), opencv()
    pixels = np.array(
        pixels, order="C"
    )  # a copy: the kernels take twice as long on a part of an image, and torch wants it writable
    shrink = max(pixels.shape[0] / size[0], pixels.shape[1] / size[1])
    if cv2 and interpolation in FAST and shrink <= SHRINK:
        taps, into = cv2.INTER_LINEAR if interpolation == "bilinear" else cv2.INTER_CUBIC, out.permute(1, 2, 0).numpy()
        cv2.resize(pixels, size[::-1], dst=into, interpolation=taps)
        for axis in axes:
            cv2.flip(into, axis, dst=into)
        return
    if interpolation in FAST:
        batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (1, 3, H, W), channels last
        FAST[interpolation](batch, size, False, out=out[None])
    else:
        image = np.array(Image.fromarray(pixels).resize(size[::-1], str_to_pil_interp(interpolation)))
        out.copy_(torch.from_numpy(image).permute(2, 0, 1))
    if axes:
        out.copy_(out.flip([axis + 1 for axis in axes]))
