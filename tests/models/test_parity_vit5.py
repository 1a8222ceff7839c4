"""ViT-5 against numbers from the authors' code (wangf3014/ViT-5 at b7b0796, models_vit5.py and rope.py), run on CPU.

The numbers are those of `vit_models(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2,
num_classes=5, qkv_bias=False, num_registers=4, flash=False, norm_layer=RMSNorm, rope=True, reg_theta=100,
qk_norm=True)` with the weights and pictures below; the loss is the sum of squared logits. At full size with the same
random weights the largest difference of logits was 1.3e-6 (vit5_small at 224 px) and 1.4e-6 (vit5_base at 384 px),
logits of unit scale.
"""

import math

import pytest
import torch

import models
from models.vit5 import Rotary, axial_angles

LOGITS = [
    [-1.844575047492981, 0.05693367123603821, 0.6048727035522461, -1.0434679985046387, -0.36005473136901855],
    [-1.8502408266067505, 0.10953328013420105, 0.6030869483947754, -1.0679681301116943, -0.29946908354759216],
]
GRADIENT_NORMS = {
    "cls_token": 7.8874,
    "reg_token": 0.712756,
    "pos_embed": 0.907092,
    "patch_embed.proj.weight": 6.85015,
    "patch_embed.proj.bias": 1.791502,
    "blocks.0.gamma_1": 4.149277,
    "blocks.0.gamma_2": 6.11605,
    "blocks.0.norm1.weight": 1.21279,
    "blocks.0.attn.qkv.weight": 5.894419,
    "blocks.0.attn.proj.weight": 4.373489,
    "blocks.0.attn.proj.bias": 1.612632,
    "blocks.0.attn.q_norm.weight": 0.425116,
    "blocks.0.attn.k_norm.weight": 0.533832,
    "blocks.0.norm2.weight": 1.299476,
    "blocks.0.mlp.fc1.weight": 7.34301,
    "blocks.0.mlp.fc1.bias": 1.257653,
    "blocks.0.mlp.fc2.weight": 11.922108,
    "blocks.0.mlp.fc2.bias": 1.886772,
    "blocks.1.gamma_1": 2.095062,
    "blocks.1.gamma_2": 3.263721,
    "blocks.1.norm1.weight": 0.925721,
    "blocks.1.attn.qkv.weight": 5.462688,
    "blocks.1.attn.proj.weight": 2.620265,
    "blocks.1.attn.proj.bias": 1.806737,
    "blocks.1.attn.q_norm.weight": 0.513597,
    "blocks.1.attn.k_norm.weight": 0.547273,
    "blocks.1.norm2.weight": 1.032703,
    "blocks.1.mlp.fc1.weight": 6.718452,
    "blocks.1.mlp.fc1.bias": 1.160616,
    "blocks.1.mlp.fc2.weight": 7.052718,
    "blocks.1.mlp.fc2.bias": 1.674614,
    "norm.weight": 7.779093,
    "head.weight": 54.154472,
    "head.bias": 8.951352,
}


def weights(shapes):
    """Weights by formula under the authors' names, the same on every version of torch."""
    out = {}
    for i, (key, shape) in enumerate(sorted(shapes.items())):
        n = torch.arange(shape.numel(), dtype=torch.float64)
        scale = 0.3 if len(shape) == 1 else 1.4 / (shape[1:].numel() ** 0.5 if len(shape) != 3 else 1.0)
        out[key] = (
            (torch.sin(n * 0.7 + n * n * 0.013 + i) * scale + (1.0 if "norm" in key else 0.0)).reshape(shape).float()
        )
    return out


def pictures():
    n = torch.arange(2 * 3 * 32 * 32, dtype=torch.float64)
    return torch.cos(n * 0.37 + n * n * 0.0021).reshape(2, 3, 32, 32).float()


def test_equals_the_authors_code():
    model = models.create("vit5_s16", 5, 32, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2.0)
    official = {
        key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): p for key, p in model.named_parameters()
    }
    file = weights({key: p.shape for key, p in official.items()})
    file |= {
        f"blocks.{i}.attn.{rope}.freqs": torch.rand(4) for i in range(2) for rope in ("rope", "rope_reg")
    }  # their files hold these
    model.load_state_dict(model.adapt_state_dict(file), strict=True)
    logits = model(pictures())
    assert (logits - torch.tensor(LOGITS)).abs().max() <= 1e-5
    logits.square().sum().backward()
    assert {key: p.grad.norm().item() for key, p in official.items()} == pytest.approx(GRADIENT_NORMS, rel=1e-4)


def test_rotary_attention_depends_on_distance_alone():
    angles = axial_angles((5, 6), 16, 10_000.0)
    rotary, q, k = Rotary(angles.double()), *torch.randn(2, 16, dtype=torch.float64)
    scores = rotary(q.expand(1, 1, 30, 16)) @ rotary(k.expand(1, 1, 30, 16)).transpose(-1, -2)
    scores = scores.reshape(5, 6, 5, 6)  # (row, column) of q, then of k
    assert torch.allclose(scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1]) and not torch.allclose(
        scores[0, 0, 1, 0], scores[0, 0, 0, 1]
    )
    assert (
        angles[6, 0] == 1 and angles[6, 8] == 0 and angles[1, 8] == 1
    )  # a step down turns the first half, a step aside the second
    assert math.isclose(angles[6, 2], 10_000**-0.25, rel_tol=1e-6)
