"""ConvNeXt (Liu et al. 2022, "A ConvNet for the 2020s", arXiv 2201.03545): a convolutional network built like a Swin
Transformer.

Module names are timm's (convnext.py), definitions and initialisation the authors'
(github.com/facebookresearch/ConvNeXt, models/convnext.py). Legend: B images, C channels of the image, H x W map, D
width.
"""

import re
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d
from torch import Tensor, nn

from models.hierarchy import Hierarchy, PooledHead, Stage
from models.layers import Mlp, drop_path_rates, init_trunc_normal_
from models.registry import register


class ConvNeXtBlock(nn.Module):
    """x + gamma * MLP(LayerNorm(depthwise convolution(x))): (B, D, H, W) -> the same; all but the convolution runs
    channels-last."""

    def __init__(self, dim: int, kernel_size: int, *, layer_scale: float | None = 1e-6, drop_path: float = 0.0):
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1)))  # (B, H, W, D)
        y = y if self.gamma is None else y * self.gamma
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class ConvNeXt(Hierarchy):
    """A 4x4 stem, four stages with 2x2 downsampling between, mean, LayerNorm, a linear head.

    Args:
        num_outputs: width of the head; 0 returns pooled, normalised features.
        image_size: accepted as every network's; images of any size from 32 pixels up may follow. Raises ValueError
            below.
        dims, depths: width and number of blocks of each stage.
        kernel_size: of the depthwise convolutions, odd.
        layer_scale: gamma at the start; None leaves it out.
        head_init_scale: factor on the head's fresh weights (the authors fine-tune with 0.001).
        dropout: before the head; drop_path: stochastic depth at the last block, rising linearly from 0 over all stages.
    """

    first_conv, classifier = "stem.0", "head.fc"

    def __init__(
        self,
        *,
        num_outputs: int = 1000,
        image_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        patch_size: int = 4,
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (3, 3, 9, 3),
        kernel_size: int = 7,
        layer_scale: float | None = 1e-6,
        head_init_scale: float = 1.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        check_smallest(image_size, patch_size * 2 ** (len(dims) - 1))
        super().__init__(num_outputs, list(dims), patch_size, "stages")
        self.head_init_scale = head_init_scale
        self.stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], patch_size, patch_size), LayerNorm2d(dims[0], eps=1e-6))
        rates, stages = drop_path_rates(drop_path, sum(depths)), []
        for i, (dim, depth) in enumerate(zip(dims, depths)):
            down = (
                nn.Sequential(LayerNorm2d(dims[i - 1], eps=1e-6), nn.Conv2d(dims[i - 1], dim, 2, 2))
                if i
                else nn.Identity()
            )
            stages.append(
                Stage(
                    down,
                    [
                        ConvNeXtBlock(dim, kernel_size, layer_scale=layer_scale, drop_path=rates[sum(depths[:i]) + j])
                        for j in range(depth)
                    ],
                )
            )
        self.stages, self.norm_pre = nn.Sequential(*stages), nn.Identity()  # the norm comes after the mean, in the head
        self.head = PooledHead(self.num_features, num_outputs, axes=(2, 3), norm_eps=1e-6, dropout=dropout)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The authors': every convolution and matrix N(0, 0.02), biases 0; the head scaled by `head_init_scale`."""
        init_trunc_normal_(self)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parameter in self.head.fc.parameters():
            parameter.mul_(self.head_init_scale)

    def trunk(self) -> tuple[nn.Module, nn.Sequential, nn.Module]:
        return self.stem, self.stages, self.norm_pre

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers from input to output for layer-wise learning rates, in timm's form; `coarse`: stages."""
        fine = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm_pre", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def adapt_state_dict(self, state: dict[str, Tensor], saved: nn.Module | None = None) -> dict[str, Tensor]:
        """The authors' names become timm's, which are ours. `saved` is not used: no tensor depends on the image
        size."""
        if "downsample_layers.0.0.weight" not in state:
            return state
        return {rename_official(key): value for key, value in state.items()}


OFFICIAL = (  # the authors' names, and timm's
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv", ".mlp.fc"),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def rename_official(key: str) -> str:
    """The name in our network of a tensor of facebookresearch/ConvNeXt."""
    for pattern, name in OFFICIAL:
        key = re.sub(pattern, name, key)
    return key


def check_smallest(image_size: int | tuple[int, int], smallest: int) -> None:
    """Raises ValueError when a side of the image would vanish before the last stage."""
    sides = (image_size,) if isinstance(image_size, int) else image_size
    if min(sides) < smallest:
        raise ValueError(
            f"image size {'x'.join(map(str, sides))} is too small: each side needs {smallest} pixels or more"
        )


for _name, _dims, _depths, _gmacs, _timm in (
    # name          widths of the stages     blocks         GMACs  the same in timm
    ("convnext_t", (96, 192, 384, 768), (3, 3, 9, 3), 4.46, "convnext_tiny"),
    ("convnext_s", (96, 192, 384, 768), (3, 3, 27, 3), 8.68, "convnext_small"),
    ("convnext_b", (128, 256, 512, 1024), (3, 3, 27, 3), 15.35, "convnext_base"),
    ("convnext_l", (192, 384, 768, 1536), (3, 3, 27, 3), 34.36, "convnext_large"),
    ("convnext_xl", (256, 512, 1024, 2048), (3, 3, 27, 3), 60.92, "convnext_xlarge"),
):
    register(_name, ConvNeXt, gmacs=_gmacs, timm=_timm, crop_pct=0.875, dims=_dims, depths=_depths)
