"""The memory that a training step keeps, counted on `meta`, against what autograd keeps and against the sum by hand."""

import pytest
import torch
from small_networks import SMALL
from torch.autograd.graph import saved_tensors_hooks

import models
from lightning_modules.optimization.freeze import freeze, hold_frozen
from models import cost

NAMES = ["vit_s16", "swin_t", "convnext_t", "timm/resnet18", "timm/vit_tiny_patch16_224", "timm/convnext_atto"]
WIDE = [("vit_b16", 768, 12), ("vit_s16", 384, 12), ("vit_l16", 1024, 24)]


def build(name: str, device: str, side: int = 64) -> torch.nn.Module:
    size = None if name.startswith("timm/") and "vit" not in name else side
    with torch.device(device):
        return models.create(name, 10, size, **SMALL.get(name, {})).train()


def kept(network: torch.nn.Module, side: int = 64) -> float:
    """Bytes of one image that autograd keeps on this machine, weights left out."""
    weights = {each.untyped_storage().data_ptr() for each in network.parameters()}
    found, held = {}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            found[place] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        network(torch.randn(8, 3, side, side))
    return sum(found.values()) / 8


@pytest.mark.parametrize("name", NAMES)
def test_what_is_counted_is_what_autograd_keeps(name):
    fused = name.startswith("timm/")  # ours writes attention out on CPU
    counted = cost.activation_bytes(build(name, "meta"), (64, 64), fused=fused)
    assert counted == pytest.approx(kept(build(name, "cpu")), rel=0.05)


@pytest.mark.parametrize("name, width, depth", WIDE)
def test_under_autocast_a_plain_vit_keeps_36_bytes_a_value(name, width, depth):
    """LayerNorm's input in float32 twice (8); in half precision its output twice, q, k, v and the attention's output
    (12), the hidden layer before and after its activation (16)."""
    with torch.device("meta"):
        network = models.create(name).train()
    counted = cost.activation_bytes(network, (224, 224), half=torch.bfloat16)
    assert counted == pytest.approx(36 * width * 197 * depth, rel=0.05)


@pytest.mark.parametrize("what, share", [("backbone", 0.03), ("0.5", 0.55)])
def test_frozen_parts_keep_nothing(what, share):
    network = build("vit_s16", "meta")
    whole = cost.activation_bytes(network, (64, 64))
    freeze(network, what)
    hold_frozen(network)
    assert 0 < cost.activation_bytes(network, (64, 64)) <= share * whole
