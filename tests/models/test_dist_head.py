"""The second head: on every family of ours and timm's, two outputs in distilled training, their mean else, and no
parameter left out."""

import copy
import io

import pytest
import timm
import torch
from small_networks import SMALL
from torch import nn

import models
from models.dist_head import fresh_like, with_dist_head
from models.pretrained import head_keys, initialise

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
