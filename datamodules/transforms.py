"""timm's transforms up to uint8; normalisation follows on the device (`PictureData.on_after_batch_transfer`), as in timm's prefetcher."""

from collections.abc import Callable

import torch
from PIL import Image
from timm.data import create_transform
from torchvision import transforms as tv
from torchvision.transforms import InterpolationMode

from datamodules.augment import Augment

Transform = Callable[[Image.Image], torch.Tensor]  # RGB picture -> (3, H, W) uint8
PLAIN = Augment()


def train_transform(
    size: tuple[int, int],
    *,
    interpolation: str,
    mean: tuple[float, ...],
    crop_scale: tuple[float, float] = (0.08, 1.0),
    hflip: float = 0.5,
    rand_augment: str | None = None,
    augment: Augment = PLAIN,
    separate: bool = False,
) -> Transform:
    """timm's: random resized crop of `crop_scale` of the area, flips, then policy or colour jitter; draws from `random`, numpy and torch's
    CPU generator. `separate`: the three parts (crop and flips, colours, to tensor) as a tuple.
    """
    return create_transform(
        (3, *size),
        is_training=True,
        scale=crop_scale,
        ratio=augment.crop_ratio,
        hflip=hflip,
        vflip=augment.vflip,
        color_jitter=augment.color_jitter,
        auto_augment=rand_augment or augment.auto_augment,
        interpolation=interpolation,
        mean=mean,
        use_prefetcher=True,
        separate=separate,
    )


def eval_transform(
    size: tuple[int, int], *, interpolation: str, mean: tuple[float, ...], crop_pct: float, crop_mode: str = "center"
) -> Transform:
    """timm's evaluation transform: resize by 1 / crop_pct, then centre crop; `crop_mode` center, squash or border."""
    return create_transform(
        (3, *size), interpolation=interpolation, mean=mean, crop_pct=crop_pct, crop_mode=crop_mode, use_prefetcher=True
    )


def shift_transform(
    size: tuple[int, int], *, interpolation: str, shift: float, mean: tuple[float, ...], rand_augment: str | None = None, augment: Augment = PLAIN
) -> Transform:
    """Resize, then move by up to `shift` (a fraction of height and width) each way, black where nothing is left; then policy or colour jitter."""
    height, width = size
    _, colours, _ = train_transform(size, interpolation=interpolation, mean=mean, rand_augment=rand_augment, augment=augment, separate=True)
    return tv.Compose(
        [
            tv.Resize(size, InterpolationMode(interpolation)),
            tv.RandomCrop(size, padding=(round(width * shift), round(height * shift))),
            *colours.transforms,
            tv.PILToTensor(),
        ]
    )
