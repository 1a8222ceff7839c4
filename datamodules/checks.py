"""Values of a data module that cannot be used, in words for people."""

from typing import TYPE_CHECKING

from timm.data.transforms import str_to_interp_mode

from datamodules.augment import check_policy
from datamodules.mixing import check_mixing

if TYPE_CHECKING:
    from datamodules.base import PictureData


def check_values(data: "PictureData") -> None:
    """Raises ValueError for the first value that breaks its rule."""
    try:
        str_to_interp_mode(data.interpolation)
    except KeyError:
        raise ValueError(f"interpolation {data.interpolation!r}: nearest, bilinear, bicubic, box, hamming or lanczos") from None
    low, high = data.crop_scale
    rules = {
        "image_size": (len(data.image_size) == 2 and min(data.image_size) > 0, "a positive number of pixels, or (height, width)"),
        "mean": (len(data.mean) == 3, "three numbers"),
        "std": (len(data.std) == 3 and min(data.std) > 0, "three positive numbers"),
        "crop_pct": (data.crop_pct > 0, "positive"),
        "crop_mode": (data.crop_mode in ("center", "squash", "border"), "center, squash or border"),
        "crop_scale": (0 < low <= high <= 1, "two areas, 0 < low <= high <= 1"),
        "hflip": (0 <= data.hflip <= 1, "a probability"),
        "val_fraction": (0 <= data.val_fraction < 1, "at least 0 and below 1"),
        "split_seed": (0 <= data.split_seed < 2**32, "0 to 2^32 - 1"),
        "seed": (data.seed >= 0, "at least 0"),
        "epochs": (data.epochs >= 1, "at least 1"),
        "global_batch_size": (data.global_batch_size >= 1, "at least 1"),
        "micro_batch_size": (data.micro_batch_size is None or data.micro_batch_size >= 1, "at least 1"),
        "workers": (data.workers is None or data.workers >= 0, "at least 0"),
        "cache_side": (data.cache_side is None or data.cache_side >= 1, "at least 1 pixel"),
        "random_erasing": (0 <= data.random_erasing <= 1, "a probability"),
        "repeated_augment": (data.repeated_augment >= 1, "copies of each picture, at least 1"),
        "mixup": (data.mixup >= 0, "a Beta parameter, at least 0"),
        "cutmix": (data.cutmix >= 0, "a Beta parameter, at least 0"),
        "label_smoothing": (0 <= data.label_smoothing < 1, "at least 0 and below 1"),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ValueError(f"{name} {getattr(data, name)!r}: {rule}")
    if data.rand_augment is not None:
        check_policy(data.rand_augment, "--rand_augment", ["rand"])
        if data.augment.auto_augment is not None:
            raise ValueError("--rand_augment and --augment_args.auto_augment are two policies: give one")
    check_mixing(data.mixup, data.cutmix, data.augment)
