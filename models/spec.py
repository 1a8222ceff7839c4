"""The two dictionaries that every room exchanges: the specification of the data (`Spec`) and a batch (`Batch`).

Both stay plain dictionaries at run time: a specification is saved in checkpoints and loads with weights_only=True.
Legend: B images of a batch, C channels, H x W pixels, T targets of a regression, K classes or labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import NotRequired, TypedDict

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class Columns(TypedDict):
    """Table columns that are inputs beside the image: names, and mean and standard deviation of the training rows."""

    names: list[str]
    mean: list[float]
    std: list[float]


class Spec(TypedDict):
    """Specification of the data, as far as a network needs it; plain values only."""

    task: str  # classification | multilabel | regression
    num_outputs: int  # width of the network's head
    class_names: list[str] | None  # K names in index order; None for a regression
    target_names: list[str] | None  # T names of a regression
    target_range: list[list[float]] | None  # T pairs [low, high] in the targets' own units
    encoding: str | None  # how outputs give the targets of a regression (lightning_modules/objectives/targets.py)
    image_size: list[int]  # [height, width] in pixels
    mean: list[float]  # of RGB in 0-1
    std: list[float]  # of RGB in 0-1
    interpolation: str  # timm's word: bicubic, bilinear, ...
    crop_pct: float  # side of the centre crop / side that evaluation resizes to
    crop_mode: str  # center | squash | border
    id_column: str | None  # of a table
    table: NotRequired[dict[str, Any]]  # what the columns of a table mean (datamodules/tables/scheme.py)
    columns: NotRequired[Columns]  # inputs beside the image


class Batch(TypedDict):
    """One batch; `valid` marks an evaluation batch."""

    image: Tensor  # (B, C, H, W): uint8 0-255 as loaded, float32 normalised on the device
    target: Tensor  # (B,) int64 classes | (B, K) float32 labels or mixed classes | (B, T) float64 in own units
    index: Tensor  # (B,) int64 row of the data set
    valid: NotRequired[Tensor]  # (B,) bool, False for padding, which weighs nothing
    columns: NotRequired[Tensor]  # (B, number of columns) float32, standardised
    aux: NotRequired[Tensor]  # (B, number of auxiliary targets) float32, 0 to 1
    copy: NotRequired[Tensor]  # (B,) int64 number of the copy with repeated augmentation
    erase: NotRequired[Tensor | np.ndarray]  # (B, count, 5) int64 boxes of random erasing
    mix: NotRequired[Any]  # key of the batch's mixing (datamodules/transforms/mixing.py)
