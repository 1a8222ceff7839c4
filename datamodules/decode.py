"""A picture file -> an RGB PIL picture, or an error that names the file."""

import os

import numpy as np
from PIL import Image, UnidentifiedImageError


class PictureError(RuntimeError):
    """A picture that cannot be read: the message names file and cause. Takes one string, so a DataLoader worker can raise it again."""


def open_picture(path: str) -> Image.Image:
    """Decode the file to RGB, 8 bits a channel. The EXIF orientation is not applied, as in timm and torchvision.

    16-bit greys are scaled (Pillow alone clips them to white); transparency is composited on white.

    Raises:
        PictureError: missing, empty, truncated, not a picture, or anything else Pillow refuses; names the file and the cause.
    """
    try:
        with Image.open(path) as picture:
            return to_rgb(picture)
    except Exception as error:
        raise PictureError(f"cannot read picture {path}: {_cause(path, error)}") from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any mode -> RGB; see `open_picture`. Raises ValueError for floating-point pixels: nothing says which value is white."""
    if picture.mode.startswith("F"):
        raise ValueError("floating-point pixels have no known white; save it with 8 or 16 bits")
    if picture.mode.startswith("I"):
        pixels = np.asarray(picture).astype(np.int64)
        if picture.mode != "I" or pixels.max() > 255:
            pixels = pixels // 257  # 65535 -> 255
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _cause(path: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, UnidentifiedImageError):
        return "the file is empty" if os.path.getsize(path) == 0 else "it is not a picture Pillow knows"
    return f"{type(error).__name__}: {error}"
