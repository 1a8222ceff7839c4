"""Modules that several networks share. Attribute names are timm's, so that weights move without a key map.

Legend: B images, C channels, N tokens, D width, H heads, K width of a head.
"""

import math
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from timm.layers import DropPath, LayerScale, use_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size given as one side or as both. Raises ValueError."""
    if isinstance(size, str) or not isinstance(size, int) and len(size) != 2:
        raise ValueError(f"a size is one side or (height, width) in pixels, not {size!r}")
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def grid_of(image_size: int | Sequence[int], patch_size: int | Sequence[int]) -> tuple[int, int]:
    """Patches down and across. Raises ValueError when the patch does not divide the image."""
    (height, width), (down, across) = pair(image_size), pair(patch_size)
    if height % down or width % across:
        fit = f"{max(1, round(height / down)) * down}x{max(1, round(width / across)) * across}"
        raise ValueError(
            f"image size {height}x{width} is not a multiple of the patch size {down}x{across}; the nearest that fits "
            f"is {fit}"
        )
    return height // down, width // across


def saved_grid(count: int, grid: tuple[int, int], leads: tuple[int, ...]) -> tuple[int, tuple[int, int]]:
    """(prefix tokens, rows and columns) of `count` saved positions whose image size is not known.

    The first of `leads` that fits is the number of prefix tokens. The patches are taken as a grid of the aspect of
    `grid`, which is asked for, else as a square. Raises ValueError when neither fits.
    """
    for lead in leads:
        patches = max(count - lead, 0)
        rows, side = round(grid[0] * math.sqrt(patches / (grid[0] * grid[1]))), math.isqrt(patches)
        if rows and not patches % rows and patches // rows * grid[0] == rows * grid[1]:
            return lead, (rows, patches // rows)
        if side and side * side == patches:
            return lead, (side, side)
    prefix = f", with or without {max(leads)} for prefix tokens" if max(leads) else ""
    raise ValueError(
        f"{count} saved positions are neither a square grid nor one of the aspect {grid[0]}:{grid[1]}{prefix}"
    )


class PatchEmbed(nn.Module):
    """Cut an image (B, C, height, width) into patches and project each: (B, N, D), row by row. `any_size` takes others
    than `image_size`."""

    def __init__(self, image_size: int | tuple[int, int], patch_size: int, in_chans: int, dim: int):
        super().__init__()
        self.image_size, self.grid_size = pair(image_size), grid_of(image_size, patch_size)
        self.num_patches, self.any_size = self.grid_size[0] * self.grid_size[1], False
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)

    def check(self, x: Tensor) -> None:
        """Raises ValueError for images of another size."""
        if self.any_size:
            grid_of(x.shape[-2:], self.proj.kernel_size)
        elif tuple(x.shape[-2:]) != self.image_size:
            raise ValueError(
                f"the network was built for pictures of {self.image_size[0]}x{self.image_size[1]} and got "
                f"{x.shape[-2]}x{x.shape[-1]}; build it with that image_size"
            )

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        return rearrange(self.proj(x), "b d h w -> b (h w) d")


class NormedPatchEmbed(PatchEmbed):
    """Patches normalised before and after their projection (Kumar et al. 2023, "Dual PatchNorm", arXiv 2302.01327;
    vit-pytorch's networks).

    `proj` keeps the shape of the convolution; `norm_in` runs over a raw patch flattened as (channel, row, column).
    """

    def __init__(
        self, image_size: int | tuple[int, int], patch_size: int, in_chans: int, dim: int, norm_eps: float = 1e-6
    ):
        super().__init__(image_size, patch_size, in_chans, dim)
        self.norm_in = nn.LayerNorm(in_chans * patch_size**2, eps=norm_eps)
        self.norm_out = nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        p, q = self.proj.kernel_size
        x = self.norm_in(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=q))
        return self.norm_out(F.linear(x, self.proj.weight.flatten(1), self.proj.bias))  # (B, N, D)


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, bias: Tensor | None = None) -> Tensor:
    """softmax(q k' / sqrt(K) + bias) v for (B, H, N, K); PyTorch's fused kernel, but written out on CPU, where that is
    faster; timm's `set_fused_attn(experimental=True)` takes the kernel everywhere."""
    if q.device.type != "cpu" or use_fused_attn(experimental=True):
        return F.scaled_dot_product_attention(q, k, v, None if bias is None else bias.to(q.dtype), dropout_p=dropout)
    return attend_written_out(q, k, v, dropout, bias)


def attend_written_out(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, bias: Tensor | None = None) -> Tensor:
    """`attend` by two matrix products, which keep the weights (B, H, N, N)."""
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, N, N)
    if bias is not None:
        weights = weights + bias
    return F.dropout(weights.softmax(-1), dropout) @ v


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017), one fused projection ordered q, k, v; heads split inside each.

    dim_head: width of a head; None shares `dim` among the heads, which must divide it, else ValueError.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        dim_head: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
    ):
        super().__init__()
        if dim_head is None and dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide embed_dim {dim}")
        inner = dim if dim_head is None else num_heads * dim_head
        self.num_heads, self.attn_dropout = num_heads, attn_dropout
        self.qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias)
        self.proj = nn.Linear(inner, dim, bias=out_bias)
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
    """Pre-norm transformer block: x + attention, x + MLP, each with optional LayerScale and stochastic depth of its
    own."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        dim_head: int | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        act: Callable[[], nn.Module] = nn.GELU,
        norm_eps: float = 1e-6,
    ):
        super().__init__()

        def scale() -> nn.Module:
            return nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)

        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(
            dim,
            num_heads,
            dim_head=dim_head,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            dropout=dropout,
            attn_dropout=attn_dropout,
        )
        self.ls1, self.drop_path1 = scale(), DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act=act, dropout=dropout)
        self.ls2, self.drop_path2 = scale(), DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth's linear rule (Huang et al. 2016): 0 at the first block, `rate` at the last."""
    return [rate * i / max(1, depth - 1) for i in range(depth)]


def sincos2d(grid: tuple[int, int], dim: int, temperature: float = 10_000.0) -> Tensor:
    """Fixed 2-D positions (1, N, D) of "Better plain ViT baselines": sin x, cos x, sin y, cos y (big_vision
    models/vit.py:34-44)."""
    if dim % 4:
        raise ValueError(f"sincos2d positions need a width that 4 divides, not {dim}")
    y, x = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in grid), indexing="ij")
    omega = 1.0 / temperature ** (torch.arange(dim // 4) / (dim // 4 - 1))  # (D/4,)
    x, y = x.flatten()[:, None] * omega, y.flatten()[:, None] * omega  # (N, D/4)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)[None]


def lecun_normal_(weight: Tensor) -> Tensor:
    """flax's lecun_normal: a normal of variance 1/fan_in cut at two sigma, rescaled so that the cut keeps that
    variance."""
    fan_in = weight[0].numel()
    std = math.sqrt(1 / fan_in) / 0.87962566103423978
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def init_trunc_normal_(*modules: nn.Module) -> None:
    """Every linear layer inside: weight N(0, 0.02) cut at 2 (a hundred sigma: the cut of the DeiT lineage never acts),
    bias 0."""
    for module in modules:
        for linear in module.modules():
            if isinstance(linear, nn.Linear):
                nn.init.trunc_normal_(linear.weight, std=0.02)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
