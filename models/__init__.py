"""The model room: networks by name.

`create(name)` builds one, `names()` lists our own, `preprocessing(name)` describes the images it wants, `load(path)`
brings one back from a checkpoint. A new model is one new file here that calls `register`; any timm backbone is
`timm/<name>`.
"""

import importlib
import logging
import pkgutil
from typing import Any

from torch import nn

from models.registry import REGISTRY, Size, build, check_name, closest, keywords, names, preprocessing, register

for _module in pkgutil.iter_modules(__path__):  # each registers its models, in the order of the files
    importlib.import_module(f"{__name__}.{_module.name}")
from models.pretrained import initialise, load  # noqa: E402

__all__ = ["REGISTRY", "check_name", "closest", "create", "keywords", "load", "names", "preprocessing", "register"]


def create(
    name: str,
    num_outputs: int = 1000,
    image_size: Size | None = None,
    in_chans: int = 3,
    columns: int = 0,
    init: str | None = None,
    **model_args: Any,
) -> nn.Module:
    """Build a network, with fresh weights or those of `init`.

    Args:
        name: one of `names()`, or `timm/<name>` for any timm backbone.
        num_outputs: width of the head; 0 leaves it out, the network then returns pooled features (B, D).
        image_size: side or (height, width) in pixels; None is the variant's own.
        in_chans: colour channels of the image.
        columns: number of table columns that the network takes beside the image (models/heads.py).
        init: `pretrained`, a file, a run directory or a tag of timm's, as `--init`; a head of another size starts
            fresh. What was loaded is logged.
        model_args: the constructor's keywords, as `--model_args.drop_path 0.2`; for timm in timm's words or in ours.
            `dist_head` true adds a second head that learns from a teacher, `head_hidden` 128 a hidden layer before the
            outputs, with `head_dropout` behind it (models/heads.py).
    Raises ValueError for an unknown name (with the closest ones), an unknown keyword, an image size the network cannot
    take, or weights of another network; FileNotFoundError for a path of `init` that does not exist.
    """
    model: Any = build(name, num_outputs, image_size, in_chans, columns, **model_args)
    model.created_as = {"model": name, "model_args": dict(model_args)}  # from which a checkpoint rebuilds it
    if init is not None:
        logging.getLogger(__name__).info(initialise(model, str(init), name=name, reset_head=True))
    return model
