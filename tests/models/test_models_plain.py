"""The plain transformers (ViT, SimpleViT, DeiT, DeiT III, ViT-5), by registry: size, cost, shapes, gradients,
interface, odd inputs."""

import copy

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch.utils.flop_counter import FlopCounterMode

import models
from models.deit import DistilledDeiT
from models.vit import PlainTransformer

PLAIN = [name for name in models.names() if issubclass(models.REGISTRY[name].build, PlainTransformer)]
ONE_OF_EACH = ["vit_ti16", "simple_vit_ti16", "deit_ti16", "deit_ti16_distilled", "deit3_s16", "vit5_s16"]
PARAMETERS = {  # the papers' and timm's (recipes.md section 3); ViT-5's are those of the authors' code
    "vit_ti16": 5_717_416,
    "vit_s16": 22_050_664,
    "vit_b16": 86_567_656,
    "vit_l16": 304_326_632,
    "vit_s32": 22_878_952,
    "vit_b32": 88_224_232,
    "vit_l32": 306_535_400,
    "vit_h14": 632_045_800,
    "vit_nano4": 1_333_608,
    "simple_vit_ti16": 5_679_400,
    "simple_vit_s16": 21_974_632,
    "simple_vit_b16": 86_415_592,
    "simple_vit_l16": 304_123_880,
    "simple_vit_s32": 22_859_368,
    "simple_vit_b32": 88_185_064,
    "deit_ti16": 5_717_416,
    "deit_s16": 22_050_664,
    "deit_b16": 86_567_656,
    "deit_b16_384": 86_859_496,
    "deit_ti16_distilled": 5_910_800,
    "deit_s16_distilled": 22_436_432,
    "deit_b16_distilled": 87_338_192,
    "deit_b16_distilled_384": 87_630_032,
    "deit3_s16": 22_059_496,
    "deit3_m16": 38_849_512,
    "deit3_b16": 86_585_320,
    "deit3_l16": 304_374_760,
    "deit3_h14": 632_126_440,
    "vit5_s16": 22_039_144,
    "vit5_b16": 86_543_080,
}


def size_of(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def tiny(name: str, **args) -> PlainTransformer:
    """A small copy of a variant: its own patch and options, 2 x 3 patches, width 32, depth 2."""
    torch.manual_seed(0)
    patch = models.REGISTRY[name].args.get("patch_size", 16)
    args = {"image_size": (2 * patch, 3 * patch), "num_outputs": 5, "embed_dim": 32, "depth": 2, "num_heads": 2} | args
    return models.create(name, **args)


def awake(model: PlainTransformer) -> PlainTransformer:
    """Move every parameter off its start, where zero heads and tiny scales hide what is wrong."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def pictures(model: PlainTransformer, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, model.patch_embed.proj.in_channels, *model.patch_embed.image_size)


def joined(output):
    return torch.cat(output) if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", PLAIN)
def test_parameters_and_gmacs_of_the_table(name):
    with torch.device("meta"):
        model = models.create(name).eval()
        x = torch.zeros(1, 3, *models.preprocessing(name)["image_size"])
        with FlopCounterMode(display=False) as counter:
            assert model(x).shape == (1, 1000)
    assert size_of(model) == PARAMETERS[name]
    assert round(counter.get_total_flops() / 2e9, 2) == models.REGISTRY[name].gmacs


@pytest.mark.parametrize("name", [name for name in PLAIN if models.REGISTRY[name].timm])
def test_same_tensors_and_preparation_as_timm(name):
    twin = models.REGISTRY[name].timm
    with torch.device("meta"):
        ours, theirs = models.create(name), timm.create_model(twin, num_classes=1000)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    cfg = timm.get_pretrained_cfg(twin)
    assert models.preprocessing(name) == {
        "image_size": cfg.input_size[1:],
        "mean": cfg.mean,
        "std": cfg.std,
        "interpolation": cfg.interpolation,
        "crop_pct": cfg.crop_pct,
        "crop_mode": cfg.crop_mode,
    }


@pytest.mark.parametrize("name", PLAIN)
def test_tiny_copy_learns_and_repeats_itself(name):
    model = awake(tiny(name)).train()
    x = pictures(model)
    output = model(x)
    assert joined(output).shape == (4 if isinstance(output, tuple) else 2, 5)
    joined(output).square().sum().backward()
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), key
    model.eval()
    assert torch.equal(model(x), model(x)) and torch.allclose(
        model(x)[:1], model(x[:1]), atol=1e-5
    )  # a batch of one is no exception


@pytest.mark.parametrize("name", PLAIN)
def test_what_a_variant_refuses(name):
    patch = models.REGISTRY[name].args.get("patch_size", 16)
    with pytest.raises(ValueError, match="has no argument 'drop_pth'; did you mean drop_path"):
        models.create(name, drop_pth=0.1)
    with pytest.raises(ValueError, match="timm's num_classes is num_outputs here"):
        models.create(name, num_classes=10)
    with pytest.raises(ValueError, match="timm's img_size is image_size here"):
        models.create(name, img_size=32)
    with pytest.raises(
        ValueError, match=f"not a multiple of the patch size {patch}x{patch}; the nearest.* {2 * patch}x{3 * patch}"
    ):
        models.create(name, image_size=(2 * patch + 1, 3 * patch - 1))
    model = tiny(name)
    with pytest.raises(
        ValueError, match=f"built for pictures of {2 * patch}x{3 * patch} and got {3 * patch}x{2 * patch}"
    ):
        model(torch.randn(1, 3, 3 * patch, 2 * patch))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_interface_of_timm(name):
    model = awake(tiny(name)).eval()
    x, own = pictures(model), dict(model.named_parameters())
    tokens = model.forward_features(x)
    features = model.forward_head(tokens, pre_logits=True)
    assert tokens.ndim == 3 and features.shape == (2, model.head_hidden_size) == (2, model.num_features)
    assert torch.equal(model.forward_head(tokens), model(x))
    assert (
        model.no_weight_decay() <= own.keys()
        and {k for k in own if "token" in k or k == "pos_embed"} == model.no_weight_decay()
    )
    heads = model.default_cfg["classifier"]
    heads = (heads,) if isinstance(heads, str) else heads
    named = tuple(model.get_submodule(head) for head in heads)
    assert named == (model.get_classifier() if len(heads) > 1 else (model.get_classifier(),))
    assert model.get_submodule(model.default_cfg["first_conv"]).weight.shape[1] == 3
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.num_classes == 7
    model.reset_classifier(0)
    assert torch.equal(model(x), features) and torch.equal(
        tiny(name, num_outputs=0).eval()(x),
        tiny(name).eval().forward_head(tiny(name).eval().forward_features(x), pre_logits=True),
    )


@pytest.mark.parametrize("name", ["vit_ti16", "deit_ti16_distilled", "deit3_s16"])
def test_parameter_groups_equal_timm(name):
    with torch.device("meta"):
        ours, theirs = models.create(name), timm.create_model(models.REGISTRY[name].timm, num_classes=1000)

    def groups(model, make):
        names = {id(p): key for key, p in model.named_parameters()}
        return {
            names[id(p)]: (group["weight_decay"], group.get("lr_scale"))
            for group in make(model)
            for p in group["params"]
        }

    for make in (
        lambda m: param_groups_layer_decay(m, 0.05, m.no_weight_decay(), layer_decay=0.75),
        lambda m: param_groups_weight_decay(m, 0.05, no_weight_decay_list=m.no_weight_decay()),
    ):
        assert groups(ours, make) == groups(theirs, make)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_gradient_checkpointing_changes_nothing(name):
    plain = awake(tiny(name)).train()
    thrifty = copy.deepcopy(plain)
    thrifty.set_grad_checkpointing()
    x = pictures(plain)
    for model in (plain, thrifty):
        joined(model(x)).square().sum().backward()
    for (key, p), q in zip(plain.named_parameters(), thrifty.parameters()):
        assert torch.equal(p.grad, q.grad), key


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_compiles_to_one_graph(name):
    model = awake(tiny(name)).eval()
    x = pictures(model)
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(model, fullgraph=True, backend="eager")(x), model(x), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_compiles_with_inductor(name):
    model = awake(tiny(name)).eval()
    x = pictures(model)
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-5)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_other_channels_and_half_precision(name):
    model = awake(tiny(name, in_chans=5)).eval()
    x = pictures(model)
    full = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x).float() - full).abs().max() < 0.2 * full.abs().max()
    half = model.bfloat16()(x.bfloat16())
    assert (
        half.dtype == torch.bfloat16
        and half.isfinite().all()
        and (half.float() - full).abs().max() < 0.2 * full.abs().max()
    )


def test_distilled_deit_returns_both_logits_only_when_training_for_it():
    model = awake(tiny("deit_ti16_distilled")).train()
    x = pictures(model)
    cls, dist = model(x)
    assert not torch.allclose(cls, dist)
    assert torch.equal(model.eval()(x), (cls + dist) / 2)
    model.train().set_distilled_training(False)
    assert torch.equal(model(x), (cls + dist) / 2)
    tokens = model.forward_features(x)
    assert torch.equal(cls, model.head(tokens[:, 0])) and torch.equal(
        dist, model.head_dist(tokens[:, 1])
    )  # dist stands after cls


def test_seeds_deit_of_depth_three():
    """The shop example: 23,540,432 parameters, by layer, tokens (4, 198, 768)."""
    model = models.create("deit_b16_distilled", depth=3, qkv_bias=False)
    assert isinstance(model, DistilledDeiT) and size_of(model) == 23_540_432
    assert [size_of(block) for block in model.blocks] == [7_085_568] * 3 and size_of(model.patch_embed) == 590_592
    assert model.pos_embed.numel() + model.cls_token.numel() + model.dist_token.numel() == 153_600
    assert size_of(model.head) == size_of(model.head_dist) == 769_000 and size_of(model.norm) == 1_536
    x = torch.randn(4, 3, 224, 224)
    assert model.eval().embed(x).shape == (4, 198, 768)


def test_stochastic_depth_rises_but_for_deit3_and_vit5():
    def rates(name):
        return [(b.drop_path1.drop_prob, b.drop_path2.drop_prob) for b in tiny(name, depth=3, drop_path=0.2).blocks]

    for name in ("vit_ti16", "simple_vit_s16", "deit_s16", "deit_s16_distilled"):
        assert rates(name) == [(0.0, 0.0), (0.1, 0.1), (0.2, 0.2)]
    for name in ("deit3_s16", "vit5_s16"):
        assert rates(name) == [(0.2, 0.2)] * 3
    model = awake(tiny("vit_ti16", drop_path=0.5)).train()
    x = pictures(model)
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    "args, word",
    [
        ({"pool": "max"}, "pool is one of cls, mean"),
        ({"pos": "rope"}, "pos is one of"),
        ({"norm_pos": "both"}, "norm_pos is one of"),
        ({"head": "mlp"}, "head is one of linear, mlp_tanh"),
        ({"gelu": "relu"}, "gelu is one of erf, tanh"),
        ({"num_heads": 5}, "num_heads 5 does not divide"),
    ],
)
def test_vit_refuses_unknown_words(args, word):
    with pytest.raises(ValueError, match=word):
        tiny("vit_ti16", **args)


def test_vit5_refuses_what_has_no_square_or_no_quarter():
    with pytest.raises(ValueError, match="5 is not a square number, 4 is"):
        tiny("vit5_s16", registers=5)
    with pytest.raises(ValueError, match="that 4 divides, not 6"):
        tiny("vit5_s16", embed_dim=12)
    with pytest.raises(ValueError, match="num_heads 5 does not divide"):
        tiny("vit5_s16", num_heads=5)
    assert tiny("vit5_s16", registers=0).eval().embed(torch.randn(1, 3, 32, 48)).shape == (1, 7, 32)
