"""The plain transformers against timm, torchvision, vit-pytorch and the ViT-5 authors' code, every parameter
randomised.

Tolerances: logits 1e-5 in float32 and 1e-12 in float64; gradients 1e-4 relative (floor 1e-5 of the tensor's largest)
and 1e-9.
"""

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT
from vit_pytorch import SimpleViT as LucidSimpleViT
from vit_pytorch import ViT as LucidViT

import models
from models.layers import sincos2d

SMALL = {"embed_dim": 64, "depth": 2, "num_heads": 4}


@pytest.fixture(autouse=True)
def unfused():
    set_fused_attn(False)
    yield
    set_fused_attn(True)


def randomise(model, seed=0):
    """Matrices of variance 1/fan_in, so that signals keep their size; norms and scales around 1; everything else N(0,
    0.3)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            scale = p.shape[1:].numel() ** -0.5 if p.ndim in (2, 4) else 0.3
            p.copy_(noise * scale + (1.0 if p.ndim == 1 and not key.endswith("bias") else 0.0))
    return model


def compare(ours, theirs, x, *, key_map=None):
    """Same pictures, same loss: logits and every gradient. `key_map` moves a gradient of theirs to our name and
    shape."""
    exact = x.dtype == torch.float64
    outputs = [model(x) for model in (ours, theirs)]
    for output in outputs:
        joined = torch.cat(output, dim=1) if isinstance(output, tuple) else output
        assert joined.std() > 0.1, "logits too small to compare"
        (joined.softmax(-1)[:, 0].log().sum() + 0.1 * joined.square().sum()).backward()
    for a, b in zip(*([o] if torch.is_tensor(o) else o for o in outputs)):
        assert a.shape == b.shape and (a - b).abs().max() <= (1e-12 if exact else 1e-5)
    peer = {k: p.grad for k, p in theirs.named_parameters()}
    peer = key_map(peer) if key_map else peer
    for key, p in ours.named_parameters():
        relative, floor = (1e-9, 1e-12) if exact else (1e-4, 1e-5)
        floor *= peer[key].abs().max().item()
        torch.testing.assert_close(
            p.grad, peer[key], rtol=relative, atol=floor, msg=lambda message, k=key: f"{k}: {message}"
        )


def against_timm(name, dtype, size, **args):
    """Ours and timm's twin with the same random weights, loaded strictly in both directions."""
    own = {{"drop_path": "drop_path_rate"}.get(k, k): v for k, v in args.items()}
    ours = models.create(name, args.pop("num_outputs", 10), size, **args).to(dtype)
    own.pop("num_outputs", None)
    theirs = timm.create_model(models.REGISTRY[name].timm, num_classes=ours.num_classes, img_size=size, **own).to(dtype)
    theirs.load_state_dict(randomise(ours).state_dict(), strict=True)
    ours.load_state_dict(randomise(theirs, seed=1).state_dict(), strict=True)
    if hasattr(theirs, "set_distilled_training"):
        theirs.set_distilled_training(True)
    side = (size, size) if isinstance(size, int) else size
    compare(ours.train(), theirs.train(), torch.randn(1 if max(side) > 100 else 2, 3, *side, dtype=dtype))
    x = torch.randn(1, 3, *side, dtype=dtype)
    with torch.no_grad():
        assert (ours.eval()(x) - theirs.eval()(x)).abs().max() <= (1e-12 if dtype == torch.float64 else 1e-5)


TWINS = [name for name in models.names() if models.REGISTRY[name].timm and name.startswith(("vit_", "deit"))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", TWINS)
def test_timm_small(name, dtype):
    patch = models.REGISTRY[name].args["patch_size"]
    against_timm(name, dtype, (3 * patch, 2 * patch), **SMALL)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[] if name in ("vit_ti16", "vit_s32", "deit_ti16_distilled", "deit3_s16") else pytest.mark.slow
        )
        for name in TWINS
    ],
)
def test_timm_full_size(name):
    """224 or 384 pixels and full width; l and h cut to depth 2."""
    entry = models.REGISTRY[name]
    deep = entry.args["depth"] > 12
    against_timm(name, torch.float32, entry.image_size, num_outputs=1000, **({"depth": 2} if deep else {}))


@pytest.mark.parametrize(
    "args, peer",
    [
        ({}, {"fc_norm": False}),
        ({"norm_pos": "post_pool", "gelu": "erf"}, {"act_layer": "gelu"}),
        ({"qkv_bias": False, "drop_path": 0.0}, {"fc_norm": False, "qkv_bias": False}),
    ],
    ids=["norm_then_mean", "mean_then_norm", "no_qkv_bias"],
)
def test_simple_vit_is_timms_with_fixed_positions(args, peer):
    ours = randomise(models.create("simple_vit_s16", 10, (48, 32), **SMALL, **args)).double()
    theirs = VisionTransformer(
        img_size=(48, 32),
        num_classes=10,
        class_token=False,
        global_pool="avg",
        **{"act_layer": "gelu_tanh", **SMALL, **peer},
    ).double()
    positions = sincos2d((3, 2), 64).double()
    assert torch.equal(ours.pos_embed, positions)
    missing, unexpected = theirs.load_state_dict(ours.state_dict() | {"pos_embed": positions}, strict=True)
    compare(ours, theirs, torch.randn(2, 3, 48, 32, dtype=torch.float64))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_vit_without_positions_and_with_layer_scale(pool):
    ours = randomise(models.create("vit_s16", 10, 32, pool=pool, pos="none", layer_scale=1e-5, **SMALL)).double()
    theirs = VisionTransformer(
        img_size=32,
        num_classes=10,
        class_token=pool == "cls",
        global_pool="token" if pool == "cls" else "avg",
        fc_norm=False,
        pos_embed="none",
        init_values=1e-5,
        **SMALL,
    ).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    compare(ours, theirs, torch.randn(2, 3, 32, 32, dtype=torch.float64))


def test_hidden_tanh_layer_of_the_head():
    for name in ("vit_s16", "simple_vit_s16"):
        model = randomise(models.create(name, 10, 32, head="mlp_tanh", **SMALL)).eval()
        tokens = model.forward_features(torch.randn(2, 3, 32, 32))
        pooled = tokens[:, 0] if name == "vit_s16" else tokens.mean(1)
        state = model.state_dict()
        hidden = torch.tanh(F.linear(pooled, state["pre_logits.fc.weight"], state["pre_logits.fc.bias"]))
        assert torch.equal(model.forward_head(tokens, pre_logits=True), hidden)
        assert torch.equal(model.forward_head(tokens), F.linear(hidden, state["head.weight"], state["head.bias"]))
    with torch.device("meta"):
        assert sum(p.numel() for p in models.create("simple_vit_s16", head="mlp_tanh").parameters()) == 22_122_472


def from_torchvision(state):
    words = {
        "class_token": "cls_token",
        "encoder.pos_embedding": "pos_embed",
        "conv_proj": "patch_embed.proj",
        "encoder.ln.": "norm.",
        "encoder.layers.encoder_layer_": "blocks.",
        "ln_1": "norm1",
        "ln_2": "norm2",
        "self_attention.in_proj_": "attn.qkv.",
        "self_attention.out_proj": "attn.proj",
        "mlp.0": "mlp.fc1",
        "mlp.3": "mlp.fc2",
        "heads.head": "head",
    }
    out = {}
    for key, value in state.items():
        for theirs, ours in words.items():
            key = key.replace(theirs, ours)
        out[key] = value
    return out


@pytest.mark.parametrize(
    "dim, depth, heads, size, dtype",
    [
        (64, 2, 4, 32, torch.float64),
        (64, 2, 4, 32, torch.float32),
        pytest.param(768, 12, 12, 224, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_torchvision(dim, depth, heads, size, dtype):
    theirs = randomise(TorchvisionViT(size, 16, depth, heads, dim, 4 * dim, num_classes=10)).to(dtype)
    ours = models.create("vit_b16", 10, size, embed_dim=dim, depth=depth, num_heads=heads).to(dtype)
    ours.load_state_dict(from_torchvision(theirs.state_dict()), strict=True)
    compare(ours, theirs, torch.randn(2, 3, size, size, dtype=dtype), key_map=from_torchvision)


LUCID = {"patch_norm": True, "qkv_bias": False, "norm_eps": 1e-5}  # how vit-pytorch's networks differ
PUBLISHED = {
    "image_size": 256,
    "patch_size": 32,
    "dim": 1024,
    "depth": 6,
    "heads": 16,
    "mlp_dim": 2048,
    "num_classes": 1000,
}


def from_lucid(state, patch, chans=3):
    """vit-pytorch's names and its (row, column, channel) patches to ours."""

    def patches_first(v):  # (..., p p C) -> (..., C, p, p)
        return v.reshape(*v.shape[:-1], patch, patch, chans).movedim(-1, -3)

    words = {
        "to_patch_embedding.1": "patch_embed.norm_in",
        "to_patch_embedding.2": "patch_embed.proj",
        "to_patch_embedding.3": "patch_embed.norm_out",
        "0.norm.": "norm1.",
        "0.to_qkv": "attn.qkv",
        "0.to_out.0": "attn.proj",
        "0.to_out": "attn.proj",
        "1.net.0": "norm2",
        "1.net.1": "mlp.fc1",
        "1.net.3": "mlp.fc2",
        "1.net.4": "mlp.fc2",
        "transformer.norm": "norm",
        "linear_head": "head",
        "mlp_head": "head",
        "pos_embedding": "pos_embed",
    }
    out = {}
    for key, value in state.items():
        for theirs, ours in words.items():
            key = (
                key.replace(f"layers.{key.split('.')[2]}.{theirs}", f"blocks.{key.split('.')[2]}.{ours}")
                if "layers." in key
                else key.replace(theirs, ours)
            )
        key = key.replace("transformer.blocks", "blocks")
        if key == "patch_embed.proj.weight":
            value = patches_first(value)
        elif key.startswith("patch_embed.norm_in"):
            value = patches_first(value).flatten()
        elif key in ("cls_token", "pos_embed"):
            if not len(value):  # with mean pooling theirs keeps an empty class token
                continue
            value = value[None]
        out[key] = value
    return out


def lucid_pair(kind, spec, **more):
    own = {
        "num_outputs": spec["num_classes"],
        "image_size": spec["image_size"],
        "patch_size": spec["patch_size"],
        "embed_dim": spec["dim"],
        "depth": spec["depth"],
        "num_heads": spec["heads"],
        "mlp_ratio": spec["mlp_dim"] / spec["dim"],
        **LUCID,
    }
    if kind == "simple":
        return models.create("simple_vit_s16", **own, out_bias=False, gelu="erf", **more), LucidSimpleViT(
            **spec, **more
        )
    pool = more.pop("pool", "cls")
    return models.create("vit_s16", **own, pool=pool, **more), LucidViT(**spec, pool=pool, **more)


@pytest.mark.parametrize("kind, count", [("simple", 54_556_648), ("vit", 54_630_376)])
def test_vit_pytorch_published_examples_have_their_size(kind, count):
    with torch.device("meta"):
        for model in lucid_pair(kind, PUBLISHED):
            assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    "kind, more, spec, dtype",
    [
        ("simple", {}, None, torch.float64),
        ("vit", {}, None, torch.float64),
        ("vit", {"pool": "mean"}, None, torch.float64),
        ("simple", {"dim_head": 24}, None, torch.float64),
        ("vit", {"dim_head": 24}, None, torch.float64),
        ("vit", {"dim_head": 24}, None, torch.float32),
        pytest.param("simple", {}, PUBLISHED, torch.float32, marks=pytest.mark.slow),
        pytest.param("vit", {}, PUBLISHED, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_vit_pytorch(kind, more, spec, dtype):
    spec = spec or {
        "image_size": (24, 16),
        "patch_size": 8,
        "dim": 64,
        "depth": 2,
        "heads": 1 + 3,
        "mlp_dim": 96,
        "num_classes": 10,
    }
    more = {"dim_head": spec["dim"] // spec["heads"]} | more
    ours, theirs = (model.to(dtype) for model in lucid_pair(kind, spec, **more))
    randomise(theirs)
    ours.load_state_dict(from_lucid(theirs.state_dict(), spec["patch_size"]), strict=True)
    if kind == "simple":
        theirs.pos_embedding = theirs.pos_embedding.to(dtype)
    size = spec["image_size"] if isinstance(spec["image_size"], tuple) else (spec["image_size"],) * 2
    compare(
        ours, theirs, torch.randn(2, 3, *size, dtype=dtype), key_map=lambda grads: from_lucid(grads, spec["patch_size"])
    )


def test_seeds_mean_then_norm():
    """The first seed's own code averages first and norms after: the same parameters, another function."""
    after = randomise(models.create("simple_vit_s16", 10, 32, norm_pos="post_pool", **SMALL)).eval()
    before = models.create("simple_vit_s16", 10, 32, **SMALL).eval()
    before.load_state_dict({key.replace("fc_norm", "norm"): value for key, value in after.state_dict().items()})
    x = torch.randn(2, 3, 32, 32)
    tokens = before.blocks(before.embed(x))
    assert torch.allclose(after(x), after.head(before.norm(tokens.mean(1))), atol=1e-6)
    assert torch.allclose(before(x), after.head(before.norm(tokens).mean(1)), atol=1e-6)
    assert not torch.allclose(after(x), before(x), atol=1e-2)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ("vit_ti16", "vit_tiny_patch16_224"),
        ("deit3_s16", "deit3_small_patch16_224"),
        ("deit_ti16_distilled", "deit_tiny_distilled_patch16_224"),
    ],
)
def test_other_sizes_equal_timms_dynamic_ones(ours, theirs):
    twin = randomise(timm.create_model(theirs, num_classes=10, depth=2, dynamic_img_size=True)).eval()
    network = models.create(ours, 10, depth=2).eval()
    network.load_state_dict(twin.state_dict())
    with pytest.raises(ValueError, match="built for pictures of 224x224"):
        network(torch.zeros(1, 3, 96, 96))
    network.set_any_size()
    for size in ((160, 160), (96, 256), (224, 224)):
        image = torch.randn(2, 3, *size)
        torch.testing.assert_close(network(image), twin(image), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="not a multiple of the patch size"):
        network(torch.zeros(1, 3, 100, 96))
