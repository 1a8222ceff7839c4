"""Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929; "How to train your ViT?", arXiv 2106.10270).

Module names are timm's (vision_transformer.py), initialisation is big_vision's (models/vit.py), so that timm's weights load as they are and
fresh weights start as the paper's did. Legend: B pictures, C channels, N patches, P prefix tokens (the class token), D width.
"""
import math
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import checkpoint_seq
from torch import Tensor, nn

from models import HALF, register
from models.layers import Block, PatchEmbed, drop_path_rates, lecun_normal_, sincos2d


class ViT(nn.Module):
    """Patches, positions, pre-norm blocks, a linear head.

    Args:
        num_outputs: width of the head; 0 returns pooled features.
        image_size: side or (height, width); the patch must divide it, else ValueError.
        pool: `cls` reads the class token, `mean` has none and averages the normalised patches.
        pos: `learned` positions (with one for the class token), fixed `sincos2d`, or `none`.
        dropout: after positions, attention's projection and both MLP layers; attn_dropout: on attention weights.
        drop_path: stochastic depth at the last block, rising linearly from 0.
    """

    first_conv, classifier = "patch_embed.proj", "head"

    def __init__(self, *, num_outputs: int = 1000, image_size: int | tuple[int, int] = 224, in_chans: int = 3, patch_size: int = 16,
                 embed_dim: int = 768, depth: int = 12, num_heads: int = 12, mlp_ratio: float = 4.0, qkv_bias: bool = True,
                 pool: str = "cls", pos: str = "learned", dropout: float = 0.0, attn_dropout: float = 0.0, drop_path: float = 0.0):
        super().__init__()
        _check_choice("pool", pool, ("cls", "mean"))
        _check_choice("pos", pos, ("learned", "sincos2d", "none"))
        self.num_classes, self.pool, self.grad_checkpointing = num_outputs, pool, False
        self.num_features = self.embed_dim = self.head_hidden_size = embed_dim
        self.num_prefix_tokens = int(pool == "cls")
        self.patch_embed = PatchEmbed(image_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if pool == "cls" else None
        if pos == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, self.num_prefix_tokens + self.patch_embed.num_patches, embed_dim))
        elif pos == "sincos2d":
            fixed = sincos2d(self.patch_embed.grid_size, embed_dim)
            self.register_buffer("pos_embed", nn.functional.pad(fixed, (0, 0, self.num_prefix_tokens, 0)), persistent=False)
        else:
            self.pos_embed = None
        self.pos_drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(
            Block(embed_dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, dropout=dropout, attn_dropout=attn_dropout, drop_path=rate)
            for rate in drop_path_rates(drop_path, depth)))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_outputs) if num_outputs else nn.Identity()
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """big_vision's: patches LeCun normal; q, k, v and every other matrix Xavier uniform; MLP biases N(0, 1e-6); positions
        N(0, 1/sqrt(D)); class token and head zero."""
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        if isinstance(self.pos_embed, nn.Parameter):
            nn.init.normal_(self.pos_embed, std=1 / math.sqrt(self.embed_dim))
        for block in self.blocks:
            for part in block.attn.qkv.weight.chunk(3):  # one Xavier bound each, not that of the fused matrix
                nn.init.xavier_uniform_(part)
            nn.init.xavier_uniform_(block.attn.proj.weight)
            for bias in filter(lambda b: b is not None, (block.attn.qkv.bias, block.attn.proj.bias)):
                nn.init.zeros_(bias)
            for linear in (block.mlp.fc1, block.mlp.fc2):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.normal_(linear.bias, std=1e-6)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, height, width) -> normalised tokens (B, P + N, D)."""
        x = self.patch_embed(x)  # (B, N, D)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + N, D)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        x = self.pos_drop(x)
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing and not torch.jit.is_scripting() else self.blocks(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens -> logits (B, num_outputs), or pooled features (B, D) with `pre_logits`."""
        x = x[:, 0] if self.pool == "cls" else x.mean(dim=1)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh head of another width, zero as at the start; 0 leaves it out."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers from input to output for layer-wise learning rates, in timm's form."""
        return {"stem": r"^cls_token|^pos_embed|^patch_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resize learned positions (1, P + N, D) saved at another image size: bicubic, antialiased, the class token's kept apart (timm)."""
        saved = state.get("pos_embed")
        if isinstance(self.pos_embed, nn.Parameter) and saved is not None and saved.shape[1] != self.pos_embed.shape[1]:
            resized = resample_abs_pos_embed(saved, self.patch_embed.grid_size, num_prefix_tokens=self.num_prefix_tokens)
            state = {**state, "pos_embed": resized}
        return state


def _check_choice(argument: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{argument} is one of {', '.join(choices)}, not {value!r}")


for _name, _patch, _dim, _depth, _heads, _gmacs, _timm in (
    # name     patch  width depth heads  GMACs  the same in timm
    ("vit_ti16", 16,   192,  12,   3,    1.25,  "vit_tiny_patch16_224"),
    ("vit_s16",  16,   384,  12,   6,    4.60,  "vit_small_patch16_224"),
    ("vit_b16",  16,   768,  12,  12,   17.56,  "vit_base_patch16_224"),
    ("vit_l16",  16,  1024,  24,  16,   61.55,  "vit_large_patch16_224"),
    ("vit_s32",  32,   384,  12,   6,    1.14,  "vit_small_patch32_224"),
    ("vit_b32",  32,   768,  12,  12,    4.41,  "vit_base_patch32_224"),
    ("vit_l32",  32,  1024,  24,  16,   15.38,  "vit_large_patch32_224"),
    ("vit_h14",  14,  1280,  32,  16,  167.30,  "vit_huge_patch14_224"),
):
    register(_name, ViT, gmacs=_gmacs, timm=_timm, mean=HALF, std=HALF,
             patch_size=_patch, embed_dim=_dim, depth=_depth, num_heads=_heads)
register("vit_nano4", ViT, gmacs=0.08, image_size=32, crop_pct=1.0, mean=HALF, std=HALF, patch_size=4, embed_dim=128, depth=6, num_heads=4)
