"""ViT-5: "Vision Transformers for the Mid-2020s" (Wang et al. 2026, arXiv 2602.08071; wangf3014/ViT-5 at b7b0796,
models_vit5.py).

A DeiT III whose norms are RMSNorm without bias, whose queries and keys are normalised per head and turned by rotary
positions beside the learned ones, with a square of register tokens after the patches that has rotary positions of its
own. Names are timm's where timm has one.
Legend: B images, N patches, R registers, T = 1 + N + R tokens, D width, H heads, K width of a head.
"""

import math

import torch
from einops import rearrange
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import Mlp, PatchEmbed, attend, init_trunc_normal_
from models.registry import register
from models.vit import PlainTransformer


def axial_angles(grid: tuple[int, int], dim_head: int, theta: float) -> Tensor:
    """Rotary angles (N, K) of a grid: the first half of the channels turns with the row, the second with the column;
    each frequency theta^(-2i / (K/2)) serves two neighbouring channels (rope.py, Su et al. 2021). Raises ValueError
    when 4 does not divide K."""
    if dim_head % 4:
        raise ValueError(f"rotary positions need heads of a width that 4 divides, not {dim_head}")
    omega = theta ** -(torch.arange(0, dim_head // 2, 2, dtype=torch.float32) / (dim_head // 2))  # (K/4,)
    omega = omega.repeat_interleave(2)  # (K/2,)
    y, x = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in grid), indexing="ij")
    return torch.cat([y.flatten()[:, None] * omega, x.flatten()[:, None] * omega], dim=1)


class Rotary(nn.Module):
    """Turn pairs of neighbouring channels of (B, H, T, K) by the angles (T, K) of their token; angle 0 leaves a token
    as it is."""

    cos: Tensor
    sin: Tensor

    def __init__(self, angles: Tensor):
        super().__init__()
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * self.cos + torch.stack([-odd, even], dim=-1).flatten(-2) * self.sin


class HeadNorm(nn.RMSNorm):
    """RMSNorm that computes in the type of its input, so that autocast keeps PyTorch's fused kernel (it sums in float32
    all the same)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)


class RotaryAttention(nn.Module):
    """Self-attention with RMS-normalised and then rotated queries and keys: (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, num_heads: int, rotary: Rotary, *, qkv_bias: bool = False):
        super().__init__()
        self.num_heads, self.rotary = num_heads, rotary
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm, self.k_norm = HeadNorm(dim // num_heads, eps=1e-6), HeadNorm(dim // num_heads, eps=1e-6)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b t (three h k) -> three b h t k", three=3, h=self.num_heads).unbind(0)
        q, k = self.rotary(self.q_norm(q)).type_as(v), self.rotary(self.k_norm(k)).type_as(v)  # (B, H, T, K)
        return self.proj(rearrange(attend(q, k, v), "b h t k -> b t (h k)"))


class Block(nn.Module):
    """x + attention, x + MLP, each under RMSNorm and LayerScale."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        rotary: Rotary,
        *,
        mlp_ratio: float,
        qkv_bias: bool,
        layer_scale: float,
        drop_path: float,
    ):
        super().__init__()
        self.norm1, self.attn = nn.RMSNorm(dim, eps=1e-6), RotaryAttention(dim, num_heads, rotary, qkv_bias=qkv_bias)
        self.ls1, self.drop_path1 = LayerScale(dim, layer_scale), DropPath(drop_path)
        self.norm2, self.mlp = nn.RMSNorm(dim, eps=1e-6), Mlp(dim, int(dim * mlp_ratio))
        self.ls2, self.drop_path2 = LayerScale(dim, layer_scale), DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class ViT5(PlainTransformer):
    """Class token, patches, registers; rotary and learned positions; a linear head on the class token.

    Args:
        num_outputs: width of the head; 0 returns pooled features.
        image_size: side or (height, width); the patch must divide it, else ValueError.
        registers: tokens without content of their own, a square number, else ValueError.
        theta, register_theta: base of the rotary frequencies of patches and of registers.
        layer_scale: start of LayerScale; drop_path: stochastic depth, the same in every block.
    """

    prefix_has_pos = False

    def __init__(
        self,
        *,
        num_outputs: int = 1000,
        image_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        registers: int = 4,
        theta: float = 10_000.0,
        register_theta: float = 100.0,
        layer_scale: float = 1e-4,
        drop_path: float = 0.0,
    ):
        super().__init__(num_outputs, embed_dim)
        side, dim_head = math.isqrt(registers), embed_dim // num_heads
        if side * side != registers:
            raise ValueError(f"registers stand in a square: {registers} is not a square number, {side * side} is")
        if embed_dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide embed_dim {embed_dim}")
        self.patch_embed = PatchEmbed(image_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches, embed_dim))
        rotary = Rotary(
            torch.cat(
                [
                    torch.zeros(1, dim_head),
                    axial_angles(self.patch_embed.grid_size, dim_head, theta),
                    axial_angles((side, side), dim_head, register_theta),
                ]
            )
        )  # one table, shared by all blocks
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    num_heads,
                    rotary,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    layer_scale=layer_scale,
                    drop_path=drop_path,
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.RMSNorm(embed_dim, eps=1e-6)
        self.init_weights()
        self.head = self.make_head(num_outputs)

    @torch.no_grad()
    def init_weights(self) -> None:
        """DeiT III's: matrices, tokens and positions N(0, 0.02), biases 0, the patch projection PyTorch's own."""
        init_trunc_normal_(self.blocks)
        for parameter in self.parameters(recurse=False):
            nn.init.trunc_normal_(parameter, std=0.02)

    def init_head_(self, head: nn.Linear) -> None:
        init_trunc_normal_(head)

    def set_any_size(self) -> None:
        """Raises ValueError: the table of rotary angles is that of one grid."""
        raise ValueError("ViT-5's rotary positions are those of one picture size")

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, height, width) -> class token, patches with positions, registers (B, T, D)."""
        x = self.patch_embed(x) + self.pos_embed  # (B, N, D)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x, self.reg_token.expand(len(x), -1, -1)], dim=1)

    def pool_tokens(self, x: Tensor) -> Tensor:
        """Tokens (B, T, D) -> the class token (B, D)."""
        return x[:, 0]

    def adapt_state_dict(self, state: dict[str, Tensor], saved: nn.Module | None = None) -> dict[str, Tensor]:
        """As for the others; the authors' files also hold their rotary frequencies, which are constants here."""
        return super().adapt_state_dict({key: value for key, value in state.items() if ".rope" not in key}, saved)


for _name, _dim, _depth, _heads, _gmacs in (
    # name     width depth heads GMACs
    ("vit5_s16", 384, 12, 6, 4.70),
    ("vit5_b16", 768, 12, 12, 17.93),
):
    register(_name, ViT5, gmacs=_gmacs, crop_pct=1.0, embed_dim=_dim, depth=_depth, num_heads=_heads)
