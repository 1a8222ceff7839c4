"""DeiT (Touvron et al. 2021, arXiv 2012.12877), its distilled form, and DeiT III (Touvron et al. 2022, arXiv
2204.07118).

Structure and names are timm's (deit.py), initialisation is that of facebookresearch/deit (models.py, models_v2.py).
Legend: B images, N patches, D width, K classes.
"""

import torch
from torch import Tensor, nn

from models.layers import init_trunc_normal_
from models.registry import register
from models.vit import ViT


class DeiT(ViT):
    """ViT with DeiT's initialisation: matrices, tokens and positions N(0, 0.02), biases 0, the patch projection
    PyTorch's own."""

    @torch.no_grad()
    def init_weights(self) -> None:
        init_trunc_normal_(self.blocks, self.pre_logits)
        for parameter in self.parameters(recurse=False):  # tokens and positions
            nn.init.trunc_normal_(parameter, std=0.02)

    def init_head_(self, head: nn.Linear) -> None:
        init_trunc_normal_(head)


class DistilledDeiT(DeiT):
    """DeiT with a distillation token after the class token and a head for each (section 4 of the paper).

    In training the network returns (class logits, distillation logits), for the labels and for the teacher; in
    evaluation their mean. `set_distilled_training(False)` gives the mean in training too, as for fine-tuning without a
    teacher. Arguments and errors: see ViT.
    """

    prefix = ("cls_token", "dist_token")
    classifier = ("head", "head_dist")

    def __init__(
        self,
        *,
        num_outputs: int = 1000,
        image_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__(
            num_outputs=num_outputs,
            image_size=image_size,
            in_chans=in_chans,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            dropout=dropout,
            attn_dropout=attn_dropout,
            drop_path=drop_path,
        )
        self.head_dist = self.make_head(num_outputs)
        self.distilled_training = True

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens -> logits as the class says, or the mean of both tokens (B, D) with `pre_logits`."""
        x_cls, x_dist = x[:, 0], x[:, 1]
        if pre_logits:
            return (x_cls + x_dist) / 2
        logits, logits_dist = self.head(x_cls), self.head_dist(x_dist)  # (B, K)
        if self.training and self.distilled_training:
            return logits, logits_dist
        return (logits + logits_dist) / 2

    def set_distilled_training(self, enable: bool = True) -> None:
        self.distilled_training = enable

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        return self.head, self.head_dist

    def reset_classifier(self, num_classes: int) -> None:
        """Fresh heads of another width, initialised as at the start; 0 leaves them out."""
        super().reset_classifier(num_classes)
        self.head_dist = self.make_head(num_classes)


class DeiT3(DeiT):
    """DeiT III: LayerScale, no positions for the class token, the same stochastic depth in every block. Arguments and
    errors: see ViT."""

    prefix_has_pos = False

    def __init__(
        self,
        *,
        num_outputs: int = 1000,
        image_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale: float | None = 1e-4,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__(
            num_outputs=num_outputs,
            image_size=image_size,
            in_chans=in_chans,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            layer_scale=layer_scale,
            dropout=dropout,
            attn_dropout=attn_dropout,
            drop_path=drop_path,
        )

    def drop_path_rates(self, rate: float, depth: int) -> list[float]:
        return [rate] * depth


for _name, _build, _size, _patch, _dim, _depth, _heads, _gmacs, _timm in (
    # name                  network        side patch width depth heads GMACs  the same in timm
    ("deit_ti16", DeiT, 224, 16, 192, 12, 3, 1.25, "deit_tiny_patch16_224"),
    ("deit_s16", DeiT, 224, 16, 384, 12, 6, 4.60, "deit_small_patch16_224"),
    ("deit_b16", DeiT, 224, 16, 768, 12, 12, 17.56, "deit_base_patch16_224"),
    ("deit_b16_384", DeiT, 384, 16, 768, 12, 12, 55.48, "deit_base_patch16_384"),
    ("deit_ti16_distilled", DistilledDeiT, 224, 16, 192, 12, 3, 1.26, "deit_tiny_distilled_patch16_224"),
    ("deit_s16_distilled", DistilledDeiT, 224, 16, 384, 12, 6, 4.62, "deit_small_distilled_patch16_224"),
    ("deit_b16_distilled", DistilledDeiT, 224, 16, 768, 12, 12, 17.66, "deit_base_distilled_patch16_224"),
    ("deit_b16_distilled_384", DistilledDeiT, 384, 16, 768, 12, 12, 55.59, "deit_base_distilled_patch16_384"),
    ("deit3_s16", DeiT3, 224, 16, 384, 12, 6, 4.60, "deit3_small_patch16_224"),
    ("deit3_m16", DeiT3, 224, 16, 512, 12, 8, 7.99, "deit3_medium_patch16_224"),
    ("deit3_b16", DeiT3, 224, 16, 768, 12, 12, 17.56, "deit3_base_patch16_224"),
    ("deit3_l16", DeiT3, 224, 16, 1024, 24, 16, 61.55, "deit3_large_patch16_224"),
    ("deit3_h14", DeiT3, 224, 14, 1280, 32, 16, 167.30, "deit3_huge_patch14_224"),
):
    register(
        _name,
        _build,
        gmacs=_gmacs,
        timm=_timm,
        image_size=_size,
        crop_pct=1.0 if _size == 384 else 0.9,
        patch_size=_patch,
        embed_dim=_dim,
        depth=_depth,
        num_heads=_heads,
    )
