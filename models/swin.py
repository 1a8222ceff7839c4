"""Swin Transformer (Liu et al. 2021, arXiv 2103.14030): attention in windows, shifted in every second block, over four
resolutions.

Module names are timm's (swin_transformer.py), definitions and initialisation the authors'
(github.com/microsoft/Swin-Transformer, models/swin_transformer.py; padding as in their detection code). Maps are
channels-last throughout.
Legend: B images, C channels, H x W map, D width, W windows, N tokens of a window, h heads, K width of a head, y x
inside a window.
"""

import re
from typing import Any

import torch
from einops import rearrange
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from models.hierarchy import Hierarchy, PooledHead, Stage
from models.layers import Mlp, attend, drop_path_rates, init_trunc_normal_, pair
from models.registry import register

Pair = tuple[int, int]


def pad_to(x: Tensor, multiple: Pair) -> Tensor:
    """Zeros below and to the right of (B, H, W, D) until both sides are multiples."""
    down, right = (-x.shape[1] % multiple[0], -x.shape[2] % multiple[1])
    return F.pad(x, (0, 0, 0, right, 0, down)) if down or right else x


def relative_position_index(window: Pair) -> Tensor:
    """(N, N): for each pair of tokens of a window the row of the bias table, which counts offsets (-H+1..H-1) x
    (-W+1..W-1)."""
    y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(window[0]), torch.arange(window[1]), indexing="ij"))
    dy, dx = y[:, None] - y + window[0] - 1, x[:, None] - x + window[1] - 1
    return dy * (2 * window[1] - 1) + dx


def shift_mask(size: Pair, window: Pair, shift: Pair, like: Tensor | None = None) -> Tensor:
    """(W, N, N), 0 or -100: on a padded map rolled by `shift`, tokens that came from opposite edges do not see each
    other."""

    def bands(side: int, win: int, roll: int) -> Tensor:
        place = torch.arange(side, device=None if like is None else like.device)
        return (place >= side - win).long() + (place >= side - roll).long() if roll else torch.zeros_like(place)

    regions = 3 * bands(size[0], window[0], shift[0])[:, None] + bands(size[1], window[1], shift[1])  # (H, W)
    regions = rearrange(regions, "(i y) (j x) -> (i j) (y x)", y=window[0], x=window[1])
    return torch.where(regions[:, :, None] == regions[:, None], 0.0, -100.0)


class PatchEmbed(nn.Module):
    """Patches of any image (B, C, height, width), padded to whole ones, projected and normalised: (B, H, W, D)."""

    def __init__(self, patch_size: int, in_chans: int, dim: int, dropout: float = 0.0):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        down, right = (-side % self.patch_size for side in x.shape[-2:])
        x = F.pad(x, (0, right, 0, down)) if down or right else x
        return self.drop(self.norm(self.proj(x).permute(0, 2, 3, 1)))


class PatchMerging(nn.Module):
    """(B, H, W, D) -> (B, ceil(H/2), ceil(W/2), 2D): four neighbours side by side, normalised, projected."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(pad_to(x, (2, 2)), "b (h y) (w x) d -> b h w (x y d)", y=2, x=2)
        return self.reduction(self.norm(x))


class WindowAttention(nn.Module):
    """Multi-head attention within windows, with a learned bias for each relative position and head."""

    relative_position_index: Tensor

    def __init__(self, dim: int, num_heads: int, window: Pair, *, dropout: float = 0.0, attn_dropout: float = 0.0):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide the stage's width {dim}")
        self.num_heads, self.window_size, self.attn_dropout = num_heads, window, attn_dropout
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window[0] - 1) * (2 * window[1] - 1), num_heads)
        )
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, W, N, D), mask (W, N, N) or None -> (B, W, N, D)."""
        windows, tokens = x.shape[1:3]
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]  # (N N, h)
        bias = rearrange(bias, "(n m) h -> h n m", n=tokens)
        fold = "(b w) h"  # the bias is the same in every window: they count as images
        if mask is not None:  # every window has its own: they count as heads, and one addition does for mask and bias
            fold, bias = "b (w h)", (mask[:, None].to(bias.dtype) + bias).flatten(0, 1)  # (W h, N, N)
        q, k, v = rearrange(self.qkv(x), f"b w n (three h k) -> three {fold} n k", three=3, h=self.num_heads).unbind(0)
        y = attend(q, k, v, self.attn_dropout if self.training else 0.0, bias[None])
        return self.proj_drop(self.proj(rearrange(y, f"{fold} n k -> b w n (h k)", w=windows, h=self.num_heads)))


class SwinBlock(nn.Module):
    """x + windowed attention, x + MLP, both pre-norm. `size` is the map (H, W) the block is built for; it takes any
    other.

    The window never exceeds `size`. An axis is not shifted where the window spans the map at hand.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        size: Pair,
        window: Pair,
        shifted: bool,
        *,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.size, self.window = size, (min(size[0], window[0]), min(size[1], window[1]))
        self.target_shift = (window[0] // 2, window[1] // 2) if shifted else (0, 0)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, self.window, dropout=dropout, attn_dropout=attn_dropout)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dropout=dropout)
        self.drop_path2 = DropPath(drop_path)
        self.register_buffer("attn_mask", self.mask_for(size), persistent=False)

    def shift_for(self, size: Pair) -> Pair:
        """Rows and columns by which a map is rolled before it is cut into windows."""
        y, x = [0 if side <= win else shift for side, win, shift in zip(size, self.window, self.target_shift)]
        return y, x

    def mask_for(self, size: Pair, like: Tensor | None = None) -> Tensor | None:
        """`shift_mask` of the padded map, or None where nothing is rolled."""
        height, width = [side + -side % win for side, win in zip(size, self.window)]
        return (
            shift_mask((height, width), self.window, self.shift_for(size), like) if any(self.shift_for(size)) else None
        )

    def attend_windows(self, x: Tensor) -> Tensor:
        """Pad, roll, cut into windows, attend, and back: (B, H, W, D) -> the same."""
        size, (y, w) = (x.shape[1], x.shape[2]), self.window
        shift = self.shift_for(size)
        mask = self.attn_mask if size == self.size else self.mask_for(size, x)
        x = pad_to(x, self.window)
        rows = x.shape[1] // y
        x = torch.roll(x, (-shift[0], -shift[1]), (1, 2)) if any(shift) else x
        x = self.attn(rearrange(x, "b (i y) (j x) d -> b (i j) (y x) d", y=y, x=w), mask)  # (B, W, N, D)
        x = rearrange(x, "b (i j) (y x) d -> b (i y) (j x) d", i=rows, y=y)
        x = torch.roll(x, shift, (1, 2)) if any(shift) else x
        return x[:, : size[0], : size[1]]

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, D)
        x = x + self.drop_path1(self.attend_windows(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Swin(Hierarchy):
    """Patches, four stages of window attention with patch merging between, LayerNorm, mean, a linear head.

    Args:
        num_outputs: width of the head; 0 returns pooled features.
        image_size: side or (height, width) the windows are fitted to; images of any other size are padded where
            needed.
        window_size: side or (height, width) of the attention window in tokens, cut to the map where the map is smaller.
        embed_dim: width of the first stage, doubled at each; depths, num_heads: of each stage.
        dropout: after patches, attention's projection and both MLP layers; attn_dropout: on attention weights.
        drop_path: stochastic depth at the last block, rising linearly from 0 over all stages.
    Raises ValueError when num_heads does not divide a stage's width, or depths and num_heads differ in length.
    """

    first_conv, classifier, output_fmt = "patch_embed.proj", "head.fc", "NHWC"

    def __init__(
        self,
        *,
        num_outputs: int = 1000,
        image_size: int | Pair = 224,
        in_chans: int = 3,
        patch_size: int = 4,
        window_size: int | Pair = 7,
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        if len(depths) != len(num_heads):
            raise ValueError(
                f"depths {tuple(depths)} and num_heads {tuple(num_heads)} name different numbers of stages"
            )
        dims = [embed_dim * 2**i for i in range(len(depths))]
        super().__init__(num_outputs, dims, patch_size, "layers")
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, dropout)
        height, width = [-(-side // patch_size) for side in pair(image_size)]
        rates, stages = drop_path_rates(drop_path, sum(depths)), []
        for i, (dim, depth, heads) in enumerate(zip(dims, depths, num_heads)):
            if i:
                height, width = (height + 1) // 2, (width + 1) // 2
            stages.append(
                Stage(
                    PatchMerging(dim // 2) if i else nn.Identity(),
                    [
                        SwinBlock(
                            dim,
                            heads,
                            (height, width),
                            pair(window_size),
                            shifted=j % 2 == 1,
                            mlp_ratio=mlp_ratio,
                            dropout=dropout,
                            attn_dropout=attn_dropout,
                            drop_path=rates[sum(depths[:i]) + j],
                        )
                        for j in range(depth)
                    ],
                )
            )
        self.layers = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(self.num_features)
        self.head = PooledHead(self.num_features, num_outputs, axes=(1, 2))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The authors': matrices and bias tables N(0, 0.02), biases 0; the patch convolution keeps PyTorch's own."""
        init_trunc_normal_(self)
        for name, parameter in self.named_parameters():
            if name.endswith("relative_position_bias_table"):
                nn.init.trunc_normal_(parameter, std=0.02)

    def trunk(self) -> tuple[nn.Module, nn.Sequential, nn.Module]:
        return self.patch_embed, self.layers, self.norm

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers from input to output for layer-wise learning rates, in timm's form; `coarse`: stages."""
        fine = [(r"^layers\.(\d+).downsample", (0,)), (r"^layers\.(\d+)\.\w+\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else fine}

    def adapt_state_dict(self, state: dict[str, Tensor], saved: nn.Module | None = None) -> dict[str, Tensor]:
        """The authors' names become timm's (which are ours), stored masks and indices go, bias tables of another window
        are resized.

        `saved` is the network that the weights are of, where it is known: its windows are theirs. Else a table of our
        size is of our window, another of a square one.
        """
        own, adapted = self.state_dict(), {}
        official = (
            "layers.0.downsample.reduction.weight" in state
        )  # merging closes a stage there and opens the next one here
        for key, value in state.items():
            if key.endswith(("relative_position_index", "attn_mask")):
                continue
            if official:
                key = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", key)
                key = re.sub(r"^head\.", "head.fc.", key)
            if key.endswith("relative_position_bias_table") and key in own:
                window, old = window_of(self, key), window_of(saved, key) if saved is not None else None
                if window and (window != old if old else value.shape != own[key].shape):
                    value = resize_table(value, window, old)
            adapted[key] = value
        return adapted


def window_of(network: nn.Module, table: str) -> Pair | None:
    """The window (height, width) of the attention that has a bias table of this name; None where the network has
    none."""
    try:
        attention: Any = network.get_submodule(table.rpartition(".")[0])
        return pair(attention.window_size)
    except AttributeError:
        return None


def resize_table(table: Tensor, window: Pair, old: Pair | None = None) -> Tensor:
    """A bias table ((2H-1)(2W-1), h) of the window `old` (H, W), or of a square one, for another window: bicubic over
    the offsets, the authors' rule (utils.py:65-82).

    timm stretches it by a geometric progression instead (BEiT's rule); the two agree in no value but the shape. A table
    whose window was not square is returned as it is without `old`, since its sides are not known.
    """
    rows = 2 * old[0] - 1 if old else round(len(table) ** 0.5)
    if len(table) % rows or not old and rows * rows != len(table):
        return table
    grid = rearrange(table.float(), "(y x) h -> 1 h y x", y=rows)
    grid = F.interpolate(grid, size=(2 * window[0] - 1, 2 * window[1] - 1), mode="bicubic")
    return rearrange(grid, "1 h y x -> (y x) h").to(table.dtype)


for _name, _dim, _depths, _heads, _gmacs, _timm in (
    # name     width  blocks of the stages  heads           GMACs  the same in timm
    ("swin_t", 96, (2, 2, 6, 2), (3, 6, 12, 24), 4.49, "swin_tiny_patch4_window7_224"),
    ("swin_s", 96, (2, 2, 18, 2), (3, 6, 12, 24), 8.74, "swin_small_patch4_window7_224"),
    ("swin_b", 128, (2, 2, 18, 2), (4, 8, 16, 32), 15.43, "swin_base_patch4_window7_224"),
    ("swin_l", 192, (2, 2, 18, 2), (6, 12, 24, 48), 34.48, "swin_large_patch4_window7_224"),
):
    register(_name, Swin, gmacs=_gmacs, timm=_timm, embed_dim=_dim, depths=_depths, num_heads=_heads)
