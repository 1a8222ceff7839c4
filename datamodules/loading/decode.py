"""An image file -> an RGB PIL image, or an error that names the file."""

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

with suppress(ImportError):  # iPhones' images, where it is installed
    import pillow_heif

    pillow_heif.register_heif_opener()

NO_PICTURES = (
    "BUFR",
    "EPS",
    "GRIB",
    "HDF5",
    "MPEG",
    "PALM",
    "PDF",
    "WMF",
)  # formats that Pillow only writes, or reads with other programs
USUAL = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
SUFFIXES = (
    *USUAL,
    *sorted(
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind not in NO_PICTURES and suffix not in USUAL
    ),
)
MAX_PIXELS = 178_956_970  # Pillow's own limit


TOO_LARGE = "--data_args.max_pixels allows more (predict.py: --max_pixels)"


class PictureError(RuntimeError):
    """An image that cannot be read: the message names file and cause. Takes one string, so a DataLoader worker can
    raise it again."""


@dataclass(frozen=True)
class Decoding:
    """Settings of reading image files.

    Args:
        max_pixels: of the largest image that is decoded; a small file may be a huge one.
        white: the value that is white in pixels of more than 8 bits; None: 65535, and none is known for floating point.
    """

    max_pixels: int = MAX_PIXELS
    white: float | None = None

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise ValueError(f"--data_args.max_pixels {self.max_pixels}: at least 1")
        if self.white is not None and not self.white > 0:
            raise ValueError(f"--data_args.white {self.white}: a value above 0, as 65535 or 1.0")


USUALLY = Decoding()


def opened(file: str | BinaryIO, how: Decoding) -> Image.Image:
    """`Image.open`, which decodes nothing yet, with the limit of `how`. Raises whatever Pillow does, ValueError for a
    image that is too large."""
    if how.max_pixels > MAX_PIXELS:
        Image.MAX_IMAGE_PIXELS = None  # of the process: Pillow has no other way
    try:
        picture = Image.open(file)
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{str(error).split(' exceeds')[0]} is above the limit of {how.max_pixels:,}: {TOO_LARGE}"
        ) from None
    if picture.width * picture.height > how.max_pixels:
        picture.close()
        raise ValueError(
            f"{picture.width} x {picture.height} pixels are above the limit of {how.max_pixels:,}: {TOO_LARGE}"
        )
    return picture


def open_picture(path: str, how: Decoding = USUALLY) -> Image.Image:
    """Decode the file to RGB, 8 bits a channel. The EXIF orientation is not applied, as in timm and torchvision.

    Pixels of more than 8 bits are scaled (Pillow alone clips them to white); transparency is composited on white.

    Raises:
        PictureError: missing, empty, truncated, too large, not an image, or anything else Pillow refuses; names the
            file and the cause.
    """
    try:
        with opened(path, how) as picture:
            return to_rgb(picture, how.white)
    except Exception as error:
        raise PictureError(f"cannot read picture {path}: {_cause(path, error)}") from error


def to_rgb(picture: Image.Image, white: float | None = None) -> Image.Image:
    """Any mode -> RGB; see `open_picture`.

    All images of a mode have one scale, whatever their own range: I;16 and I (16 bits, and 32 bits of a TIFF) 0 to
    65535, or to `white`; F 0 to `white`. What lies outside is clipped.

    Raises:
        ValueError: floating-point pixels without `white`.
    """
    if picture.mode.startswith(("F", "I")):
        if white is None and picture.mode.startswith("F"):
            raise ValueError(
                "floating-point pixels have no known white; --data_args.white 1.0 says it, or save it with 8 or 16 bits"
            )
        pixels = np.asarray(picture)
        pixels = (
            pixels.astype(np.int64) // 257 if white is None else pixels.astype(np.float64) * (255 / white)
        )  # 65535 -> 255
        picture = Image.fromarray(np.nan_to_num(pixels).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _cause(path: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, UnidentifiedImageError):
        return "the file is empty" if os.path.getsize(path) == 0 else "it is not a picture Pillow knows"
    return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
