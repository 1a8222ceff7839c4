"""Layers of a network for layer-wise learning rates, counted from the input: published groupings of ConvNeXt and Swin,
timm's for the rest."""

import re
from typing import Any

from timm import models as timm_models
from timm.models import group_parameters
from torch import nn

from models.convnext import ConvNeXt
from models.swin import Swin

PLAIN_DEPTH = 12  # blocks of the networks that the factors of BEiT and MAE, such as 0.75, were published for


def layer_ids(model: nn.Module) -> dict[str, int]:
    """Layer of every parameter, by name: 0 is the stem, the largest number the head's.

    ConvNeXt (ours and timm's) counts as facebookresearch/ConvNeXt optim_factory.py:32-60, Swin (ours and timm's, V1 and
    V2) as microsoft/Swin-Transformer optimizer.py:118-131, every other network as timm's `group_matcher`, a layer a
    block.
    """
    names = [name for name, _ in model.named_parameters()]
    if isinstance(model, ConvNeXt | timm_models.ConvNeXt):
        return {name: convnext_layer(name) for name in names}
    network: Any = model
    if isinstance(model, Swin | timm_models.SwinTransformer | timm_models.SwinTransformerV2):
        depths = [len(stage.blocks) for stage in network.layers]
        return {name: swin_layer(name, depths) for name in names}
    return group_parameters(model, network.group_matcher(coarse=False), reverse=True)


def convnext_layer(name: str) -> int:
    """Layer of a parameter of ConvNeXt by its name in timm, 0 to 13: three blocks of the third stage are one layer, any
    other stage is one.

    The authors count all depths so; ConvNeXt-T, whose third stage has 9 blocks, has no layers 6 to 11.
    """
    if name.startswith("stem."):
        return 0
    if not (place := re.match(r"stages\.(\d)\.(?:blocks\.(\d+)|downsample)", name)):
        return 13  # the norm and the head
    stage, block = int(place[1]), int(place[2] or 0)
    return (1, 2, 3 + block // 3, 12)[stage]


def swin_layer(name: str, depths: list[int]) -> int:
    """Layer of a parameter of Swin by its name in timm: a block each; merging belongs to the last block before it, the
    norm to the head."""
    if name.startswith("patch_embed."):
        return 0
    if not (place := re.match(r"layers\.(\d+)\.(?:blocks\.(\d+)|downsample)", name)):
        return sum(depths) + 1
    before = sum(depths[: int(place[1])])
    return before if place[2] is None else before + int(place[2]) + 1


def for_depth(factor: float, model: nn.Module) -> tuple[float, int]:
    """The factor that gives the stem of a deeper network the rate that `factor` gives the stem of one of 12 blocks, and
    its layers between stem and head. A network of 12 or fewer keeps `factor`."""
    last = max(layer_ids(model).values())
    return factor ** min(1.0, (PLAIN_DEPTH + 1) / last), last - 1
