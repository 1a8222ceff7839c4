"""Values of a data module that cannot be used, in words for people."""

from typing import TYPE_CHECKING

from timm.data.transforms import str_to_interp_mode

from datamodules.ranges import broken
from datamodules.transforms.augment import check_policy
from datamodules.transforms.mixing import check_mixing

if TYPE_CHECKING:
    from datamodules.base import PictureData


def check_values(data: "PictureData") -> None:
    """Raises ValueError for the first value that breaks its rule."""
    try:
        str_to_interp_mode(data.interpolation)
    except KeyError:
        raise ValueError(
            f"interpolation {data.interpolation!r}: nearest, bilinear, bicubic, box, hamming or lanczos"
        ) from None
    if found := broken(data):
        raise ValueError("{} {!r}: {}".format(*found))
    if len(data.image_size) != 2 or min(data.image_size) <= 0:
        raise ValueError(f"image_size {data.image_size!r}: a positive number of pixels, or (height, width)")
    if data.crop_mode not in ("center", "squash", "border"):
        raise ValueError(f"crop_mode {data.crop_mode!r}: center, squash or border")
    if data.rand_augment is not None:
        check_policy(data.rand_augment, "--rand_augment", ["rand"])
        if data.augment.auto_augment is not None:
            raise ValueError("--rand_augment and --augment_args.auto_augment are two policies: give one")
    check_mixing(data.mixup, data.cutmix, data.augment)
