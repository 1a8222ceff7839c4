"""Augmentation by a user's function: `my.py:build` takes (height, width) and returns a transform of training images.

The view is a PIL image or a (3, height, width) uint8 tensor. What it draws from `random`, numpy's and torch's global
generators is the same after a resume and on any number of processes; other generators are not seeded.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from datamodules.loading.files import sha256_of


class UserTransform:
    """RGB image -> (3, H, W) uint8 by what `build((H, W))` gives.

    Raises:
        ValueError: no such file or function, or it gives something else on a first grey image; names the flag.
    """

    def __init__(self, where: str, size: tuple[int, int]) -> None:
        self.where, self.size = where, tuple(size)
        try:
            self.view = _function(where)(self.size)
            self(Image.fromarray(np.full((2 * size[0], 2 * size[1], 3), 128, np.uint8)))
        except ValueError as error:
            raise ValueError(
                str(error)
                if str(error).startswith("--augment_args.function")
                else f"--augment_args.function {where}: {error}"
            ) from error
        except Exception as error:
            raise ValueError(
                f"--augment_args.function {where} does not work on a grey picture: {type(error).__name__}: {error}"
            ) from error

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        image: Any = self.view(picture)
        if isinstance(image, Image.Image):
            image = pil_to_tensor(image.convert("RGB"))
        if not isinstance(image, torch.Tensor) or image.dtype != torch.uint8 or tuple(image.shape) != (3, *self.size):
            found = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, torch.Tensor) else type(image).__name__
            raise ValueError(
                f"--augment_args.function {self.where} must give a PIL picture or a uint8 tensor of "
                f"(3, {self.size[0]}, {self.size[1]}), not {found}"
            )
        return image


def digest(where: str) -> str:
    """Digest of the file's content: a run does not resume with another one."""
    return sha256_of(where.rpartition(":")[0])[:12]


def _function(where: str) -> Callable[..., Any]:
    file, _, name = where.rpartition(":")
    if not file.endswith(".py") or not Path(file).is_file():
        raise ValueError(
            f"--augment_args.function {where}: give my.py:build; there is no file {file or where!r} "
            f"(looked in {Path.cwd()})"
        )
    place: Any = importlib.util.spec_from_file_location(f"vitlab_augment_{Path(file).stem}", file)
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"--augment_args.function {where}: {file} has no function {name!r}")
    return getattr(module, name)
