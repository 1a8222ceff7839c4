"""Networks of every kind, small."""

import torch

import models

SMALL = {
    "vit_s16": {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8},
    "simple_vit_s16": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "vit5_s16": {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8},
    "deit3_s16": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "swin_t": {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4},
    "convnext_t": {"dims": (8, 16), "depths": (1, 1)},
    "convnext_step_0": {"width": 8, "depths": (1, 1, 1, 1)},
}
NAMES = [
    "vit_s16",
    "simple_vit_s16",
    "swin_t",
    "convnext_t",
    "vit5_s16",
    "deit_s16",
    "timm/resnet18",
    "timm/convnext_atto",
    "timm/vit_tiny_patch16_224",
    "timm/swin_tiny_patch4_window7_224",
    "timm/efficientnet_b0",
    "timm/regnety_002",
    "timm/beit_base_patch16_224",
]
SIZE = {"timm/beit_base_patch16_224": 32, "timm/vit_tiny_patch16_224": 32}


def make(name, num_outputs=5, **given):
    torch.manual_seed(0)
    small = SMALL.get(name, {})
    if name.startswith("timm/beit"):
        small = {"depth": 1}
    return models.create(name, num_outputs, SIZE.get(name, 64), **small, **given)
