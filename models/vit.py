"""Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929; "How to train your ViT?", arXiv 2106.10270).

Module names are timm's (vision_transformer.py), initialisation is big_vision's (models/vit.py), so that timm's weights
load as they are and fresh weights start as the paper's did. Legend: B images, C channels, N patches, P prefix tokens
(class, distillation), D width.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from einops import rearrange
from timm.layers import resample_abs_pos_embed
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from models.layers import (
    Block,
    NormedPatchEmbed,
    PatchEmbed,
    drop_path_rates,
    grid_of,
    lecun_normal_,
    saved_grid,
    sincos2d,
)
from models.registry import HALF, register

GELU: dict[str, Callable[[], nn.Module]] = {"erf": nn.GELU, "tanh": partial(nn.GELU, approximate="tanh")}


class PlainTransformer(nn.Module):
    """Base of all plain vision transformers: tokens, one trunk, one norm, one linear head, and timm's informal
    interface around them.

    A network sets the five modules and gives `embed`, `pool_tokens`, `init_head_`.
    """

    patch_embed: PatchEmbed
    pos_embed: Tensor | None
    blocks: nn.Sequential
    norm: nn.Module
    head: nn.Module

    first_conv = "patch_embed.proj"
    classifier: str | tuple[str, ...] = "head"
    prefix: tuple[str, ...] = ("cls_token",)  # learned tokens before the patches, in order
    prefix_has_pos = True  # whether learned positions begin with one for each of them

    def __init__(self, num_outputs: int, embed_dim: int):
        super().__init__()
        self.num_classes, self.grad_checkpointing = num_outputs, False
        self.num_features = self.embed_dim = self.head_hidden_size = embed_dim
        self.num_prefix_tokens = len(self.prefix)
        self.pos_embed = None

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, height, width) -> tokens with their positions (B, P + N, D)."""
        raise NotImplementedError

    def pool_tokens(self, x: Tensor) -> Tensor:
        """Tokens (B, P + N, D) -> features (B, D) that the classifier reads."""
        raise NotImplementedError

    def init_head_(self, head: nn.Linear) -> None:
        """Initialise a classifier."""
        raise NotImplementedError

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Width, stride and name of each block's map, in timm's form."""
        stride = self.patch_embed.proj.stride[0]
        return [
            {"num_chs": self.embed_dim, "reduction": stride, "module": f"blocks.{i}"} for i in range(len(self.blocks))
        ]

    def set_any_size(self) -> None:
        """Take images of other sizes too, as in training at a lower resolution: positions are resized to them in
        every forward pass."""
        self.patch_embed.any_size = True

    def positions(self, learned: Tensor, image: Tensor) -> Tensor:
        """Positions (1, P + N, D) for the patches of images (B, C, height, width); bicubic, antialiased (timm's
        resample_abs_pos_embed)."""
        grid = grid_of(image.shape[-2:], self.patch_embed.proj.kernel_size)
        if grid == self.patch_embed.grid_size:
            return learned
        lead = self.num_prefix_tokens if self.prefix_has_pos else 0
        return resample_abs_pos_embed(learned, grid, self.patch_embed.grid_size, num_prefix_tokens=lead)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, height, width) -> normalised tokens (B, P + N, D)."""
        x = self.embed(x)
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The patches' maps (B, D, H, W) behind the chosen blocks (all, the last n, or by number), alone or as (final
        tokens, maps); timm's signature. `norm` normalises every map; `stop_early` leaves out the blocks behind the last
        one chosen."""
        check_choice("output_fmt", output_fmt, ("NCHW",))
        chosen, last = feature_take_indices(len(self.blocks), indices)
        x, maps, (rows, _) = self.embed(x), [], self.patch_embed.grid_size
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = block(x)
            if i in chosen:
                tokens = (self.norm(x) if norm else x)[:, self.num_prefix_tokens :][:, : self.patch_embed.num_patches]
                maps.append(rearrange(tokens, "b (h w) d -> b d h w", h=rows))
        return maps if intermediates_only else (self.norm(x), maps)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Tokens -> logits (B, num_outputs), or pooled features (B, D) with `pre_logits`."""
        x = self.pool_tokens(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Any:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> Any:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh head of another width, initialised as at the start; 0 leaves it out."""
        self.num_classes, self.head = num_classes, self.make_head(num_classes)

    def make_head(self, num_outputs: int) -> nn.Module:
        """A fresh classifier on the device and of the type of the rest; the identity for 0 outputs."""
        if not num_outputs:
            return nn.Identity()
        weight = self.patch_embed.proj.weight
        head = nn.Linear(self.embed_dim, num_outputs, device=weight.device, dtype=weight.dtype)
        self.init_head_(head)
        return head

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token", "dist_token", "reg_token"} & {
            name for name, _ in self.named_parameters(recurse=False)
        }

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers from input to output for layer-wise learning rates, in timm's form."""
        return {
            "stem": r"^cls_token|^dist_token|^reg_token|^pos_embed|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def adapt_state_dict(self, state: dict[str, Tensor], saved: nn.Module | None = None) -> dict[str, Tensor]:
        """Fit weights saved at another image size or under the names of DeiT III's and ViT-5's authors (`gamma_1`,
        `gamma_2`).

        Positions are resized bicubically: antialiased as timm does, without for files with the authors' names, as their
        code does. (DeiT's code does without, too; its files have timm's names. From 224 to 384 pixels the two differ by
        under a tenth of a standard deviation of the positions, which fine-tuning adapts.)
        `saved` is the network that the weights are of, where it is known: its grid is theirs. Else the grid is guessed
        (`saved_grid`).
        """
        official = any(key.endswith(".gamma_1") for key in state)
        names = {key: key.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma") for key in state}
        state = {names[key]: value for key, value in state.items()}
        if isinstance(self.pos_embed, nn.Parameter) and "pos_embed" in state:
            tokens = sum(key in state for key in ("cls_token", "dist_token"))
            old = getattr(getattr(saved, "patch_embed", None), "grid_size", None)
            state["pos_embed"] = self._fit_positions(self.pos_embed, state["pos_embed"], tokens, old, not official)
        return state

    def _fit_positions(
        self, ours: Tensor, saved: Tensor, tokens: int, old: tuple[int, int] | None, antialias: bool
    ) -> Tensor:
        """Saved positions for 0 or `tokens` prefix tokens and the grid `old`, resized to ours; those of prefix tokens
        that the file lacks stay as they are.

        Without `old`, positions as many as ours are ours; of others, prefix tokens are taken to have positions in the
        file as they have here, else the other way. Raises ValueError when nothing fits the number of positions.
        """
        grid, count = self.patch_embed.grid_size, saved.shape[1]
        if saved.shape[2] != self.embed_dim or old is None and count == ours.shape[1]:
            return saved
        if old is None:
            prefix, old = saved_grid(count, grid, (tokens, 0) if self.prefix_has_pos else (0, tokens))
        else:
            prefix = count - old[0] * old[1]  # 0 or more: the positions are those of the network that says `old`
        patches = saved[:, prefix:]
        if old != grid:
            patches = resample_abs_pos_embed(patches, grid, old, num_prefix_tokens=0, antialias=antialias)
        wanted = ours.shape[1] - self.patch_embed.num_patches
        own = ours.detach()[:, min(prefix, wanted) : wanted].to(saved)
        return torch.cat([saved[:, : min(prefix, wanted)], own, patches], dim=1)


class ViT(PlainTransformer):
    """Patches, positions, pre-norm blocks, a linear head.

    Args:
        num_outputs: width of the head; 0 returns pooled features.
        image_size: side or (height, width); the patch must divide it, else ValueError.
        dim_head: width of a head, None for embed_dim / num_heads; qkv_bias, out_bias: biases of attention's two
            projections.
        pool: `cls` reads the class token, `mean` has none and averages the patches.
        pos: `learned` positions (with one for the class token), fixed `sincos2d`, or `none`.
        norm_pos: the last norm before pooling (`pre_pool`, as published) or after it (`post_pool`, timm's `fc_norm`).
        head: `linear`, or `mlp_tanh` with the paper's hidden layer between pooling and head (big_vision's rep_size);
            head_bias: its start.
        patch_norm: norms around the patch projection; layer_scale: start of LayerScale, None for none.
        dropout: after positions, attention's projection and both MLP layers; attn_dropout: on attention weights.
        drop_path: stochastic depth at the last block, rising linearly from 0.
    Raises ValueError for a word that is not among an option's choices.
    """

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
        dim_head: int | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        out_bias: bool = True,
        patch_norm: bool = False,
        layer_scale: float | None = None,
        gelu: str = "erf",
        norm_eps: float = 1e-6,
        pool: str = "cls",
        pos: str = "learned",
        norm_pos: str = "pre_pool",
        head: str = "linear",
        head_bias: float = 0.0,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        check_choice("pool", pool, ("cls", "mean"))
        check_choice("pos", pos, ("learned", "sincos2d", "none"))
        check_choice("norm_pos", norm_pos, ("pre_pool", "post_pool"))
        check_choice("head", head, ("linear", "mlp_tanh"))
        check_choice("gelu", gelu, tuple(GELU))
        if pool == "mean":
            self.prefix = ()
        super().__init__(num_outputs, embed_dim)
        self.pool, self.head_bias = pool, head_bias
        embed = partial(NormedPatchEmbed, norm_eps=norm_eps) if patch_norm else PatchEmbed
        self.patch_embed = embed(image_size, patch_size, in_chans, embed_dim)
        for token in self.prefix:
            self.register_parameter(token, nn.Parameter(torch.zeros(1, 1, embed_dim)))
        self._make_positions(pos)
        self.pos_drop = nn.Dropout(dropout)
        block = partial(
            Block,
            embed_dim,
            num_heads,
            dim_head=dim_head,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            layer_scale=layer_scale,
            act=GELU[gelu],
            norm_eps=norm_eps,
            dropout=dropout,
            attn_dropout=attn_dropout,
        )
        self.blocks = nn.Sequential(*(block(drop_path=rate) for rate in self.drop_path_rates(drop_path, depth)))
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps) if norm_pos == "pre_pool" else nn.Identity()
        self.fc_norm = nn.LayerNorm(embed_dim, eps=norm_eps) if norm_pos == "post_pool" else nn.Identity()
        self.pre_logits: nn.Module = nn.Identity()
        if head == "mlp_tanh":
            self.pre_logits = nn.Sequential(OrderedDict(fc=nn.Linear(embed_dim, embed_dim), act=nn.Tanh()))
        self.init_weights()
        self.head = self.make_head(num_outputs)

    def _make_positions(self, pos: str) -> None:
        lead = self.num_prefix_tokens if self.prefix_has_pos else 0
        if pos == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, lead + self.patch_embed.num_patches, self.embed_dim))
        elif pos == "sincos2d":
            fixed = sincos2d(self.patch_embed.grid_size, self.embed_dim)
            del self.pos_embed
            self.register_buffer("pos_embed", nn.functional.pad(fixed, (0, 0, lead, 0)), persistent=False)

    def drop_path_rates(self, rate: float, depth: int) -> list[float]:
        """Stochastic depth of each block."""
        return drop_path_rates(rate, depth)

    @torch.no_grad()
    def init_weights(self) -> None:
        """big_vision's: patches and the hidden head layer LeCun normal; q, k, v and every other matrix Xavier uniform;
        MLP biases N(0, 1e-6); positions N(0, 1/sqrt(D)); class token and head zero."""
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(cast(Tensor, self.patch_embed.proj.bias))
        if isinstance(self.pos_embed, nn.Parameter):
            nn.init.normal_(self.pos_embed, std=1 / math.sqrt(self.embed_dim))
        for block in cast(Iterable[Block], self.blocks):
            for part in block.attn.qkv.weight.chunk(3):  # one Xavier bound each, not that of the fused matrix
                nn.init.xavier_uniform_(part)
            nn.init.xavier_uniform_(block.attn.proj.weight)
            for bias in (block.attn.qkv.bias, block.attn.proj.bias):
                if bias is not None:
                    nn.init.zeros_(bias)
            for linear in (block.mlp.fc1, block.mlp.fc2):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.normal_(linear.bias, std=1e-6)
        if isinstance(self.pre_logits, nn.Sequential):
            fc = cast(nn.Linear, self.pre_logits.fc)
            lecun_normal_(fc.weight)
            nn.init.zeros_(fc.bias)

    def init_head_(self, head: nn.Linear) -> None:
        nn.init.zeros_(head.weight)
        nn.init.constant_(head.bias, self.head_bias)

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, height, width) -> tokens with their positions (B, P + N, D)."""
        pos, x = None if self.pos_embed is None else self.positions(self.pos_embed, x), self.patch_embed(x)  # (B, N, D)
        if pos is not None and not self.prefix_has_pos:
            x = x + pos
        if self.prefix:
            x = torch.cat(
                [*(getattr(self, token).expand(len(x), -1, -1) for token in self.prefix), x], dim=1
            )  # (B, P + N, D)
        if pos is not None and self.prefix_has_pos:
            x = x + pos
        return self.pos_drop(x)

    def pool_tokens(self, x: Tensor) -> Tensor:
        """Tokens (B, P + N, D) -> features (B, D) that the classifier reads."""
        x = x[:, 0] if self.pool == "cls" else x.mean(dim=1)
        return self.pre_logits(self.fc_norm(x))


def check_choice(argument: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError when an option's word is none of its choices."""
    if value not in choices:
        raise ValueError(f"{argument} is one of {', '.join(choices)}, not {value!r}")


for _name, _patch, _dim, _depth, _heads, _gmacs, _timm in (
    # name     patch  width depth heads  GMACs  the same in timm
    ("vit_ti16", 16, 192, 12, 3, 1.25, "vit_tiny_patch16_224"),
    ("vit_s16", 16, 384, 12, 6, 4.60, "vit_small_patch16_224"),
    ("vit_b16", 16, 768, 12, 12, 17.56, "vit_base_patch16_224"),
    ("vit_l16", 16, 1024, 24, 16, 61.55, "vit_large_patch16_224"),
    ("vit_s32", 32, 384, 12, 6, 1.14, "vit_small_patch32_224"),
    ("vit_b32", 32, 768, 12, 12, 4.41, "vit_base_patch32_224"),
    ("vit_l32", 32, 1024, 24, 16, 15.38, "vit_large_patch32_224"),
    ("vit_h14", 14, 1280, 32, 16, 167.30, "vit_huge_patch14_224"),
):
    register(
        _name,
        ViT,
        gmacs=_gmacs,
        timm=_timm,
        mean=HALF,
        std=HALF,
        patch_size=_patch,
        embed_dim=_dim,
        depth=_depth,
        num_heads=_heads,
    )
register(
    "vit_nano4",
    ViT,
    gmacs=0.08,
    image_size=32,
    crop_pct=1.0,
    mean=HALF,
    std=HALF,
    patch_size=4,
    embed_dim=128,
    depth=6,
    num_heads=4,
)
