"""Initialisation as published, tensor by tensor: parity tests copy weights and cannot see it."""

import math

import pytest
import torch

import models

UNTRUNCATED = 4.0  # |w| beyond this many sigma is rare but there in a large normal tensor


def moments(tensor):
    return tensor.mean().item(), tensor.std().item(), tensor.abs().max().item()


def check_normal(key, tensor, std):
    mean, measured, largest = moments(tensor)
    slack = 5 / math.sqrt(2 * tensor.numel())
    assert abs(mean) < 5 * std / math.sqrt(tensor.numel()) and abs(measured / std - 1) < slack, (
        key,
        mean,
        measured,
        std,
    )
    if tensor.numel() > 50_000:
        assert largest > 3.5 * std, f"{key} is cut at {largest / std:.2f} sigma"


def check_uniform(key, tensor, bound):
    mean, measured, largest = moments(tensor)
    assert largest <= bound and largest > 0.99 * bound and abs(measured / (bound / math.sqrt(3)) - 1) < 0.03, (
        key,
        largest,
        bound,
    )
    assert abs(mean) < 5 * bound / math.sqrt(3 * tensor.numel()), key


def lecun_bound(fan_in):
    return 2 * math.sqrt(1 / fan_in) / 0.87962566103423978


@pytest.mark.parametrize("name, args", [("vit_s16", {}), ("simple_vit_s16", {}), ("vit_s16", {"head": "mlp_tanh"})])
def test_big_vision(name, args):
    torch.manual_seed(1)
    model = models.create(name, depth=1, **args)
    d, seen = 384, 0
    for key, p in model.named_parameters():
        p, leaf, seen = p.detach(), key.split(".", 2)[-1], seen + 1
        if key in ("patch_embed.proj.weight", "pre_logits.fc.weight"):
            fan_in = p[0].numel()
            assert p.abs().max() <= lecun_bound(fan_in) and abs(p.std().item() * math.sqrt(fan_in) - 1) < 0.01, key
        elif key == "pos_embed":
            check_normal(key, p, 1 / math.sqrt(d))
        elif leaf == "attn.qkv.weight":
            for part in p.chunk(3):
                check_uniform(key, part, math.sqrt(6 / (2 * d)))
        elif leaf == "attn.proj.weight":
            check_uniform(key, p, math.sqrt(6 / (2 * d)))
        elif leaf in ("mlp.fc1.weight", "mlp.fc2.weight"):
            check_uniform(key, p, math.sqrt(6 / (5 * d)))
        elif leaf in ("mlp.fc1.bias", "mlp.fc2.bias"):
            check_normal(key, p, 1e-6)
        elif "norm" in key and key.endswith("weight"):
            assert (p == 1).all(), key
        else:  # class token, head, every other bias
            assert not p.any(), key
    assert seen == len(model.state_dict())


@pytest.mark.parametrize("name", ["deit_s16", "deit_s16_distilled", "deit3_s16", "vit5_s16"])
def test_deit_lineage(name):
    torch.manual_seed(2)
    model, d = models.create(name, depth=1), 384
    for key, p in model.named_parameters():
        p = p.detach()
        if key.startswith("patch_embed.proj"):  # PyTorch's: uniform of bound 1/sqrt(fan_in), weight and bias
            bound = 1 / math.sqrt(3 * 16 * 16)
            assert (
                p.abs().max() <= bound
                and p.abs().max() > 0.98 * bound
                and abs(p.std().item() / bound - 1 / math.sqrt(3)) < 0.05
            ), key
        elif "ls" in key and key.endswith("gamma"):
            assert (p == 1e-4).all(), key
        elif "norm" in key and key.endswith("weight"):
            assert (p == 1).all(), key
        elif p.ndim >= 2:
            check_normal(key, p, 0.02)
        else:
            assert not p.any(), key
    model.reset_classifier(100)
    heads = model.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):
        check_normal("reset head", head.weight.detach(), 0.02)
        assert head.weight.shape == (100, d) and not head.bias.any()


def test_reset_head_of_vit_is_zero_and_on_the_models_device_and_type():
    model = models.create("vit_s16", depth=1).bfloat16()
    model.reset_classifier(10)
    assert model.head.weight.dtype == torch.bfloat16 and not model.head.weight.any() and not model.head.bias.any()
    with torch.device("meta"):
        model = models.create("vit_s16", depth=1)
    model.reset_classifier(10)
    assert model.head.weight.is_meta
