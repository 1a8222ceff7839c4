"""Attention maps of every block of a vision transformer, and their rollout over the blocks. Pure torch.

Legend: B images, H heads, N tokens, K width of a head, P patches.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import set_fused_attn, use_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from models.layers import grid_of


def attention_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The softmax of every block, (B, H, N, N) each, first block first: how much the token of a row takes from that of
    a column.

    Seen where PyTorch's fused kernel is called, so that scale, mask and positions of the network's own are in it. The
    network is copied and run in evaluation mode; itself it stays as it is.

    Args:
        model: ours, or timm's with attention between all patches. images: (B, 3, height, width), normalised.
    Raises ValueError for a network without such attention: windows, reduced keys, convolutions.
    """
    network: Any = copy.deepcopy(getattr(model, "_orig_mod", model)).eval()  # compiled: the network inside
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    if hasattr(network, "set_grad_checkpointing"):
        network.set_grad_checkpointing(False)
    rows, columns = grid(network, _size(images))
    with torch.inference_mode(), _fused_everywhere(), _Watch() as watch:
        network.forward_features(images)
    maps, count = watch.maps, watch.maps[0].shape[-1] if watch.maps else 0
    fit = all((len(each), *each.shape[-2:]) == (len(images), count, count) for each in maps)
    if not maps or not fit or count < rows * columns or len(maps) != len(getattr(network, "blocks", maps)):
        raise _none(model)
    return maps


def rollout(maps: list[Tensor]) -> Tensor:
    """(B, N, N) how much each token of the last block holds of each token of the first, from maps (B, H, N, N) of all
    blocks in order.

    Abnar & Zuidema 2020 (arXiv 2005.00928): the mean over heads, half of it and half the identity for the path around
    it, rows summing to 1, multiplied from the first block to the last.
    """
    total = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=maps[0].device)
    for each in maps:
        mixed = 0.5 * each.mean(1) + 0.5 * torch.eye(each.shape[-1], dtype=each.dtype, device=each.device)
        total = mixed / mixed.sum(-1, keepdim=True) @ total
    return total


def on_grid(model: nn.Module, attention: Tensor, image_size: tuple[int, int]) -> Tensor:
    """(B, rows, columns) what the network's answer takes from each patch, from (B, N, N): the row of the class token,
    or the mean over the patches where the network has none or reads their mean. Prefix tokens and registers are cut
    off."""
    rows, columns = grid(model, image_size)
    first = getattr(model, "num_prefix_tokens", 0)
    patches = slice(first, first + rows * columns)
    asked = attention[:, :1] if asks_class_token(model) else attention[:, patches]
    return asked.mean(1)[:, patches].unflatten(1, (rows, columns))


def asks_class_token(model: nn.Module) -> bool:
    """Whether the answer is read from the class token, not from the mean of the patches."""
    pool = getattr(model, "global_pool", getattr(model, "pool", "token"))  # timm's word, and ours
    return getattr(model, "num_prefix_tokens", 0) > 0 and pool in ("token", "cls")


def grid(model: nn.Module, image_size: tuple[int, int]) -> tuple[int, int]:
    """Patches down and across an image of (height, width). Raises ValueError for a network without patches on one
    grid."""
    embed = getattr(model, "patch_embed", None)
    if embed is not None and hasattr(embed, "dynamic_feat_size"):
        return tuple(embed.dynamic_feat_size(image_size))
    if (
        embed is None
        or not hasattr(getattr(embed, "proj", None), "kernel_size")
        or not hasattr(model, "forward_features")
    ):
        raise _none(model)
    return grid_of(image_size, embed.proj.kernel_size)


def _size(images: Tensor) -> tuple[int, int]:
    height, width = images.shape[-2:]
    return height, width


def check(model: nn.Module, image_size: tuple[int, int]) -> None:
    """Raises ValueError for a network whose maps there are none of; one on the meta device is enough."""
    device = next(model.parameters()).device
    attention_maps(model, torch.zeros(1, 3, *image_size, device=device))


def _none(model: nn.Module) -> ValueError:
    return ValueError(
        f"{type(model).__name__} has no attention between all patches (windows, reduced keys and convolutions see a "
        f"part of them): "
        "there are no attention maps"
    )


class _Watch(TorchFunctionMode):
    """Keeps the weights of every call of the fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.maps.append(weights(*args, **kwargs))
        return func(*args, **kwargs)


def weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q k' scale + mask) in float32 at least, of the arguments of F.scaled_dot_product_attention; dropout is
    left out."""
    kind = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(kind), key.to(kind)
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1)


@contextmanager
def _fused_everywhere() -> Iterator[None]:
    """The kernel on every device, where `layers.attend` would write it out; afterwards as before."""
    before = {"enable": use_fused_attn(), "experimental": use_fused_attn(experimental=True)}
    set_fused_attn(True, experimental=True)
    try:
        yield
    finally:
        set_fused_attn(**before)
