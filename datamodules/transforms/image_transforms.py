"""timm's transforms up to uint8; normalisation follows on the device (`PictureData.on_after_batch_transfer`), as in
timm's prefetcher."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize as timm_posterize
from torchvision import transforms as tv
from torchvision.transforms import InterpolationMode

from datamodules.transforms.array_transforms import TrainTransform
from datamodules.transforms.augment import Augment

Transform = Callable[[Image.Image], torch.Tensor]  # RGB image -> (3, H, W) uint8
PLAIN = Augment()


def train_transform(
    size: tuple[int, int],
    *,
    interpolation: str,
    mean: tuple[float, ...],
    crop_scale: tuple[float, float],
    hflip: float,
    rand_augment: str | None = None,
    augment: Augment = PLAIN,
) -> TrainTransform:
    """timm's: random resized crop of `crop_scale` of the area, flips, then policy or colour jitter; draws from
    `random`, numpy and torch's CPU generator.
    """
    words = dict(interpolation=interpolation, mean=mean, scale=crop_scale, hflip=hflip)
    return TrainTransform(size, interpolation, *_parts(size, rand_augment, augment, **words))


def eval_transform(
    size: tuple[int, int], *, interpolation: str, mean: tuple[float, ...], crop_pct: float, crop_mode: str = "center"
) -> Transform:
    """timm's evaluation transform: resize by 1 / crop_pct, then centre crop; `crop_mode` center, squash or border."""
    return create_transform(
        (3, *size), interpolation=interpolation, mean=mean, crop_pct=crop_pct, crop_mode=crop_mode, use_prefetcher=True
    )


def shift_transform(
    size: tuple[int, int],
    *,
    interpolation: str,
    shift: float,
    mean: tuple[float, ...],
    rand_augment: str | None = None,
    augment: Augment = PLAIN,
) -> Transform:
    """Resize, then move by up to `shift` (a fraction of height and width) each way, black where nothing is left; then
    policy or colour jitter."""
    height, width = size
    _, colours, to_tensor = _parts(size, rand_augment, augment, interpolation=interpolation, mean=mean)
    move = tv.RandomCrop(size, padding=(round(width * shift), round(height * shift)))
    return tv.Compose([tv.Resize(size, InterpolationMode(interpolation)), move, *colours, *to_tensor])


def _parts(size: tuple[int, int], rand_augment: str | None, augment: Augment, **words: Any) -> list[list[Callable]]:
    """timm's training transform as crop and flips, colours, conversion to a tensor."""
    parts = create_transform(
        (3, *size),
        is_training=True,
        ratio=augment.crop_ratio,
        vflip=augment.vflip,
        **words,
        color_jitter=augment.color_jitter,  # type: ignore[arg-type]  # timm takes None too
        auto_augment=rand_augment or augment.auto_augment,
        use_prefetcher=True,
        separate=True,
    )
    found = [part.transforms for part in parts]
    for policy in found[1]:
        for op in [*getattr(policy, "ops", ()), *chain(*getattr(policy, "policy", ()))]:
            if op.name.startswith("Posterize"):
                op.aug_fn = posterize
    return found


def posterize(picture: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's, with black at 0 bits, which it asks for at magnitude 10: so Pillow had it for the published runs, but
    Pillow 13 raises."""
    return timm_posterize(picture, bits) if bits > 0 else Image.new(picture.mode, picture.size)
