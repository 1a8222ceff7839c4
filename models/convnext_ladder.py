"""From ResNet-50 to ConvNeXt-T one decision at a time: convnext_step_0 .. convnext_step_12 (arXiv 2201.03545, section
2, table 10).

One network whose settings stand in `STEPS`, each row what its step changes; the last step is `convnext_t` itself. The
authors published only the two ends, so what the paper leaves open is decided here: the shortcut's normalisation goes
with the block's second and third (step 10), the stem's stays; weights start as ResNet's until the last step; there is
no LayerScale before it.
Legend: B images, H x W map, D width of a stage.
"""

from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d
from torch import Tensor, nn

from models.convnext import ConvNeXt, check_smallest
from models.hierarchy import Hierarchy, PooledHead, Stage
from models.layers import drop_path_rates, init_trunc_normal_
from models.registry import register

NORMS = {"batch": nn.BatchNorm2d, "layer": LayerNorm2d}
ACTS = {"relu": nn.ReLU, "gelu": nn.GELU}


class LadderBlock(nn.Module):
    """Shortcut + (1x1, kxk, 1x1) convolutions, or (kxk, 1x1, 1x1) with `spatial_first`: (B, D_in, H, W) -> (B, D_out,
    H/s, W/s)."""

    def __init__(
        self,
        dim_in: int,
        dim_mid: int,
        dim_out: int,
        stride: int,
        *,
        kernel_size: int,
        depthwise: bool,
        spatial_first: bool,
        act: str,
        one_act: bool,
        norm: str,
        one_norm: bool,
        drop_path: float,
    ):
        super().__init__()

        def conv(a: int, b: int, kernel: int = 1, step: int = 1, normed: bool = True) -> list[nn.Module]:
            bias = not normed or norm == "layer"  # BatchNorm would take it away again
            groups = a if kernel > 1 and depthwise else 1
            return [nn.Conv2d(a, b, kernel, step, kernel // 2, groups=groups, bias=bias)] + [NORMS[norm](b)] * normed

        if spatial_first:
            first, second = conv(dim_in, dim_in, kernel_size, stride), conv(dim_in, dim_mid, normed=not one_norm)
        else:
            first, second = conv(dim_in, dim_mid), conv(dim_mid, dim_mid, kernel_size, stride, not one_norm)
        self.body = nn.Sequential(
            *first,
            nn.Identity() if one_act else ACTS[act](),
            *second,
            ACTS[act](),
            *conv(dim_mid, dim_out, normed=not one_norm),
        )
        same = dim_in == dim_out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv(dim_in, dim_out, 1, stride, not one_norm))
        self.drop_path, self.act = DropPath(drop_path), nn.Identity() if one_act else ACTS[act]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.shortcut(x) + self.drop_path(self.body(x)))


class Ladder(Hierarchy):
    """A ResNet with the decisions of the paper as settings; the defaults are ResNet-50.

    Args:
        depths: blocks of the stages; width: of the first stage (inside the bottleneck, or outside when inverted),
            doubled at each.
        patchify: a 4x4 convolution of stride 4 for the 7x7 one and its pooling.
        depthwise: the spatial convolutions; inverted: blocks widen by 4 inside instead of narrowing by 4.
        spatial_first: the spatial convolution opens the block; kernel_size: its side, odd.
        act: relu | gelu; one_act: only between the 1x1 convolutions. norm: batch | layer; one_norm: only behind the
        first convolution. num_outputs, image_size (at least 32), in_chans, dropout, drop_path: as in ConvNeXt.
    """

    first_conv, classifier = "stem.0", "head.fc"

    def __init__(
        self,
        *,
        num_outputs: int = 1000,
        image_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        depths: tuple[int, ...] = (3, 4, 6, 3),
        width: int = 64,
        patchify: bool = False,
        depthwise: bool = False,
        inverted: bool = False,
        spatial_first: bool = False,
        kernel_size: int = 3,
        act: str = "relu",
        one_act: bool = False,
        norm: str = "batch",
        one_norm: bool = False,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        check_smallest(image_size, 32)
        widths = [width * 2**i for i in range(len(depths))]
        outs, mids = (widths, [4 * w for w in widths]) if inverted else ([4 * w for w in widths], widths)
        super().__init__(num_outputs, outs, 4, "stages")
        stem = (
            nn.Conv2d(in_chans, width, 4, 4, bias=norm == "layer")
            if patchify
            else nn.Conv2d(in_chans, width, 7, 2, 3, bias=False)
        )
        self.stem = nn.Sequential(
            stem,
            NORMS[norm](width),
            nn.Identity() if one_act else ACTS[act](),
            nn.Identity() if patchify else nn.MaxPool2d(3, 2, 1),
        )
        rates, stages = drop_path_rates(drop_path, sum(depths)), []
        for i, depth in enumerate(depths):
            before = outs[i - 1] if i else width
            stages.append(
                Stage(
                    nn.Identity(),
                    [
                        LadderBlock(
                            outs[i] if j else before,
                            mids[i],
                            outs[i],
                            2 if i and not j else 1,
                            kernel_size=kernel_size,
                            depthwise=depthwise,
                            spatial_first=spatial_first,
                            act=act,
                            one_act=one_act,
                            norm=norm,
                            one_norm=one_norm,
                            drop_path=rates[sum(depths[:i]) + j],
                        )
                        for j in range(depth)
                    ],
                )
            )
        self.stages, self.norm_pre = nn.Sequential(*stages), nn.Identity()
        self.head = PooledHead(self.num_features, num_outputs, axes=(2, 3), dropout=dropout)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """ResNet's: convolutions Kaiming normal over what goes out, biases 0; the head as ConvNeXt's."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        init_trunc_normal_(self.head)

    def trunk(self) -> tuple[nn.Module, nn.Sequential, nn.Module]:
        return self.stem, self.stages, self.norm_pre

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers from input to output for layer-wise learning rates, in timm's form; `coarse`: stages."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.blocks\.(\d+)", None)]}


STEPS: tuple[tuple[str, float, dict[str, Any]], ...] = (
    # decision                        GMACs  what changes against the step above
    ("ResNet-50", 4.09, {}),
    ("stage ratio of Swin", 4.53, {"depths": (3, 3, 9, 3)}),
    ("patchify stem", 4.42, {"patchify": True}),
    ("depthwise convolution", 2.35, {"depthwise": True}),
    ("width 96", 5.27, {"width": 96}),
    ("inverted bottleneck", 4.64, {"inverted": True}),
    ("depthwise convolution moves up", 4.07, {"spatial_first": True}),
    ("kernel 7x7", 4.15, {"kernel_size": 7}),
    ("GELU for ReLU", 4.15, {"act": "gelu"}),
    ("fewer activations", 4.15, {"one_act": True}),
    ("fewer normalisations", 4.15, {"one_norm": True}),
    ("LayerNorm for BatchNorm", 4.15, {"norm": "layer"}),
)
_args: dict[str, Any] = {}
for _i, (_what, _gmacs, _change) in enumerate(STEPS):
    _args = {**_args, **_change}
    register(f"convnext_step_{_i}", Ladder, gmacs=_gmacs, crop_pct=0.875, **_args)
register(
    f"convnext_step_{len(STEPS)}", ConvNeXt, gmacs=4.46, timm="convnext_tiny", crop_pct=0.875
)  # separate downsampling: ConvNeXt-T
