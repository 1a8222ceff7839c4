"""SimpleViT: "Better plain ViT baselines for ImageNet-1k" (Beyer, Zhai, Kolesnikov 2022, arXiv 2205.01580).

A ViT with fixed sine-cosine positions, no class token, the norm and then the mean over patches, and the tanh GELU of
flax (big_vision models/vit.py); names are timm's. The paper's headline 76.5 / 80.0 % have `head=mlp_tanh`, its linear
head 76.7 / 79.8 %.
"""

from models.registry import HALF, register
from models.vit import ViT


class SimpleViT(ViT):
    """Fixed positions, mean pooling, nothing dropped; the options of ViT that the paper and vit-pytorch's network
    differ in.

    vit-pytorch's is `patch_norm=True, qkv_bias=False, out_bias=False, gelu=erf, norm_eps=1e-5`. Other arguments and
    errors: see ViT.
    """

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
        dim_head: int | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        out_bias: bool = True,
        patch_norm: bool = False,
        gelu: str = "tanh",
        norm_eps: float = 1e-6,
        norm_pos: str = "pre_pool",
        head: str = "linear",
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
            dim_head=dim_head,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            patch_norm=patch_norm,
            gelu=gelu,
            norm_eps=norm_eps,
            pool="mean",
            pos="sincos2d",
            norm_pos=norm_pos,
            head=head,
            drop_path=drop_path,
        )


for _name, _patch, _dim, _depth, _heads, _gmacs in (
    # name           patch width depth heads GMACs
    ("simple_vit_ti16", 16, 192, 12, 3, 1.25),
    ("simple_vit_s16", 16, 384, 12, 6, 4.57),
    ("simple_vit_b16", 16, 768, 12, 12, 17.47),
    ("simple_vit_l16", 16, 1024, 24, 16, 61.23),
    ("simple_vit_s32", 32, 384, 12, 6, 1.12),
    ("simple_vit_b32", 32, 768, 12, 12, 4.32),
):
    register(
        _name,
        SimpleViT,
        gmacs=_gmacs,
        mean=HALF,
        std=HALF,
        interpolation="bilinear",
        crop_pct=0.875,
        patch_size=_patch,
        embed_dim=_dim,
        depth=_depth,
        num_heads=_heads,
    )
