"""Composed heads: a hidden layer, columns and a second classifier, alone and together, on every family of ours and
timm's."""

import copy
import io
import pickle
from functools import partial

import pytest
import timm
import torch
from conftest import result_of, weights_of
from small_networks import NAMES, SIZE, SMALL
from small_networks import make as small
from small_runs import TINY
from torch import nn

import models
from lightning_modules.optimization.freeze import freeze
from lightning_modules.optimization.optimizers import optimizer
from models import cost
from models.heads import compose_head, fresh_like
from models.pretrained import head_keys, initialise

with_dist_head = partial(compose_head, dist=True)

TIMM = [
    "timm/test_vit",
    "timm/test_convnext",
    "timm/test_resnet",
    "timm/test_efficientnet",
    "timm/test_byobnet",
    "timm/mobilenetv3_small_050",
    "timm/regnety_002",
    "timm/test_convnext2",
]


def make(name, num_outputs=5):
    torch.manual_seed(0)
    model = models.create(name, num_outputs, 64, **SMALL.get(name, {}))
    with torch.no_grad():  # heads that start at zero would hide mistakes
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


@pytest.fixture(params=[*SMALL, *TIMM])
def pair(request):
    """A network, and the same with a second head."""
    plain = make(request.param)
    return plain, with_dist_head(copy.deepcopy(plain))


def test_two_outputs_in_distilled_training_and_their_mean_else(pair):
    plain, twin = pair
    x = torch.randn(2, 3, 64, 64)
    plain.eval(), twin.eval()
    pooled = plain.forward_head(plain.forward_features(x), pre_logits=True)
    second = pooled @ twin.head_dist.weight.T + (0 if twin.head_dist.bias is None else twin.head_dist.bias)
    torch.testing.assert_close(twin(x), (plain(x) + second) / 2)
    torch.testing.assert_close(twin.forward_head(twin.forward_features(x), pre_logits=True), pooled)
    twin.train()
    for module in twin.modules():  # batch norm and dropout as in evaluation
        if module is not twin:
            module.training = False
    first, other = twin(x)
    torch.testing.assert_close(first, plain(x))
    torch.testing.assert_close(other, second)
    twin.set_distilled_training(False)
    torch.testing.assert_close(twin(x), (first + other) / 2)


def test_names_are_the_networks_own_and_head_dist(pair):
    plain, twin = pair
    added = [key for key in twin.state_dict() if key not in plain.state_dict()]
    assert added and all(key.startswith("head_dist.") for key in added)
    assert head_keys(twin) == head_keys(plain) | set(added)
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in plain.state_dict().items())
    assert isinstance(twin, type(plain)) and with_dist_head(twin) is twin


@pytest.mark.parametrize("distilled", [True, False])
def test_every_parameter_gets_a_gradient(pair, distilled):
    _, twin = pair
    twin.train().set_distilled_training(distilled)
    output = twin(torch.randn(2, 3, 64, 64))
    loss = output[0].square().mean() + output[1].pow(4).mean() if distilled else output.square().mean()
    loss.backward()
    assert not [name for name, parameter in twin.named_parameters() if parameter.grad is None]


def test_the_second_head_is_another_draw_of_the_same_start(pair):
    plain, twin = pair
    first = plain.get_classifier()
    for name, parameter in twin.head_dist.named_parameters():
        start = first.get_parameter(name)
        assert not torch.equal(parameter, start)
        assert torch.equal(parameter.flatten().sort().values, start.flatten().sort().values)


@pytest.mark.parametrize("name", ["vit_s16", "swin_t", "timm/test_convnext"])
def test_it_survives_copies_files_and_other_widths(name):
    twin = with_dist_head(make(name)).eval()
    x = torch.randn(2, 3, 64, 64)
    copied = copy.deepcopy(twin)
    with torch.no_grad():
        copied.head_dist.weight.zero_()
    assert not torch.equal(copied(x), twin(x))
    file = io.BytesIO()
    torch.save(twin.state_dict(), file)
    file.seek(0)
    back = with_dist_head(models.create(name, 5, 64, **SMALL.get(name, {}))).eval()
    back.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(back(x), twin(x))
    twin.reset_classifier(7)
    assert twin(x).shape == (2, 7) and [len(output) for output in twin.train()(x)] == [2, 2]


def test_published_weights_without_the_head_start_it_fresh(tmp_path):
    torch.save(make("swin_t").state_dict(), tmp_path / "w.pth")
    twin = with_dist_head(make("swin_t"))
    assert "missing: 2 (head_dist.weight, head_dist.bias)" in initialise(twin, str(tmp_path / "w.pth"), name="swin_t")


def test_key_maps_of_timm_and_of_ours_still_apply(tmp_path):
    official = {f"downsample_layers.0.0.{key}": value for key, value in make("convnext_t").stem[0].state_dict().items()}
    assert set(with_dist_head(make("convnext_t")).adapt_state_dict(official)) == {"stem.0.weight", "stem.0.bias"}
    plain = timm.create_model("swin_tiny_patch4_window7_224", num_classes=2, img_size=64)
    state = {**plain.state_dict(), "layers.0.blocks.0.attn.relative_position_index": torch.zeros(1)}
    torch.save(state, tmp_path / "w.pth")
    assert "unexpected" not in initialise(
        with_dist_head(plain), str(tmp_path / "w.pth"), name="timm/swin_tiny_patch4_window7_224"
    )


@pytest.mark.parametrize("name", ["deit_s16_distilled", "timm/deit_tiny_distilled_patch16_224"])
def test_a_network_with_two_heads_keeps_them(name):
    model = models.create(name, 3, 32, **({"embed_dim": 32, "depth": 1, "num_heads": 2} if "timm" not in name else {}))
    kind, keys = type(model), list(model.state_dict())
    assert with_dist_head(model) is model and type(model) is kind and list(model.state_dict()) == keys


def test_where_there_is_no_linear_classifier():
    with pytest.raises(ValueError, match="ViT has a classifier of type Identity"):
        with_dist_head(models.create("vit_s16", 0, 64, **SMALL["vit_s16"]))
    with pytest.raises(ValueError, match="Sequential has no classifier"):
        with_dist_head(nn.Sequential())


def test_it_builds_without_memory_and_compiles_whole():
    with torch.device("meta"):
        assert with_dist_head(models.create("convnext_b")).head_dist.weight.is_meta
        assert fresh_like(nn.Linear(2, 2)).weight.is_meta
    twin, x = with_dist_head(make("vit_s16")), torch.randn(2, 3, 64, 64)
    for compiled, plain in zip(torch.compile(twin, fullgraph=True, backend="eager")(x), twin(x)):
        torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize("columns", [0, 2])
@pytest.mark.parametrize("hidden", [None, 8])
@pytest.mark.parametrize("dist", [False, True])
@pytest.mark.parametrize("name", ["vit_s16", "timm/resnet18"])
def test_every_combination_pickles_copies_and_starts_another_width(name, dist, hidden, columns):
    words = {"head_hidden": hidden, "head_dropout": 0.1} if hidden else {}
    model = small(name, columns=columns, dist_head=dist, **words).eval()
    given = (torch.randn(2, 3, 64, 64), *([torch.randn(2, columns)] if columns else []))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)  # the whole module, as `torch.save(model)` and spawned ranks have it
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), saved):
        assert type(other) is type(model) and torch.equal(other(*given), model(*given))
        with torch.no_grad():
            next(iter(other.parameters())).fill_(7)
    assert not (next(iter(model.parameters())) == 7).any()  # a copy shares no weight
    place = "fc" if "timm" in name else "head"
    layers = [f"{place}.{layer}" for layer in ("fc1", "fc2")] if hidden else [place]
    layers += [layer.replace(place, "head_dist", 1) for layer in layers] if dist else []
    heads = {f"{layer}.{kind}" for layer in layers + ["column_mlp.0"] * bool(columns) for kind in ("weight", "bias")}
    assert head_keys(model) == heads
    model.reset_classifier(7)
    assert head_keys(model) == heads and model(*given).shape == (2, 7)
    assert isinstance(model.train()(*given), tuple) == dist
    with torch.device("meta"):
        meta = small(name, columns=columns, dist_head=dist, **words)
    assert all(parameter.is_meta for parameter in meta.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_it_stands_in_the_classifiers_place(name):
    plain, model = small(name).eval(), small(name, head_hidden=16).eval()
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
    again = small(name, head_hidden=16).eval()
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
    model = small("vit_s16", head_hidden=64, head_dropout=0.5)
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
        and small("vit_s16", 0, head_hidden=8)(torch.zeros(1, 3, 64, 64)).shape[1] == 32
    )


@pytest.mark.parametrize(
    "given, says",
    [
        ({"head_hidden": 0}, "head_hidden 0: must be"),
        ({"head_hidden": "x"}, "head_hidden x: must be"),
        ({"head_dropout": 0.1}, "is of a head with"),
        ({"head_hidden": 8, "head_dropout": 1}, "head_dropout 1: must be"),
    ],
)
def test_what_cannot_be(given, says):
    with pytest.raises(ValueError, match=says):
        small("vit_s16", **given)
    with pytest.raises(ValueError, match="a classifier of type tuple"):
        small("deit_s16_distilled", head_hidden=8)


def test_weights_with_another_head(tmp_path):
    plain, model = small("vit_s16", 9), small("vit_s16", head_hidden=16)
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    fresh = copy.deepcopy(model.get_classifier())
    line = initialise(model, str(tmp_path / "plain.pth"), name="vit_s16")
    assert "missing: 4 (head.fc1" in line and "unexpected: 2 (head.weight, head.bias)" in line
    assert torch.equal(model.blocks[0].attn.qkv.weight, plain.blocks[0].attn.qkv.weight)
    assert all(
        torch.equal(ours, before) for ours, before in zip(model.get_classifier().parameters(), fresh.parameters())
    )
    torch.save(small("vit_s16", 9, head_hidden=16).state_dict(), tmp_path / "nine.pth")
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
