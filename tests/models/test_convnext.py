"""ConvNeXt against timm and torchvision, and its ladder against ResNet-50 at the foot, ConvNeXt-T at the top, the
paper's table between."""

import math
import re

import pytest
import timm
import torch
import torchvision
from timm.layers import LayerNorm2d
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import Bottleneck, ResNet

import models
from models.convnext import rename_official
from models.convnext_ladder import STEPS, LadderBlock

PARAMETERS = {
    "convnext_t": 28_589_128,
    "convnext_s": 50_223_688,
    "convnext_b": 88_591_464,
    "convnext_l": 197_767_336,
    "convnext_xl": 350_196_968,
    "convnext_step_0": 25_557_032,
    "convnext_step_12": 28_589_128,
}
LADDER = [f"convnext_step_{i}" for i in range(13)]
PAPER_GMACS = [4.09, 4.53, 4.42, 2.35, 5.27, 4.64, 4.07, 4.15, 4.15, 4.15, 4.15, 4.15, 4.46]
SMALL = {"dims": (8, 16, 32, 64), "depths": (1, 1, 2, 1)}


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and statistic random and none negligible: LayerScale and norms too."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5 + 0.3 * noise)
    for buffer in (b for b in model.buffers() if b.is_floating_point()):
        buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


def twin(name: str, **args: object) -> nn.Module:
    return timm.create_model(models.REGISTRY[name].timm, num_classes=1000, **args)


def gmacs(model: nn.Module) -> float:
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    return counter.get_total_flops() / 2e9


def assert_same(ours: nn.Module, peer: nn.Module, x: Tensor, pairs: dict[str, str] | None = None) -> None:
    """Equal logits and equal gradients of every parameter; `pairs` maps our names to the peer's where they differ."""
    ours, peer = ours.to(x.dtype).eval(), peer.to(x.dtype).eval()
    y, z = ours(x), peer(x)
    assert (y - z).detach().abs().max() <= {torch.float32: 1e-5, torch.float64: 1e-12}[x.dtype]
    y.square().mean().backward(), z.square().mean().backward()
    theirs = dict(peer.named_parameters())
    for key, parameter in ours.named_parameters():
        wanted = theirs[pairs[key] if pairs else key].grad.view_as(parameter)
        torch.testing.assert_close(
            parameter.grad, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()), msg=lambda m, k=key: f"{k}: {m}"
        )


def check_against_timm(name: str, dtype: torch.dtype, size: tuple[int, int] = (224, 224), **args: object) -> None:
    ours, peer = randomise(models.create(name, **args)), twin(name, **args)
    peer.load_state_dict(ours.state_dict())  # strict, there
    ours.load_state_dict(peer.state_dict())  # and back
    assert_same(ours, peer, torch.randn(1, 3, *size, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.slow
def test_equals_timm_at_full_size(dtype):
    check_against_timm("convnext_t", dtype, (160, 224) if dtype == torch.float32 else (96, 128))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("convnext_b", torch.float32)]
    + [
        pytest.param(n, d, marks=pytest.mark.slow)
        for n in ("convnext_l", "convnext_xl")
        for d in (torch.float32, torch.float64)
    ],
    ids=str,
)
def test_equals_timm_at_reduced_depth(name, dtype):
    check_against_timm(name, dtype, (64, 96), depths=(1, 1, 2, 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnext_s", "convnext_b", "convnext_l", "convnext_xl"])
def test_equals_timm_at_full_depth(name):
    check_against_timm(name, torch.float32)


@pytest.mark.parametrize("size", [(32, 32), (97, 131), (64, 256)], ids=str)
def test_equals_timm_for_other_pictures(size):
    check_against_timm("convnext_t", torch.float64, size, **SMALL)


def torchvision_name(key: str) -> str:
    """Where torchvision keeps a tensor of ours."""
    for pattern, name in (
        (r"^stem\.(\d)", r"features.0.\1"),
        (r"^head\.norm", "classifier.0"),
        (r"^head\.fc", "classifier.2"),
        (r"\.conv_dw", ".block.0"),
        (r"\.norm\.", ".block.2."),
        (r"\.mlp\.fc1", ".block.3"),
        (r"\.mlp\.fc2", ".block.5"),
        (r"\.gamma", ".layer_scale"),
    ):
        key = re.sub(pattern, name, key)
    key = re.sub(r"^stages\.(\d)\.downsample", lambda m: f"features.{2 * int(m[1])}", key)
    return re.sub(r"^stages\.(\d)\.blocks\.", lambda m: f"features.{2 * int(m[1]) + 1}.", key)


def test_equals_torchvision():
    ours, peer = randomise(models.create("convnext_t")), torchvision.models.convnext_tiny(stochastic_depth_prob=0.0)
    pairs, shapes = (
        {key: torchvision_name(key) for key in ours.state_dict()},
        {k: v.shape for k, v in peer.state_dict().items()},
    )
    peer.load_state_dict({pairs[key]: value.reshape(shapes[pairs[key]]) for key, value in ours.state_dict().items()})
    assert_same(ours, peer, torch.randn(1, 3, 160, 224), pairs)


def official_name(key: str) -> str:
    """Where facebookresearch/ConvNeXt keeps a tensor of ours."""
    for pattern, name in (
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
        (r"blocks\.", ""),
        (r"conv_dw", "dwconv"),
        (r"mlp\.fc", "pwconv"),
        (r"^head\.norm", "norm"),
        (r"^head\.fc", "head"),
    ):
        key = re.sub(pattern, name, key)
    return key


def test_reads_the_authors_files():
    model = randomise(models.create("convnext_t", **SMALL))
    official = {official_name(key): value for key, value in model.state_dict().items()}
    assert {
        "downsample_layers.0.1.bias",
        "downsample_layers.3.1.weight",
        "stages.2.1.pwconv2.bias",
        "stages.0.0.gamma",
        "norm.weight",
        "head.bias",
    } <= official.keys()
    adapted = model.adapt_state_dict(official)
    assert list(adapted) == list(model.state_dict()) and all(
        torch.equal(adapted[k], v) for k, v in model.state_dict().items()
    )
    assert model.adapt_state_dict(adapted) is adapted
    assert timm.models.convnext.checkpoint_filter_fn(official, model).keys() == adapted.keys()
    assert rename_official("stages.2.10.dwconv.weight") == "stages.2.blocks.10.conv_dw.weight"


def test_initialisation_is_the_authors():
    torch.manual_seed(0)
    for name, value in models.create("convnext_t", dims=(48, 96, 192, 384)).state_dict().items():
        if value.ndim > 1:
            slack = 4 / math.sqrt(value.numel())
            assert value.std() == pytest.approx(0.02, rel=slack) and abs(float(value.mean())) < 0.02 * slack, name
        elif name.endswith("gamma"):
            assert torch.all(value == 1e-6)
        else:
            norm = "norm" in name or name == "stem.1.weight" or name.endswith("downsample.0.weight")
            assert torch.all(value == float(norm and name.endswith("weight"))), name
    torch.manual_seed(0)
    plain = models.create("convnext_t", **SMALL).head.fc.weight
    torch.manual_seed(0)
    scaled = models.create("convnext_t", head_init_scale=0.001, layer_scale=None, **SMALL)
    torch.testing.assert_close(scaled.head.fc.weight, plain * 0.001)
    assert not any(name.endswith("gamma") for name, _ in scaled.named_parameters())


@pytest.mark.parametrize("name", ["convnext_t", "convnext_s", "convnext_b", "convnext_l", "convnext_xl", *LADDER])
def test_size_cost_and_names(name):
    with torch.device("meta"):
        model = models.create(name).eval()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS.get(
        name, sum(p.numel() for p in model.parameters())
    )
    assert gmacs(model) == pytest.approx(models.REGISTRY[name].gmacs, abs=0.0051)
    if models.REGISTRY[name].timm:
        with torch.device("meta"):
            peer = twin(name)
        assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in peer.state_dict().items()}


def test_drop_path_is_timms():
    model, peer = (
        models.create("convnext_t", drop_path=0.1, dropout=0.3),
        timm.create_model("convnext_tiny", drop_path_rate=0.1),
    )
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    theirs = [getattr(block.drop_path, "drop_prob", 0.0) for stage in peer.stages for block in stage.blocks]
    assert rates == pytest.approx(theirs) and rates[-1] == 0.1 and model.head.drop.p == 0.3
    ladder = models.create("convnext_step_5", drop_path=0.1)
    assert [block.drop_path.drop_prob for stage in ladder.stages for block in stage.blocks] == rates


def test_learning_rate_groups_are_timms():
    model, peer = models.create("convnext_t"), twin("convnext_t")
    assert model.group_matcher(True) == peer.group_matcher(True) and model.no_weight_decay() == set()
    ours, theirs = (param_groups_layer_decay(m, 0.05, layer_decay=0.9) for m in (model, peer))
    assert len(ours) == 40
    for a, b in zip(ours, theirs, strict=True):
        assert (a["lr_scale"], a["weight_decay"], len(a["params"])) == (
            b["lr_scale"],
            b["weight_decay"],
            len(b["params"]),
        )


def test_channels_last_bfloat16_and_compile():
    model = randomise(models.create("convnext_t", 3, **SMALL)).eval()
    x = torch.randn(2, 3, 64, 80)
    y = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), y)
    last = model.to(memory_format=torch.channels_last)
    features = last.forward_features(x.contiguous(memory_format=torch.channels_last))
    assert features.is_contiguous(memory_format=torch.channels_last)  # no copy back on the way
    torch.testing.assert_close(last.forward_head(features), y, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).isfinite().all()
    assert model.bfloat16()(x.bfloat16()).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "args"), [("convnext_t", SMALL), ("convnext_step_9", {"width": 8, "depths": (1, 1, 2, 1)})]
)
@torch.no_grad()
def test_inductor(name, args):
    model = randomise(models.create(name, 3, **args)).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-5)


def test_odd_pictures_and_errors():
    model = randomise(models.create("convnext_t", 3, image_size=(33, 70), in_chans=2, **SMALL)).eval()
    x = torch.randn(2, 2, 33, 70)
    torch.testing.assert_close(model(x[:1]), model(x)[:1], rtol=1e-4, atol=1e-5)
    pooled = models.create("convnext_t", num_outputs=0, **SMALL).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(pooled(x), pooled.forward_head(pooled.forward_features(x), pre_logits=True)) and pooled(
        x
    ).shape == (1, 64)
    for name in ("convnext_t", "convnext_step_0"):
        with pytest.raises(ValueError, match="image size 16x64 is too small"):
            models.create(name, image_size=(16, 64))


# the ladder -----------------------------------------------------------------------------------------------------------
# -------------------


def test_ladder_costs_what_the_paper_says():
    assert [models.REGISTRY[name].gmacs for name in LADDER] == PAPER_GMACS and len(STEPS) == 12
    for kernel, cost in ((5, 4.10), (9, 4.21), (11, 4.29)):
        with torch.device("meta"):
            assert gmacs(models.create("convnext_step_7", kernel_size=kernel)) == pytest.approx(cost, abs=0.0051)


@pytest.mark.parametrize(("name", "depths"), [("convnext_step_0", [3, 4, 6, 3]), ("convnext_step_1", [3, 3, 9, 3])])
def test_ladder_starts_at_resnet(name, depths):
    ours, peer = randomise(models.create(name)), ResNet(Bottleneck, depths)
    pairs = dict(zip(ours.state_dict(), peer.state_dict(), strict=True))
    peer.load_state_dict({pairs[key]: value for key, value in ours.state_dict().items()})
    assert_same(ours, peer, torch.randn(1, 3, 96, 128), pairs)


def test_ladder_ends_at_convnext():
    last, goal = randomise(models.create("convnext_step_12", 7)).eval(), models.create("convnext_t", 7).eval()
    goal.load_state_dict(last.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(last(x), goal(x))


def test_ladder_changes_one_thing_a_step():
    def block(step: int) -> list[str]:
        found = models.create(f"convnext_step_{step}").stages[1].blocks[1]
        assert isinstance(found, LadderBlock)
        return [
            f"conv{m.kernel_size[0]}{'dw' * (m.groups > 1)}" if isinstance(m, nn.Conv2d) else type(m).__name__
            for m in [*found.body, found.act]
            if not isinstance(m, nn.Identity)
        ]

    bn, relu, gelu = "BatchNorm2d", "ReLU", "GELU"
    assert block(0) == block(2) == ["conv1", bn, relu, "conv3", bn, relu, "conv1", bn, relu]
    assert block(3) == block(5) == ["conv1", bn, relu, "conv3dw", bn, relu, "conv1", bn, relu]
    assert block(6) == ["conv3dw", bn, relu, "conv1", bn, relu, "conv1", bn, relu]
    assert block(7) == ["conv7dw", bn, relu, "conv1", bn, relu, "conv1", bn, relu]
    assert block(8) == ["conv7dw", bn, gelu, "conv1", bn, gelu, "conv1", bn, gelu]
    assert block(9) == ["conv7dw", bn, "conv1", bn, gelu, "conv1", bn]
    assert block(10) == ["conv7dw", bn, "conv1", gelu, "conv1"]
    assert block(11) == ["conv7dw", LayerNorm2d.__name__, "conv1", gelu, "conv1"]
    widths = [
        [s.blocks[-1].body[-1 if i >= 10 else -2].out_channels for s in models.create(f"convnext_step_{i}").stages]
        for i in (3, 4, 5, 11)
    ]
    assert [w[0] for w in widths] == [256, 384, 96, 96] and all(w[3] == 8 * w[0] for w in widths)


@pytest.mark.parametrize("name", LADDER[:12])
@pytest.mark.slow
def test_ladder_steps_learn(name):
    model = models.create(name, 3, image_size=32, depths=(1, 1, 2, 1), width=8)
    x = torch.randn(4, 3, 32, 45)
    before = model.train()(x).square().mean()
    before.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert model.eval()(x).isfinite().all()
    if name in ("convnext_step_0", "convnext_step_11"):
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
