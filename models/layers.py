"""Leaves that several networks share. Attribute names are timm's, so that weights move without a key map.

Legend: B pictures, C channels, N tokens, D width, H heads, K width of a head.
"""
import math
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from timm.layers import DropPath, LayerScale
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F


def pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """(height, width) of a size given as one side or as both."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def grid_of(image_size: int | tuple[int, int], patch_size: int | tuple[int, int]) -> tuple[int, int]:
    """Patches down and across. Raises ValueError when the patch does not divide the picture."""
    (height, width), (down, across) = pair(image_size), pair(patch_size)
    if height % down or width % across:
        fit = f"{max(1, round(height / down)) * down}x{max(1, round(width / across)) * across}"
        raise ValueError(f"image size {height}x{width} is not a multiple of the patch size {down}x{across}; the nearest that fits is {fit}")
    return height // down, width // across


class PatchEmbed(nn.Module):
    """Cut a picture (B, C, height, width) of a fixed size into patches and project each: (B, N, D), row by row."""

    def __init__(self, image_size: int | tuple[int, int], patch_size: int, in_chans: int, dim: int):
        super().__init__()
        self.image_size, self.grid_size = pair(image_size), grid_of(image_size, patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) != self.image_size:
            raise ValueError(f"the network was built for pictures of {self.image_size[0]}x{self.image_size[1]} and got "
                             f"{x.shape[-2]}x{x.shape[-1]}; build it with that image_size")
        return rearrange(self.proj(x), "b d h w -> b (h w) d")


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, bias: Tensor | None = None) -> Tensor:
    """softmax(q k' / sqrt(K) + bias) v for (B, H, N, K); PyTorch's fused kernel, but written out on CPU, where that is faster."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, None if bias is None else bias.to(q.dtype), dropout_p=dropout)
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, N, N)
    if bias is not None:
        weights = weights + bias
    return F.dropout(weights.softmax(-1), dropout) @ v


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017), one fused projection ordered q, k, v; heads split inside each."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True, dropout: float = 0.0, attn_dropout: float = 0.0):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide embed_dim {dim}")
        self.num_heads, self.attn_dropout = num_heads, attn_dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D)
        q, k, v = rearrange(self.qkv(x), "b n (three h k) -> three b h n k", three=3, h=self.num_heads).unbind(0)
        y = attend(q, k, v, self.attn_dropout if self.training else 0.0)  # (B, H, N, K)
        return self.proj_drop(self.proj(rearrange(y, "b h n k -> b n (h k)")))


class Mlp(nn.Module):
    """Two linear layers around an activation: (..., D) -> (..., D)."""

    def __init__(self, dim: int, hidden: int, *, act: Callable[[], nn.Module] = nn.GELU, dropout: float = 0.0):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), act(), nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention, x + MLP, each with optional LayerScale and stochastic depth of its own."""

    def __init__(self, dim: int, num_heads: int, *, mlp_ratio: float = 4.0, qkv_bias: bool = True, dropout: float = 0.0,
                 attn_dropout: float = 0.0, drop_path: float = 0.0, layer_scale: float | None = None,
                 act: Callable[[], nn.Module] = nn.GELU):
        super().__init__()
        def scale() -> nn.Module:
            return nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, dropout=dropout, attn_dropout=attn_dropout)
        self.ls1, self.drop_path1 = scale(), DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act=act, dropout=dropout)
        self.ls2, self.drop_path2 = scale(), DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth's linear rule (Huang et al. 2016): 0 at the first block, `rate` at the last."""
    return [rate * i / max(1, depth - 1) for i in range(depth)]


def sincos2d(grid: tuple[int, int], dim: int, temperature: float = 10_000.0) -> Tensor:
    """Fixed 2-D positions (1, N, D) of "Better plain ViT baselines": sin x, cos x, sin y, cos y (big_vision models/vit.py:34-44)."""
    if dim % 4:
        raise ValueError(f"sincos2d positions need a width that 4 divides, not {dim}")
    y, x = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in grid), indexing="ij")
    omega = temperature ** -(torch.arange(dim // 4) / (dim // 4 - 1))  # (D/4,)
    x, y = x.flatten()[:, None] * omega, y.flatten()[:, None] * omega  # (N, D/4)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)[None]


def lecun_normal_(weight: Tensor) -> Tensor:
    """flax's lecun_normal: a normal of variance 1/fan_in cut at two sigma, rescaled so that the cut keeps that variance."""
    fan_in = weight[0].numel()
    std = math.sqrt(1 / fan_in) / 0.87962566103423978
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class PooledHead(nn.Module):
    """The mean over the picture (`axes`), LayerNorm where `norm_eps` is given, dropout, a linear layer; timm's `head.norm`, `head.fc`."""

    def __init__(self, dim: int, num_outputs: int, *, axes: tuple[int, int], norm_eps: float | None = None, dropout: float = 0.0):
        super().__init__()
        self.axes, self.drop = axes, nn.Dropout(dropout)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(dim, eps=norm_eps)
        self.fc = nn.Linear(dim, num_outputs) if num_outputs else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.norm(x.mean(self.axes)))  # (B, D)
        return x if pre_logits else self.fc(x)


class Stage(nn.Module):
    """One resolution of a hierarchical network: downsampling (or Identity), then blocks, with `grad_checkpointing` recomputed backwards."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module]):
        super().__init__()
        self.downsample, self.blocks, self.grad_checkpointing = downsample, nn.Sequential(*blocks), False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        return checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)


class Hierarchy(nn.Module):
    """timm's informal interface over stem -> stages -> norm -> pooled head, for the networks of several resolutions.

    A subclass names its parts in `trunk()`, sets `head`, and says in `output_fmt` whether features are NCHW or NHWC.
    """

    output_fmt = "NCHW"
    head: PooledHead

    def __init__(self, num_outputs: int, dims: list[int], patch_size: int, stages: str):
        super().__init__()
        self.num_classes = num_outputs
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [{"num_chs": dim, "reduction": patch_size * 2 ** i, "module": f"{stages}.{i}"} for i, dim in enumerate(dims)]

    def trunk(self) -> tuple[nn.Module, nn.Sequential, nn.Module]:
        """Stem, stages, and what follows the last stage."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, height, width) -> the last stage's map, (B, D, H, W) or (B, H, W, D) as `output_fmt` says."""
        stem, stages, norm = self.trunk()
        return norm(stages(stem(x)))

    def forward_intermediates(self, x: Tensor, indices: int | list[int] | None = None, norm: bool = False, stop_early: bool = False,
                              output_fmt: str = "NCHW", intermediates_only: bool = False) -> Any:
        """The maps (B, D, H, W) of the chosen stages (all, the last n, or by number), alone or as (final features, maps); timm's
        signature. `norm` also normalises the last stage's map; `stop_early` leaves out the stages behind the last one chosen."""
        if output_fmt != "NCHW":
            raise ValueError(f"intermediate features come as NCHW, not {output_fmt}")
        stem, stages, last_norm = self.trunk()
        chosen, last = feature_take_indices(len(stages), indices)
        x, maps = stem(x), []
        for i, stage in enumerate(stages[:last + 1] if stop_early else stages):
            x = stage(x)
            if i in chosen:
                y = last_norm(x) if norm and i == len(stages) - 1 else x
                maps.append(y.permute(0, 3, 1, 2).contiguous() if self.output_fmt == "NHWC" else y)
        if intermediates_only:
            return maps
        return (x if stop_early and last < len(stages) - 1 else last_norm(x)), maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map -> logits (B, num_outputs), or pooled features (B, D) with `pre_logits`."""
        return self.head(x, pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh last layer of another width, N(0, 0.02) and zero bias as at the start; 0 leaves it out."""
        self.num_classes = num_classes
        old = next(self.head.parameters(), next(self.parameters()))
        self.head.fc = nn.Linear(self.num_features, num_classes, device=old.device, dtype=old.dtype) if num_classes else nn.Identity()
        self.head.fc.apply(init_linear_)

    def no_weight_decay(self) -> set[str]:
        return set()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.trunk()[1]:
            stage.grad_checkpointing = enable


def init_linear_(module: nn.Module) -> None:
    """Linear layers as in DeiT, Swin and ConvNeXt: N(0, 0.02), cut at +-2 (that is, not at all), zero bias. For `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
