"""scikit-learn's 1,797 handwritten digits (Alpaydin and Kaynak, UCI 1998), 8x8 greys, in memory: real data on any
machine."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from datamodules.base import PictureData
from datamodules.knobs import height_width
from datamodules.loading.images import Split, hold_out
from datamodules.transforms.image_transforms import Transform, shift_transform

TEST_FRACTION = 360 / 1797


@dataclass(frozen=True)
class Scans:
    """`pixels` (1797, 8, 8) uint8; a name is the row as text."""

    pixels: np.ndarray

    def __call__(self, name: bytes) -> Image.Image:
        return Image.fromarray(self.pixels[int(name)]).convert("RGB")


@dataclass(kw_only=True, eq=False, repr=False)
class DataModule(PictureData):
    """Fixed stratified split: 360 test, of the other 1,437 `val_fraction` by `split_seed`.

    Training shifts by up to one of the eight pixels. A digit is never flipped nor cropped, whatever `hflip`,
    `crop_scale`, `crop_pct` and `augment_args` (vflip, crop_ratio) say.
    """

    in_memory: ClassVar[bool] = True
    image_size: int | str | None = 32  # type: ignore[assignment]  # `__post_init__` makes a pair of it

    def read(self) -> tuple[list[str], dict[str, Split]]:
        self.crop_pct = 1.0
        if self.data_dir is not None:
            raise ValueError(
                "the digits come with scikit-learn: leave --data_dir out, or leave --data out to use the folder"
            )
        classes = [str(digit) for digit in range(10)]
        if self.class_names not in (None, classes):
            raise ValueError(f"digits has the classes 0 to 9, not {self.class_names}")
        data = load_digits()
        scans = Scans((data.images * (255 / 16)).round().astype(np.uint8))
        every = Split(np.array([b"%04d" % row for row in range(len(data.target))]), data.target.astype(np.int64), scans)
        train, test = hold_out(every, TEST_FRACTION, 0, classes)
        return classes, {**self.with_val(train, classes), "test": test}

    def train_transform(self, size: tuple[int, int] | None = None) -> Transform:
        return shift_transform(
            size or height_width(self.image_size or 32),
            interpolation=self.interpolation,
            shift=1 / 8,
            mean=self.mean,
            rand_augment=self.rand_augment,
            augment=self.augment,
        )
