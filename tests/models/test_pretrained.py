"""Weight files: every kind read and unwrapped, unsafe ones refused, positions resized, heads kept or reset, runs
brought back."""

import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

import models
from models.pretrained import checkpoint_in, fit, head_keys, initialise, read_weights

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}


def make(name="vit_s16", num_outputs=5, image_size=32, seed=0, **args):
    torch.manual_seed(seed)
    model = models.create(name, num_outputs, image_size, **(TINY | args)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def same(model, other):
    x = torch.randn(2, 3, *model.patch_embed.image_size)
    with torch.no_grad():
        return torch.equal(model(x), other(x))


def write(folder, kind, state):
    """One file of weights as the trainers of this world write them; returns what `--init` is given."""
    path = folder / f"w.{kind.split('-')[0]}"
    if kind == "safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    elif kind == "pth":
        torch.save(state, path)
    elif kind == "pth-ddp":
        torch.save({"model": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, path)
    elif kind == "pth-compiled":
        torch.save({"state_dict": {f"module._orig_mod.{key}": value for key, value in state.items()}}, path)
    elif kind == "pth-ema":
        torch.save({"model": {key: value * 0 for key, value in state.items()}, "model_ema": state}, path)
    elif kind == "ckpt":
        torch.save({"state_dict": {f"model.{key}": value for key, value in state.items()}, "global_step": 7}, path)
    elif kind == "run":
        (folder / "run" / "checkpoints").mkdir(parents=True)
        torch.save(
            {"state_dict": {f"model.{key}": value * 0 for key, value in state.items()}},
            folder / "run/checkpoints/last.ckpt",
        )
        torch.save(
            {"state_dict": {f"model.{key}": value for key, value in state.items()}},
            folder / "run/checkpoints/best.ckpt",
        )
        return folder / "run"
    return path


@pytest.mark.parametrize("kind", ["safetensors", "pth", "pth-ddp", "pth-compiled", "pth-ema", "ckpt", "run"])
def test_every_kind_of_file(tmp_path, kind):
    source, target = make(), make(seed=1)
    assert not same(source, target)
    note = initialise(target, str(write(tmp_path, kind, source.state_dict())), name="vit_s16")
    assert same(source, target) and "32 of 32 tensors" in note and ";" not in note


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_that_are_not_read(tmp_path):
    bad = tmp_path / "evil.pth"
    torch.save({"state_dict": make().state_dict(), "hook": Evil(tmp_path / "ran")}, bad)
    with pytest.raises(ValueError, match="could run code"):
        read_weights(bad)
    bad.write_bytes(pickle.dumps({"w": Evil(tmp_path / "ran")}))
    with pytest.raises(ValueError):
        read_weights(bad)
    assert not (tmp_path / "ran").exists()
    for name, content in (
        ("torn.pth", b"PK\x03\x04 torn"),
        ("torn.safetensors", b"\x08\0\0\0\0\0\0\0{"),
        ("empty.ckpt", b""),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            read_weights(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(ValueError, match="holds no tensors"):
        read_weights(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="no weights at"):
        checkpoint_in(tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoints/best.ckpt or checkpoints/last.ckpt"):
        checkpoint_in(tmp_path)


@pytest.mark.parametrize("name", ["vit_s16", "deit_s16_distilled"])
def test_head_of_another_size(tmp_path, name):
    source = make(name, 5)
    path = str(write(tmp_path, "pth", source.state_dict()))
    target = make(name, 3, seed=1)
    with pytest.raises(ValueError, match=r"its head is \(5, 32\) and the model's \(3, 32\).*--init_head reset"):
        initialise(target, path, name=name)
    heads = head_keys(target)
    assert len(heads) == (4 if "distilled" in name else 2)
    assert "head of 5 outputs left out, a fresh one of 3 starts" in initialise(target, path, name=name, reset_head=True)
    for key, value in target.state_dict().items():
        if key in heads:  # small: trained features, and no opinion on them yet
            assert 0 < value.std() < 0.02 if value.ndim > 1 else (value == 0).all(), key
        else:
            assert torch.equal(value, source.state_dict()[key]), key


def test_other_misfits_are_errors_and_partial_files_are_reported(tmp_path):
    target = make()
    with pytest.raises(ValueError, match="have another shape, the first is blocks.0.attn.proj.bias"):
        initialise(target, str(write(tmp_path, "pth", make(embed_dim=16).state_dict())), name="vit_s16")
    state = make(seed=2).state_dict()
    del state["norm.bias"]
    path = str(write(tmp_path, "pth", state | {"teacher.w": torch.zeros(1)}))
    with pytest.raises(
        ValueError, match="1 of the model's 32 tensors are missing beside the head .norm.bias.*--init_partial"
    ):
        initialise(target, path, name="vit_s16")
    note = initialise(target, path, name="vit_s16", partial=True)
    assert "31 of 32 tensors" in note and "missing: 1 (norm.bias)" in note and "unexpected: 1 (teacher.w)" in note
    with pytest.raises(ValueError, match="none of its 1 tensors has a name of this model"):
        fit(target, {"conv.weight": torch.zeros(3)}, "x.pth")


def test_in_order_where_no_name_matches():
    source, target = make(), make(seed=1)
    foreign = {f"layer{i}": value for i, value in enumerate(source.state_dict().values())}
    weights, notes = fit(target, foreign, "x.pth")
    target.load_state_dict(weights)
    assert same(source, target) and "taken in order" in notes[0]


@pytest.mark.parametrize("name", ["vit_s16", "deit_s16_distilled", "deit3_s16"])
def test_positions_224_to_384_equal_timms(name):
    args = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    small = timm.create_model(models.REGISTRY[name].timm, num_classes=5, **args)
    large = timm.create_model(models.REGISTRY[name].timm, num_classes=5, img_size=384, **args)
    with torch.no_grad():
        small.pos_embed.normal_()
    large.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(small.state_dict(), large))
    ours = models.create(name, 5, 384, **args)
    weights, notes = fit(ours, small.state_dict(), "x.pth")
    assert torch.equal(weights["pos_embed"], large.pos_embed) and notes == ["1 tensors resized to the image size"]
    ours.load_state_dict(weights, strict=True)


def test_positions_of_a_non_square_grid():
    square, wide, wider = make(image_size=32), make(image_size=(24, 48)), make(image_size=(48, 96))
    resized = wide.adapt_state_dict(square.state_dict())["pos_embed"]
    assert torch.equal(resized, resample_abs_pos_embed(square.pos_embed, [3, 6], [4, 4]))
    resized = wider.adapt_state_dict(wide.state_dict())["pos_embed"]  # 18 positions are no square: they have our aspect
    assert torch.equal(resized, resample_abs_pos_embed(wide.pos_embed, [6, 12], [3, 6]))
    wide, wider = make(image_size=(16, 32)), make(image_size=(32, 64))
    resized = wider.adapt_state_dict(wide.state_dict())["pos_embed"]  # nine: a class token and 2 x 4, not 3 x 3
    assert torch.equal(resized, resample_abs_pos_embed(wide.pos_embed, [4, 8], [2, 4]))
    square, wide = make("deit3_s16", image_size=24), make("deit3_s16", image_size=(32, 64))
    resized = wide.adapt_state_dict(square.state_dict())[
        "pos_embed"
    ]  # nine without a position for the class token: 3 x 3
    assert torch.equal(resized, resample_abs_pos_embed(square.pos_embed, [4, 8], [3, 3], num_prefix_tokens=0))


def test_positions_that_fit_no_grid():
    square, wide = make(image_size=32), make(image_size=(24, 48))
    with pytest.raises(ValueError, match="19 saved positions are neither a square grid nor one of the aspect 4:4"):
        square.adapt_state_dict(wide.state_dict())


def test_prefix_tokens_stay_apart():
    """Between networks whose positions begin with a different number of prefix tokens."""
    vit, mean = make("deit_s16"), make("vit_s16", pool="mean", seed=3)
    distilled, third = make("deit_s16_distilled", seed=1), make("deit3_s16", seed=2)
    pos = distilled.adapt_state_dict(vit.state_dict())["pos_embed"]
    assert torch.equal(pos, torch.cat([vit.pos_embed[:, :1], distilled.pos_embed[:, 1:2], vit.pos_embed[:, 1:]], 1))
    assert torch.equal(third.adapt_state_dict(distilled.state_dict())["pos_embed"], distilled.pos_embed[:, 2:])
    assert torch.equal(mean.adapt_state_dict(vit.state_dict())["pos_embed"], vit.pos_embed[:, 1:])
    pos = vit.adapt_state_dict(mean.state_dict())["pos_embed"]
    assert torch.equal(pos, torch.cat([vit.pos_embed[:, :1], mean.pos_embed], 1))
    assert "pos_embed" not in vit.adapt_state_dict({"norm.weight": torch.zeros(3)})


@pytest.mark.parametrize("name", ["deit3_s16", "vit5_s16"])
def test_official_names_and_resizing_without_antialias(name):
    source, target = make(name), make(name, image_size=48, seed=1)
    official = {
        key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for key, v in source.state_dict().items()
    }
    assert len(official) == len(source.state_dict()) and "blocks.1.gamma_2" in official
    adapted = target.adapt_state_dict(official)
    target.load_state_dict(adapted, strict=True)
    expected = torch.nn.functional.interpolate(
        source.pos_embed.reshape(1, 4, 4, 32).permute(0, 3, 1, 2), (6, 6), mode="bicubic"
    )
    assert torch.allclose(adapted["pos_embed"], expected.flatten(2).transpose(1, 2), atol=1e-6)
    assert torch.equal(adapted["blocks.1.ls2.gamma"], source.blocks[1].ls2.gamma)


def checkpoint(path, model, **more):
    torch.save(
        {
            "state_dict": {f"model.{key}": value for key, value in model.state_dict().items()}
            | {"loss.scale": torch.ones(1)},
            "config": {"model": "deit_s16_distilled", "model_args": TINY | {"drop_path": 0.1}},
            "spec": {"num_outputs": 5, "image_size": [32, 48], "task": "classify"},
        }
        | more,
        path,
    )


def test_load_brings_a_run_back(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    trained, averaged = (make("deit_s16_distilled", image_size=(32, 48), seed=seed) for seed in (0, 1))
    checkpoint(folder / "last.ckpt", trained)
    model, spec = models.load(tmp_path / "run")
    assert same(model, trained) and not model.training and spec["task"] == "classify"
    with pytest.raises(ValueError, match="no averaged weights"):
        models.load(tmp_path / "run", use_ema=True)
    checkpoint(
        folder / "best.ckpt",
        trained,
        ema_state_dict={f"model.{key}": value for key, value in averaged.state_dict().items()},
    )
    for use_ema, expected in ((None, averaged), (True, averaged), (False, trained)):
        assert same(models.load(tmp_path / "run", use_ema=use_ema)[0], expected)
    torch.save(trained.state_dict(), tmp_path / "plain.pth")
    with pytest.raises(ValueError, match="not a vitlab checkpoint"):
        models.load(tmp_path / "plain.pth")


def test_published_weights_that_are_not_there():
    with pytest.raises(ValueError, match="no published weights for vit5_s16"):
        initialise(make("vit5_s16"), "pretrained", name="vit5_s16")
    with pytest.raises(ValueError, match="its tags for this model are .*augreg_in21k_ft_in1k"):
        initialise(make(), "augreg_in42k", name="vit_s16")


def test_timm_models_take_the_same_path(tmp_path):
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    source, target = (timm.create_model("vit_tiny_patch16_224", num_classes=5, **args) for _ in range(2))
    assert "tensors" in initialise(
        target, str(write(tmp_path, "safetensors", source.state_dict())), name="timm/vit_tiny_patch16_224"
    )
    for key, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[key])


def test_create_starts_from_a_file_with_a_fresh_head_of_another_size(tmp_path, caplog):
    saved = make(num_outputs=9)
    torch.save(saved.state_dict(), tmp_path / "w.pth")
    with caplog.at_level("INFO", "models"):
        model = models.create("vit_s16", 5, 32, init=tmp_path / "w.pth", **TINY)
    assert torch.equal(model.blocks[1].attn.qkv.weight, saved.blocks[1].attn.qkv.weight)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5) and "a fresh one of 5 starts" in caplog.text
    same_size = models.create("vit_s16", 9, 32, init=str(tmp_path / "w.pth"), **TINY).eval()
    assert same(saved, same_size)
    with pytest.raises(ValueError, match="is it another model"):
        models.create("vit_s16", 9, 32, init=tmp_path / "w.pth", **TINY | {"embed_dim": 64})
    with pytest.raises(ValueError, match="no file or run other"):
        models.create("vit_nano4", init="other")
