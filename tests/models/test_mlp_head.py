"""The head of two layers: on every family of ours and timm's, in its classifier's place, with all that heads can do
here."""

import copy

import pytest
import torch
from conftest import result_of, weights_of
from small_networks import NAMES, SIZE, make
from small_runs import TINY

import models
from lightning_modules.optimization.freeze import freeze
from lightning_modules.optimization.optimizers import optimizer
from models import cost
from models.pretrained import head_keys, initialise


@pytest.mark.parametrize("name", NAMES)
def test_it_stands_in_the_classifiers_place(name):
    plain, model = make(name).eval(), make(name, head_hidden=16).eval()
    place = next(key for key, module in plain.named_modules() if module is plain.get_classifier())
    own, theirs = model.state_dict(), plain.state_dict()
    heads = {f"{place}.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")}
    assert own.keys() == (theirs.keys() - {f"{place}.weight", f"{place}.bias"}) | heads and head_keys(model) == heads
    x, head = torch.randn(2, 3, *[SIZE.get(name, 64)] * 2), model.get_classifier()
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    assert features.shape == (2, model.head_hidden_size) and model(x).shape == (2, 5)
    expected = (
        torch.nn.functional.gelu(features @ head.fc1.weight.T + head.fc1.bias) @ head.fc2.weight.T + head.fc2.bias
    )
    torch.testing.assert_close(model(x), expected)
    again = make(name, head_hidden=16).eval()
    for value in again.state_dict().values():
        value.zero_()
    again.load_state_dict(own)
    assert torch.equal(copy.deepcopy(again)(x), model(x))
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and head_keys(model) == heads and model.get_classifier().fc1.out_features == 16
    groups = optimizer(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5).param_groups
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert {scales[id(parameter)] for parameter in model.get_classifier().parameters()} == {1.0} and min(
        scales.values()
    ) < 1
    freeze(model, "backbone")
    assert {key for key, parameter in model.named_parameters() if parameter.requires_grad} == heads


def test_dropout_and_first_values():
    model = make("vit_s16", head_hidden=64, head_dropout=0.5)
    head = model.get_classifier()
    assert head.drop.p == 0.5 and head.fc1.bias.abs().max() == 0 and 0.015 < head.fc1.weight.std() < 0.025
    x, head = torch.randn(4, head.fc1.in_features), head.train()
    torch.manual_seed(1)
    found = head(30 * x)
    torch.manual_seed(1)
    torch.testing.assert_close(
        found, head.fc2(torch.nn.functional.dropout(torch.nn.functional.gelu(head.fc1(30 * x)), 0.5))
    )
    with torch.device("meta"):
        meta = models.create("swin_t", 1, head_hidden=128)
    assert (
        meta.head.fc.fc1.weight.is_meta
        and cost.parameters(meta) - cost.parameters(models.create("swin_t", 1)) == 768 * 128 + 128 + 129 - 769
    )
    assert (
        "head_hidden" in models.keywords("vit_s16")
        and make("vit_s16", 0, head_hidden=8)(torch.zeros(1, 3, 64, 64)).shape[1] == 32
    )


@pytest.mark.parametrize(
    "given, says",
    [
        ({"head_hidden": 0}, "head_hidden 0: must be"),
        ({"head_hidden": "x"}, "head_hidden x: must be"),
        ({"head_dropout": 0.1}, "is of a head with"),
        ({"head_hidden": 8, "head_dropout": 1}, "head_dropout 1: must be"),
        ({"head_hidden": 8, "dist_head": True}, "give one of them"),
    ],
)
def test_what_cannot_be(given, says):
    with pytest.raises(ValueError, match=says):
        make("vit_s16", **given)
    with pytest.raises(ValueError, match="a classifier of type tuple"):
        make("deit_s16_distilled", head_hidden=8)


def test_weights_with_another_head(tmp_path):
    plain, model = make("vit_s16", 9), make("vit_s16", head_hidden=16)
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    fresh = copy.deepcopy(model.get_classifier())
    line = initialise(model, str(tmp_path / "plain.pth"), name="vit_s16")
    assert "missing: 4 (head.fc1" in line and "unexpected: 2 (head.weight, head.bias)" in line
    assert torch.equal(model.blocks[0].attn.qkv.weight, plain.blocks[0].attn.qkv.weight)
    assert all(
        torch.equal(ours, before) for ours, before in zip(model.get_classifier().parameters(), fresh.parameters())
    )
    torch.save(make("vit_s16", 9, head_hidden=16).state_dict(), tmp_path / "nine.pth")
    with pytest.raises(ValueError, match="--init_head reset"):
        initialise(model, str(tmp_path / "nine.pth"), name="vit_s16")
    assert "a fresh one of 5 starts" in initialise(model, str(tmp_path / "nine.pth"), name="vit_s16", reset_head=True)


def test_from_the_command_line(pics, launch):
    line = f"{TINY} --model_args.head_hidden 12 --model_args.head_dropout 0.2 --epochs 2 --ema_decay 0.9"
    for name, words in (
        ("one", ""),
        ("two", "--model_args.head_hidden 12 --init runs/one --freeze backbone --layer_decay 0.7"),
    ):
        ended = launch(f"{line} {words} --name {name}")
        assert ended.code == 0, ended.out
    weights = weights_of(pics / "runs" / "one" / "checkpoints" / "last.ckpt")
    assert weights["model.head.fc1.weight"].shape == (12, 32)
    network, spec = models.load(pics / "runs" / "two")
    assert network(torch.zeros(1, 3, 16, 16)).shape == (1, 3)
    scored = launch("--eval_only --init runs/one --logger csv --workers 0 --accelerator cpu --name scored")
    assert (
        scored.code == 0
        and result_of(pics / "runs" / "scored")["test/acc1"] == result_of(pics / "runs" / "one")["test/acc1"]
    ), scored.out
