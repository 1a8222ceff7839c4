"""What timm asks of every model of its own (its tests/test_models.py), asked of every registered model of ours.

Held here: forward and its equality under gradient checkpointing, backward with every gradient present, default cfgs
(names of the head and the first convolution, feature widths, pre_logits, reset_classifier), forward_intermediates where
a network has it. Not asked: pooling switched off through `global_pool=''` (our heads always pool), TorchScript and FX
(einops and sizes read in forward rule them out where there is attention; the compile tests stand for them). Structure
runs on `meta` for every name; numbers run for the cheapest variant of a family, the rest is slow.
"""

import math

import pytest
import torch
from timm.models import FeatureInfo
from torch import Tensor

import models


def cheapest_first() -> list:
    """Every name; all but the cheapest of each network class are marked slow."""
    first = {}
    for name, entry in sorted(models.REGISTRY.items(), key=lambda item: item[1].gmacs):
        first.setdefault(entry.build, name)
    return [name if name in first.values() else pytest.param(name, marks=pytest.mark.slow) for name in models.names()]


def pictures(name: str, batch: int, device: str = "cpu") -> Tensor:
    return torch.randn(batch, 3, *models.preprocessing(name)["image_size"], device=device)


def joined(y: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A distilled network answers a tuple in training."""
    return torch.cat(y) if isinstance(y, tuple) else y


def tuple_of(name: str | tuple[str, ...]) -> tuple[str, ...]:
    return (name,) if isinstance(name, str) else tuple(name)


@pytest.mark.parametrize("name", cheapest_first())
def test_forward_and_gradient_checkpointing(name):
    model, x = models.create(name).eval(), pictures(name, 1)
    y = model(x)
    assert y.shape == (1, 1000) and y.isfinite().all()
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", cheapest_first())
def test_backward(name):
    model = models.create(name, 42).train()
    y = joined(model(pictures(name, 2)))
    y.mean().backward()
    assert y.shape[-1] == 42 and y.isfinite().all()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", models.names())
def test_default_cfg(name):
    with torch.device("meta"):
        model = models.create(name).eval()
    keys, x = model.state_dict().keys(), pictures(name, 2, "meta")
    assert model.num_classes == 1000 and model.num_features > 0 and model.head_hidden_size > 0
    for part in (*tuple_of(model.default_cfg["classifier"]), *tuple_of(model.default_cfg["first_conv"])):
        assert f"{part}.weight" in keys
    features = model.forward_features(x)
    if isinstance(features, Tensor):
        axis = -1 if features.ndim == 3 or getattr(model, "output_fmt", "NCHW") == "NHWC" else 1
        assert features.shape[axis] == model.num_features
    pooled = model.forward_head(features, pre_logits=True)
    assert joined(pooled).shape[1] == model.head_hidden_size
    with torch.device("meta"):
        model.reset_classifier(0)
        assert model.num_classes == 0 and model(x).shape == (2, model.head_hidden_size)
        model.reset_classifier(7)
        assert model.num_classes == 7 and model(x).shape == (2, 7)
        assert models.create(name, 0).eval()(x).shape == (2, model.num_features)


@pytest.mark.parametrize(
    "name", [n for n in models.names() if hasattr(models.REGISTRY[n].build, "forward_intermediates")]
)
def test_forward_intermediates(name):
    with torch.device("meta"):
        model = models.create(name).eval()
    info, x = FeatureInfo(model.feature_info, len(model.feature_info)), pictures(name, 1, "meta")
    final, maps = model.forward_intermediates(x)
    assert final.shape == model.forward_features(x).shape and len(maps) == len(info.channels())
    for width, reduction, found in zip(info.channels(), info.reduction(), maps, strict=True):
        sides = [math.ceil(side / reduction) for side in x.shape[-2:]]
        assert found.shape[:2] == (1, width) and all(
            abs(a - b) <= 1 for a, b in zip(found.shape[2:], sides, strict=True)
        )
    assert len(model.forward_intermediates(x, indices=2, intermediates_only=True)) == 2
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("name", ["swin_t", "convnext_t", "convnext_step_3"])
def test_intermediate_values(name):
    model, x = models.create(name, image_size=64).eval(), torch.randn(1, 3, 64, 64)
    final, maps = model.forward_intermediates(x, norm=True)
    assert torch.equal(final, model.forward_features(x))
    last = maps[-1].permute(0, 2, 3, 1) if model.output_fmt == "NHWC" else maps[-1]
    assert torch.equal(last, final)
    _, early = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
    assert all(torch.equal(a, b) for a, b in zip(early, maps[:2], strict=True))
