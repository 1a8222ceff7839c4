"""The frame of networks with several resolutions (Swin, ConvNeXt): stages, pooled head, timm's informal interface over
them.

Legend: B images, H x W a stage's map, D width.
"""

from collections.abc import Iterable
from typing import Any, cast

from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from models.layers import init_trunc_normal_


class PooledHead(nn.Module):
    """The mean over the image (`axes`), LayerNorm where `norm_eps` is given, dropout, a linear layer; timm's
    `head.norm`, `head.fc`."""

    def __init__(
        self, dim: int, num_outputs: int, *, axes: tuple[int, int], norm_eps: float | None = None, dropout: float = 0.0
    ):
        super().__init__()
        self.axes, self.drop, self.pool = axes, nn.Dropout(dropout), True
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(dim, eps=norm_eps)
        self.fc = nn.Linear(dim, num_outputs) if num_outputs else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if not self.pool:
            return x  # the map, for who pools it elsewhere
        x = self.drop(self.norm(x.mean(self.axes)))  # (B, D)
        return x if pre_logits else self.fc(x)


class Stage(nn.Module):
    """One resolution of a hierarchical network: downsampling (or Identity), then blocks, with `grad_checkpointing`
    recomputed backwards."""

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
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size * 2**i, "module": f"{stages}.{i}"} for i, dim in enumerate(dims)
        ]

    def trunk(self) -> tuple[nn.Module, nn.Sequential, nn.Module]:
        """Stem, stages, and what follows the last stage."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, height, width) -> the last stage's map, (B, D, H, W) or (B, H, W, D) as `output_fmt` says."""
        stem, stages, norm = self.trunk()
        return norm(stages(stem(x)))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps (B, D, H, W) of the chosen stages (all, the last n, or by number), alone or as (final features,
        maps); timm's signature. `norm` also normalises the last stage's map; `stop_early` leaves out the stages behind
        the last one chosen."""
        if output_fmt != "NCHW":
            raise ValueError(f"intermediate features come as NCHW, not {output_fmt}")
        stem, stages, last_norm = self.trunk()
        chosen, last = feature_take_indices(len(stages), indices)
        x, maps = stem(x), []
        for i, stage in enumerate(stages[: last + 1] if stop_early else stages):
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

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh last layer of another width, N(0, 0.02) and zero bias as at the start; 0 leaves it out. `global_pool`
        is timm's word: '' gives out the map unpooled, `avg` pools it again, None leaves that as it is."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.head.pool = bool(global_pool)
        old = next(self.head.parameters(), next(self.parameters()))
        self.head.fc = (
            nn.Linear(self.num_features, num_classes, device=old.device, dtype=old.dtype)
            if num_classes
            else nn.Identity()
        )
        init_trunc_normal_(self.head.fc)

    def no_weight_decay(self) -> set[str]:
        return set()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in cast(Iterable[Stage], self.trunk()[1]):
            stage.grad_checkpointing = enable
