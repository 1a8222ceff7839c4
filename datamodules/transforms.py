"""timm's transforms up to uint8; normalisation follows on the device (`PictureData.on_after_batch_transfer`), as in timm's prefetcher."""

from collections.abc import Callable

import torch
from PIL import Image
from timm.data import create_transform
from torchvision import transforms as tv
from torchvision.transforms import InterpolationMode

Transform = Callable[[Image.Image], torch.Tensor]  # RGB picture -> (3, H, W) uint8


def train_transform(
    size: tuple[int, int], *, interpolation: str, mean: tuple[float, ...], crop_scale: tuple[float, float], hflip: float
) -> Transform:
    """Random resized crop of `crop_scale` of the area, flipped with probability `hflip`; draws from `random` and torch's CPU generator."""
    return create_transform(
        (3, *size),
        is_training=True,
        scale=crop_scale,
        hflip=hflip,
        color_jitter=None,
        interpolation=interpolation,
        mean=mean,
        use_prefetcher=True,
    )


def eval_transform(
    size: tuple[int, int], *, interpolation: str, mean: tuple[float, ...], crop_pct: float, crop_mode: str = "center"
) -> Transform:
    """timm's evaluation transform: resize by 1 / crop_pct, then centre crop; `crop_mode` center, squash or border."""
    return create_transform(
        (3, *size), interpolation=interpolation, mean=mean, crop_pct=crop_pct, crop_mode=crop_mode, use_prefetcher=True
    )


def shift_transform(size: tuple[int, int], *, interpolation: str, shift: float) -> Transform:
    """Resize, then move by up to `shift` (a fraction of height and width) each way, black where nothing is left; torch's CPU generator."""
    height, width = size
    return tv.Compose(
        [
            tv.Resize(size, InterpolationMode(interpolation)),
            tv.RandomCrop(size, padding=(round(width * shift), round(height * shift))),
            tv.PILToTensor(),
        ]
    )
