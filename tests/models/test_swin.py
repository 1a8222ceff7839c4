"""Swin against timm, torchvision and the authors' definitions: function, gradients, names, initialisation, cost, odd
pictures."""

import math
import re

import pytest
import timm
import torch
import torchvision
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_simple
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import models
from models.swin import SwinBlock, relative_position_index, resize_table, shift_mask

NAMES = ["swin_t", "swin_s", "swin_b", "swin_l"]
PARAMETERS = {"swin_t": 28_288_354, "swin_s": 49_606_258, "swin_b": 87_768_224, "swin_l": 196_532_476}
SMALL = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4)}


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random and none negligible: bias tables, LayerScale and norms too."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5 + 0.3 * noise)
    return model


def twin(name: str, **args: object) -> nn.Module:
    return timm.create_model(models.REGISTRY[name].timm, num_classes=1000, drop_path_rate=0.0, **args)


def assert_same(ours: nn.Module, peer: nn.Module, x: Tensor, pairs: dict[str, str] | None = None) -> None:
    """Equal logits and equal gradients of every parameter; `pairs` maps our names to the peer's where they differ."""
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[x.dtype]
    ours, peer = ours.to(x.dtype).eval(), peer.to(x.dtype).eval()
    y, z = ours(x), peer(x)
    assert (y - z).detach().abs().max() <= tolerance
    y.square().mean().backward(), z.square().mean().backward()
    theirs = dict(peer.named_parameters())
    for key, parameter in ours.named_parameters():
        wanted = theirs[pairs[key] if pairs else key].grad
        torch.testing.assert_close(
            parameter.grad, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()), msg=lambda m, k=key: f"{k}: {m}"
        )


def check_against_timm(name: str, dtype: torch.dtype, size: int | tuple[int, int] = 224, **args: object) -> None:
    ours = randomise(models.create(name, image_size=size, **args))
    peer = twin(name, img_size=size, **args)
    peer.load_state_dict(ours.state_dict())  # strict, there
    ours.load_state_dict(peer.state_dict())  # and back
    height, width = (size, size) if isinstance(size, int) else size
    assert_same(ours, peer, torch.randn(1, 3, height, width, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.slow
def test_equals_timm_at_full_size(dtype):
    check_against_timm("swin_t", dtype)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("swin_b", torch.float32)]
    + [pytest.param("swin_l", dtype, marks=pytest.mark.slow) for dtype in (torch.float32, torch.float64)],
    ids=str,
)
def test_equals_timm_at_reduced_depth(name, dtype):
    check_against_timm(name, dtype, size=112, depths=(2, 2, 2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_s", "swin_b", "swin_l"])
def test_equals_timm_at_full_depth(name):
    check_against_timm(name, torch.float32)


@pytest.mark.parametrize("size", [(112, 112), (56, 224), (224, 448)], ids=str)
def test_equals_timm_for_other_pictures(size):
    """Maps smaller than the window (which is then cut, per axis) and odd maps in patch merging; nothing padded to whole
    windows."""
    check_against_timm("swin_t", torch.float64, size=size, **SMALL)


def torchvision_name(key: str) -> str:
    """Where torchvision keeps a tensor of ours."""
    for pattern, name in (
        (r"^patch_embed\.proj", "features.0.0"),
        (r"^patch_embed\.norm", "features.0.2"),
        (r"^head\.fc", "head"),
        (r"\.mlp\.fc1", ".mlp.0"),
        (r"\.mlp\.fc2", ".mlp.3"),
    ):
        key = re.sub(pattern, name, key)
    key = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"features.{2 * int(m[1])}", key)
    return re.sub(r"^layers\.(\d)\.blocks\.", lambda m: f"features.{2 * int(m[1]) + 1}.", key)


@pytest.mark.parametrize("size", [(224, 224), (148, 200)], ids=str)
def test_equals_torchvision(size):
    """Also where maps are padded to whole windows, for pictures of another size than the network was built for."""
    ours, peer = randomise(models.create("swin_t")), torchvision.models.swin_t()
    pairs = {key: torchvision_name(key) for key in ours.state_dict()}
    state = {pairs[key]: value for key, value in ours.state_dict().items()}
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not unexpected and all(key.endswith("relative_position_index") for key in missing)
    assert_same(ours, peer, torch.randn(1, 3, *size), pairs)


def official_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names of microsoft/Swin-Transformer, with the buffers its files hold."""
    found = {
        re.sub(
            r"^head\.fc\.",
            "head.",
            re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key),
        ): value
        for key, value in state.items()
    }
    index = {
        key.replace("bias_table", "index"): relative_position_index((7, 7))
        for key in found
        if key.endswith("bias_table")
    }
    return {**found, **index, "layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49)}


def test_reads_the_authors_files():
    model = randomise(models.create("swin_t", **SMALL))
    official = official_state(model.state_dict())
    assert "layers.0.downsample.norm.weight" in official and "head.weight" in official
    adapted = model.adapt_state_dict(official)
    assert list(adapted) == list(model.state_dict())
    assert all(torch.equal(adapted[key], value) for key, value in model.state_dict().items())
    own = model.adapt_state_dict(model.state_dict())
    assert all(own[key] is not None and torch.equal(own[key], value) for key, value in model.state_dict().items())
    theirs = timm.models.swin_transformer.checkpoint_filter_fn(dict(official), twin("swin_t", **SMALL))
    assert theirs.keys() == adapted.keys()


def test_bias_tables_follow_the_window():
    table = torch.randn(169, 3)
    for window in ((12, 12), (4, 4), (3, 9)):
        rows = (2 * window[0] - 1) * (2 * window[1] - 1)
        simple = resize_rel_pos_bias_table_simple(table, window, (rows, 3))
        torch.testing.assert_close(resize_table(table, window), simple)  # timm's own rule differs: see resize_table
    official = F.interpolate(table.T.reshape(1, 3, 13, 13), size=(23, 23), mode="bicubic").view(3, -1).T
    torch.testing.assert_close(resize_table(table, (12, 12)), official)
    assert resize_table(torch.zeros(39, 3), (7, 7)).shape == (
        39,
        3,
    )  # 3 x 13, not a square: left for the loader to refuse
    small, large = models.create("swin_t", **SMALL), models.create("swin_t", image_size=384, window_size=12, **SMALL)
    large.load_state_dict(large.adapt_state_dict(small.state_dict()))
    key = "layers.2.blocks.1.attn.relative_position_bias_table"
    torch.testing.assert_close(large.state_dict()[key], resize_table(small.state_dict()[key], (12, 12)))
    cut = models.create("swin_t", image_size=(56, 224), **SMALL)  # last windows are 2 x 7
    cut.load_state_dict(cut.adapt_state_dict(small.state_dict()))


def test_initialisation_is_the_authors():
    torch.manual_seed(0)
    for name, value in models.create("swin_t", embed_dim=48, depths=(2, 2, 2, 2)).state_dict().items():
        if name == "patch_embed.proj.weight":  # PyTorch's own: uniform within 1/sqrt(fan in)
            assert value.abs().max() <= 48**-0.5 and value.std() == pytest.approx((1 / 48 / 3) ** 0.5, rel=0.05)
        elif name == "patch_embed.proj.bias":
            assert 0 < value.abs().max() <= 48**-0.5
        elif value.ndim == 2:
            slack = 4 / math.sqrt(value.numel())
            assert value.std() == pytest.approx(0.02, rel=slack) and abs(float(value.mean())) < 0.02 * slack, name
        else:
            assert torch.all(value == float("norm" in name and name.endswith("weight"))), name


@pytest.mark.parametrize("name", NAMES)
def test_size_cost_and_names(name):
    with torch.device("meta"):
        model, peer = models.create(name).eval(), twin(name)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert counter.get_total_flops() / 2e9 == pytest.approx(models.REGISTRY[name].gmacs, abs=0.0051)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in peer.state_dict().items()}


def test_drop_path_and_dropout_reach_every_block():
    model, peer = (
        models.create("swin_t", drop_path=0.2, dropout=0.3, attn_dropout=0.4),
        timm.create_model("swin_tiny_patch4_window7_224", drop_path_rate=0.2),
    )
    rates = [block.drop_path1.drop_prob for stage in model.layers for block in stage.blocks]
    theirs = [getattr(block.drop_path1, "drop_prob", 0.0) for stage in peer.layers for block in stage.blocks]
    assert rates == pytest.approx(theirs) and rates[-1] == 0.2
    assert rates == [block.drop_path2.drop_prob for stage in model.layers for block in stage.blocks]
    for stage in model.layers:
        for block in stage.blocks:
            assert (block.attn.proj_drop.p, block.mlp.drop.p, block.attn.attn_dropout) == (0.3, 0.3, 0.4)
    assert model.patch_embed.drop.p == 0.3


def test_learning_rate_and_decay_groups_are_timms():
    model, peer = models.create("swin_t"), twin("swin_t")
    assert model.no_weight_decay() == peer.no_weight_decay() and model.group_matcher(True) == peer.group_matcher(True)
    ours, theirs = (param_groups_layer_decay(m, 0.05, m.no_weight_decay(), layer_decay=0.9) for m in (model, peer))
    assert len(ours) == 28
    for a, b in zip(ours, theirs, strict=True):
        assert (a["lr_scale"], a["weight_decay"]) == (b["lr_scale"], b["weight_decay"])
        assert [p.shape for p in a["params"]] == [p.shape for p in b["params"]]


def test_opposite_edges_never_meet():
    """A shifted block on a padded map: rolling must not let the first row attend to the last one."""
    block = randomise(SwinBlock(8, 2, (10, 10), (4, 4), shifted=True)).double()
    x = torch.randn(1, 10, 10, 8, dtype=torch.float64, requires_grad=True)
    block(x)[:, -1].square().sum().backward()
    assert x.grad[:, 8:].abs().min() > 1e-9 and x.grad[:, :6].abs().max() < 1e-30
    block(x.detach().requires_grad_())  # a mask of the authors' kind
    assert set(shift_mask((8, 8), (4, 4), (2, 2)).unique().tolist()) == {-100.0, 0.0}


@pytest.mark.parametrize("size", [(230, 260), (231, 257)], ids=str)
def test_takes_any_size(size):
    """What is built for one size computes at another what a network built for that one does; patches are padded."""
    model = randomise(models.create("swin_t", 5, **SMALL)).eval()
    there = models.create("swin_t", 5, image_size=size, **SMALL).eval()
    there.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, *size)
    torch.testing.assert_close(model(x), there(x))
    padded = F.pad(x, (0, -size[1] % 4, 0, -size[0] % 4))
    torch.testing.assert_close(model(x), model(padded))


@pytest.mark.parametrize(
    ("size", "args"), [(32, {}), ((33, 70), {}), (64, {"window_size": 12}), (64, {"window_size": (4, 5)})], ids=str
)
def test_odd_pictures(size, args):
    model = randomise(models.create("swin_t", 3, image_size=size, in_chans=2, **SMALL, **args)).eval()
    side = (size, size) if isinstance(size, int) else size
    x = torch.randn(2, 2, *side)
    y = model(x)
    assert y.shape == (2, 3) and y.isfinite().all()
    torch.testing.assert_close(model(x[:1]), y[:1], rtol=1e-4, atol=1e-5)
    assert model(torch.randn(1, 2, 15, 41)).isfinite().all()


@pytest.mark.slow
def test_bfloat16_and_compile():
    model = models.create(
        "swin_t", 3, image_size=64, embed_dim=16, depths=(1, 2), num_heads=(1, 2), window_size=5
    ).eval()
    x = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).isfinite().all()
    assert model.bfloat16()(x.bfloat16()).isfinite().all()


@pytest.mark.slow
@torch.no_grad()
def test_inductor():
    model = randomise(models.create("swin_t", 3, **SMALL)).eval()
    x = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-5)


def test_features_only_and_errors():
    model = models.create("swin_t", num_outputs=0, **SMALL).eval()
    x = torch.randn(1, 3, 112, 112)
    assert torch.equal(model(x), model.forward_features(x).mean((1, 2))) and model(x).shape == (1, 128)
    with pytest.raises(ValueError, match="num_heads 5 does not divide"):
        models.create("swin_t", embed_dim=16, num_heads=(5, 5, 5, 5))
    with pytest.raises(ValueError, match="different numbers of stages"):
        models.create("swin_t", depths=(2, 2))
