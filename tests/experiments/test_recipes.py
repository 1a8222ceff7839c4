"""Recipes: the values of the papers' code, small files with their evidence, and each one trains."""

import csv
from dataclasses import fields

import pytest
import torch
import yaml
from conftest import result_of, write_pictures

import models
from datamodules.knobs import height_width
from experiments.cli import recipes
from experiments.cli.recipes import RECIPES, recipe_names
from experiments.config import Config, parse
from experiments.run import main
from models import pretrained

RAND = "rand-m9-mstd0.5-inc1"
# google-research/big_vision 0127fb6: configs/vit_i1k.py:63-177, configs/vit_s16_i1k.py:33-105
BIG_VISION = {
    "lr": 1e-3,
    "warmup_steps": 10_000,
    "weight_decay": 0.1,
    "label_smoothing": 0.0,
    "crop_scale": (0.05, 1.0),
    "augment_args": {"mix_mode": "roll"},
    "interpolation": "bilinear",
    "crop_pct": 0.875,
}
SIMPLE_VIT = BIG_VISION | {
    "model": "simple_vit_s16",
    "global_batch_size": 1024,
    "rand_augment": "rand-m10-n2-p1.0",
    "mixup": 0.2,
}
# facebookresearch/deit 7e160fe main.py:32-188
MIX = {"mixup": 0.8, "cutmix": 1.0}
DEIT = MIX | {
    "epochs": 300,
    "global_batch_size": 1024,
    "lr": 1e-3,
    "schedule": "deit",
    "warmup_epochs": 5.0,
    "warmup_lr": 1e-6,
    "min_lr": 1e-5,
    "clip_grad": None,
    "rand_augment": RAND,
    "random_erasing": 0.25,
    "repeated_augment": 3,
    "crop_pct": 0.875,
    "model_args": {"drop_path": 0.1},
}
# the same, README_revenge.md:81,412 and "finetuning for ViT-B, L and H"; wangf3014/ViT-5 b7b0796 README.md
DEIT3 = MIX | {
    "epochs": 800,
    "global_batch_size": 2048,
    "optimizer": "lamb",
    "optimizer_args": {"eps": 1e-8},
    "schedule": "deit",
    "warmup_epochs": 5.0,
    "warmup_lr": 1e-6,
    "min_lr": 1e-5,
    "clip_grad": None,
    "loss": "bce_deit3",
    "label_smoothing": 0.0,
    "repeated_augment": 3,
    "augment_args": {"auto_augment": "3a", "color_jitter": 0.3},
}
SMALL3, BASE3 = (
    {"lr": 4e-3, "model_args": {"drop_path": 0.05}},
    {"lr": 3e-3, "model_args": {"drop_path": 0.2}, "image_size": 192},
)
AVERAGED = {"ema_decay": 0.99996, "use_ema": False}
TUNE3 = MIX | {
    "epochs": 20,
    "global_batch_size": 512,
    "lr": 1e-5,
    "schedule": "deit",
    "warmup_epochs": 5.0,
    "warmup_lr": 1e-6,
    "min_lr": 1e-5,
    "weight_decay": 0.1,
    "clip_grad": None,
    "rand_augment": RAND,
}
# microsoft/Swin-Transformer f82860b config.py:151-235, main.py:327-334, configs/swin/*.yaml
SWIN = MIX | {
    "epochs": 300,
    "global_batch_size": 1024,
    "lr": 1e-3,
    "schedule": "swin",
    "warmup_epochs": 20.0,
    "warmup_lr": 1e-6,
    "min_lr": 1e-5,
    "clip_grad": 5.0,
    "rand_augment": RAND,
    "random_erasing": 0.25,
    "crop_pct": 0.875,
}
# facebookresearch/ConvNeXt 048efce main.py:49-202, TRAINING.md:13-120,295-380
CONVNEXT = MIX | {
    "epochs": 300,
    "global_batch_size": 4096,
    "lr": 4e-3,
    "schedule": "convnext",
    "warmup_epochs": 20.0,
    "min_lr": 1e-6,
    "clip_grad": None,
    "rand_augment": RAND,
    "random_erasing": 0.25,
    "ema_decay": 0.9999,
}
AT_384 = {"image_size": 384, "init": "pretrained", "epochs": 30, "weight_decay": 1e-8}
SQUASHED = {"crop_pct": 1.0, "crop_mode": "squash"}
CIFAR = {
    "image_size": 32,
    "epochs": 20,
    "warmup_epochs": 2.0,
    "weight_decay": 0.1,
    "label_smoothing": 0.0,
    "crop_scale": (0.6, 1.0),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
}
NANO = {"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}

TABLE = {  # every knob of training that is not at its default, with rates as they are after scaling
    "vit_b16": BIG_VISION
    | {
        "model": "vit_b16",
        "model_args": {"head": "mlp_tanh", "head_bias": -6.9, "gelu": "tanh"},
        "epochs": 300,
        "global_batch_size": 4096,
        "loss": "sigmoid",
        "rand_augment": "rand-m15-mmax15-n2-p1.0",
        "mixup": 0.5,
    },
    "simple_vit_s16": SIMPLE_VIT | {"epochs": 90},
    "simple_vit_s16_300": SIMPLE_VIT | {"epochs": 300},
    **{
        f"deit_{name}": DEIT | {"model": f"deit_{name}"}
        for name in ("ti16", "s16", "b16", "ti16_distilled", "s16_distilled", "b16_distilled")
    },
    "deit_b16_384": DEIT
    | AT_384
    | {"model": "deit_b16", "model_args": {}, "global_batch_size": 512, "lr": 5e-6, "min_lr": 5e-6},
    "deit3_s16": DEIT3 | SMALL3 | {"model": "deit3_s16", "crop_pct": 1.0},
    "deit3_b16": DEIT3 | BASE3 | {"model": "deit3_b16", "crop_pct": 1.0},
    "deit3_b16_224": TUNE3
    | {"model": "deit3_b16", "image_size": 224, "model_args": {"drop_path": 0.2}, "crop_pct": 1.0},
    "vit5_s16": DEIT3 | SMALL3 | AVERAGED | {"model": "vit5_s16"},
    "vit5_b16": DEIT3 | BASE3 | AVERAGED | {"model": "vit5_b16"},
    "vit5_b16_224": TUNE3 | {"model": "vit5_b16", "image_size": 224, "model_args": {"drop_path": 0.25}},
    **{
        f"swin_{name}": SWIN | {"model": f"swin_{name}", "model_args": {"drop_path": rate}}
        for name, rate in (("t", 0.2), ("s", 0.3), ("b", 0.5))
    },
    "swin_b_384": SWIN
    | AT_384
    | SQUASHED
    | {
        "model": "swin_b",
        "init": "ms_in1k",
        "model_args": {"drop_path": 0.5, "window_size": 12},
        "lr": 4e-5,
        "warmup_epochs": 5.0,
        "warmup_lr": 4e-8,
        "min_lr": 4e-7,
    },
    **{
        f"convnext_{name}": CONVNEXT | {"model": f"convnext_{name}", "model_args": {"drop_path": rate}}
        for name, rate in (("t", 0.1), ("s", 0.4), ("b", 0.5))
    },
    "convnext_b_384": CONVNEXT
    | AT_384
    | SQUASHED
    | {
        "model": "convnext_b",
        "init": "fb_in1k",
        "model_args": {"drop_path": 0.8, "head_init_scale": 0.001},
        "global_batch_size": 512,
        "lr": 5e-5,
        "warmup_epochs": 0.0,
        "layer_decay": 0.7,
        "mixup": 0.0,
        "cutmix": 0.0,
        "ema_decay": None,
    },
    # "ResNet strikes back" (2110.00476) table 2, procedure A1
    "resnet50_a1": {
        "model": "timm/resnet50",
        "model_args": {"drop_path": 0.05},
        "epochs": 600,
        "global_batch_size": 2048,
        "lr": 5e-3,
        "optimizer": "lamb",
        "schedule": "timm",
        "warmup_epochs": 5.0,
        "warmup_lr": 1e-4,
        "min_lr": 1e-6,
        "weight_decay": 0.01,
        "clip_grad": None,
        "loss": "bce_rsb",
        "rand_augment": "rand-m7-mstd0.5-inc1",
        "repeated_augment": 3,
        "mixup": 0.2,
        "cutmix": 1.0,
        "crop_pct": 0.95,
    },
    # google-research/big_vision 2f3f493 configs/proj/distill/bit_i1k.py
    "patient": {
        "epochs": 1200,
        "global_batch_size": 4096,
        "lr": 3e-2,
        "warmup_steps": 5000,
        "weight_decay": 3e-4 / 3e-2,
        "label_smoothing": 0.0,
        "crop_scale": (0.05, 1.0),
        "interpolation": "bilinear",
        "crop_pct": 0.875,
        "mixup": 1.0,
        "augment_args": {"mix_mode": "roll"},
        "distill": "soft",
        "distill_args": {"alpha": 1.0, "tau": 1.0},
        "teacher": "runs/t",
    },
    # one network, two papers' choices
    "cifar10_simple_vit": CIFAR
    | {
        "model": "simple_vit_s16",
        "model_args": NANO,
        "rand_augment": "rand-m10-n2-p1.0",
        "mixup": 0.2,
        "augment_args": {"mix_mode": "roll"},
    },
    "cifar10_vit": CIFAR
    | {"model": "vit_nano4", "model_args": NANO | {"gelu": "tanh", "pool": "cls", "pos": "learned"}},
}
OWN = {
    "demo",
    "finetune",
    "finetune_large",
    "cifar10_teacher",
    "cifar10_token",
    *(  # nothing published to compare with
        f"{data}_{network}"
        for data in ("pawpularity", "classify_leaves")
        for network in ("vit_small_patch32_224", "convnext_small", "swin_base", "efficientnet_b3")
    ),
}
PARAMETERS = {
    "deit_ti16": 5_717_416,
    "deit_s16": 22_050_664,
    "deit_b16": 86_567_656,
    "deit_b16_384": 86_859_496,
    "deit_ti16_distilled": 5_910_800,
    "deit_s16_distilled": 22_436_432,
    "deit_b16_distilled": 87_338_192,
    "deit3_s16": 22_059_496,
    "deit3_b16_224": 86_585_320,
    "swin_t": 28_288_354,
    "swin_s": 49_606_258,
    "swin_b": 87_768_224,
    "convnext_t": 28_589_128,
    "convnext_s": 50_223_688,
    "convnext_b": 88_591_464,
    "resnet50_a1": 25_557_032,
    "simple_vit_s16": 21_974_632,
}  # timm's counts

VIT = "--model_args.depth 2 --model_args.embed_dim 32 --model_args.num_heads 2 --image_size 32"
SMALLER = {
    "swin": "--model_args.embed_dim 12 --model_args.depths [1,1,1,1] --model_args.num_heads [1,2,3,4] --image_size 64",
    "convnext": "--model_args.dims [8,16,16,16] --model_args.depths [1,1,1,1] --image_size 32",
    "resnet50": "--model timm/resnet18 --image_size 32",
    "finetune": "--image_size 32",
    "demo": "",
    "cifar10_teacher": "",
    **dict.fromkeys(("pawpularity", "classify_leaves"), "--model timm/resnet18 --image_size 32"),
}
TEACHER = {"patient": ["--teacher", "runs/t"]}
ANY_MODEL = ("finetune", "patient")
QUICK = {"vit_b16", "simple_vit_s16", "deit_ti16_distilled", "deit3_s16", "swin_t", "convnext_b_384"}


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_is_short_and_carries_its_evidence(name):
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    header = [line for line in lines if line.startswith("#")]
    assert len(lines) <= 30 and lines[: len(header)] == header and max(map(len, lines)) <= 150
    assert not header[0].startswith(("# run:", "# measured:"))
    assert (
        sum(line.startswith("# run: ") for line in header)
        == sum(line.startswith("# measured: ") for line in header)
        == 1
    )
    run = next(line.split("run.py", 1)[1].split("(")[0].split() for line in header if line.startswith("# run: "))
    assert parse(run).recipe == name or name == "finetune" and parse([*run, "--data", "folder"]).recipe == name
    if name in TABLE and not name.startswith("cifar10"):
        assert any(line.startswith("# published: ") for line in header) and any(
            line.startswith("# source: ") for line in header
        )


def test_every_published_recipe_is_in_the_table():
    assert set(TABLE) | OWN == set(recipe_names()) and not set(TABLE) & OWN


@pytest.mark.parametrize("name", TABLE)
def test_resolved_values_are_the_published_ones(name):
    cfg, standard = parse(["--recipe", name, *TEACHER.get(name, [])]), Config()
    place = {knob.name for knob in fields(Config) if knob.metadata["role"] == "place"}
    differing = {
        knob.name: getattr(cfg, knob.name)
        for knob in fields(Config)
        if knob.name not in place and getattr(cfg, knob.name) != getattr(standard, knob.name)
    }
    for key, value in TABLE[name].items():
        wanted = pytest.approx(value) if isinstance(value, float) else value
        assert getattr(cfg, key) == wanted, key
    assert set(differing) == {key for key, value in TABLE[name].items() if value != getattr(standard, key)}


def test_only_deit_and_swin_scale_the_rate():
    scaled = {
        name
        for name in TABLE
        if parse(["--recipe", name, *TEACHER.get(name, []), "--global_batch_size", "2000"]).lr
        != TABLE[name].get("lr", Config().lr)
    }
    assert scaled == {name for name in TABLE if name.startswith(("deit_", "swin"))}
    cfg = parse(["--recipe", "swin_t", "--global_batch_size", "2048"])
    assert (cfg.lr, cfg.warmup_lr, cfg.min_lr) == (2e-3, pytest.approx(2e-6), pytest.approx(2e-5))
    cfg = parse(["--recipe", "deit_s16", "--global_batch_size", "2048"])
    assert (cfg.lr, cfg.warmup_lr, cfg.min_lr) == (2e-3, 1e-6, 1e-5)


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: vit_b16\nwarmup_epoch: 5\n", "unknown key 'warmup_epoch'; did you mean warmup_epochs"),
        ("data_dir: /data\n", "sets 'data_dir'"),
        ("data_args: {per_class: 1}\n", "sets 'data_args'"),
        ("- lr\n", "holds no keys"),
    ],
)
def test_wrong_recipe_is_refused(tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.setattr(recipes, "RECIPES", tmp_path)
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        parse(["--recipe", "mine"])
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, training",
    [
        ("swin_b_384", "ImageNet-1k"),
        ("convnext_b_384", "ImageNet-1k"),
        ("deit_b16_384", "ImageNet-1k"),
        ("pawpularity_swin_base", "ImageNet-22k, then ImageNet-1k"),
    ],
)
def test_a_recipe_starts_from_the_weights_of_its_figure(name, training):
    cfg = parse(["--recipe", name])
    weights = pretrained.published_name(cfg.model, None if cfg.init == "pretrained" else cfg.init)
    assert pretrained.trained_on(weights.partition(".")[2]) == training


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_builds_its_network(name):
    cfg = parse(["--recipe", name, *TEACHER.get(name, []), *(["--model", "vit_s16"] if name in ANY_MODEL else [])])
    with torch.device("meta"):
        network = models.create(cfg.model, 1000, cfg.image_size and height_width(cfg.image_size), **cfg.model_args)
    if name in PARAMETERS:
        assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in recipe_names()]
)
def test_recipe_trains_two_steps(name, tmp_path, launch):
    for split, seed in (("train", 1), ("val", 2)):
        write_pictures(tmp_path / "pics" / split, {"dark": 4, "light": 4}, side=40, seed=seed)
    line = (
        f"--recipe {name} --data_dir pics --epochs 1 --global_batch_size 4 --lr 1e-3 --workers 0 --logger csv --name "
        f"it "
        f"{next((flags for start, flags in SMALLER.items() if name.startswith(start)), VIT)}"
    )
    line += " --model vit_s16" * (name in ANY_MODEL) + " --init null" * (
        "\ninit: " in (RECIPES / f"{name}.yaml").read_text()
    )
    line += f" {VIT}" * (name == "finetune_large") + " --data folder" * (name == "demo")
    if name in TEACHER:
        assert (
            launch(
                f"--model vit_s16 {VIT} --data_dir pics --epochs 1 --global_batch_size 4 --workers 0 --logger csv "
                f"--name t"
            ).code
            == 0
        )
        line += " --warmup_steps 1 " + " ".join(TEACHER[name])
    ended = launch(line)
    assert ended.code == 0, ended.out
    result = result_of(tmp_path / "runs" / "it")
    assert result["steps"] == 2 and result["finished"] is True
    with open(tmp_path / "runs" / "it" / "metrics.csv", newline="") as file:
        assert all(float(row["train/loss"]) > 0 for row in csv.DictReader(file))
    stored = yaml.safe_load((tmp_path / "runs" / "it" / "config.yaml").read_text())
    wanted = parse(["--recipe", name, *TEACHER.get(name, [])]).filled(loss="cross_entropy")
    for key in ("loss", "optimizer", "schedule", "rand_augment", "repeated_augment", "mixup", "ema_decay"):
        assert stored[key] == getattr(wanted, key)


def test_convnexts_stem_learns_at_the_published_share_of_the_rate(pics, monkeypatch):
    """0.7 over 12 groups of layers (facebookresearch/ConvNeXt optim_factory.py), where a layer a block would leave 0.7
    ** 37."""
    monkeypatch.chdir(pics)
    line = (
        "--recipe convnext_b_384 --init null --data_dir pics --image_size 32 --model_args.dims [4,4,4,4] "
        "--model_args.depths [1,1,27,1] "
        "--epochs 1 --workers 0 --logger csv --name tuned --global_batch_size 16 --log_every_steps 1"
    )
    assert main(line.split()) == 0
    with open(pics / "runs" / "tuned" / "metrics.csv") as file:
        shares = {float(key.removeprefix("lr/x")) for key in csv.DictReader(file).fieldnames if key.startswith("lr/x")}
    assert min(shares) == pytest.approx(0.7**13, rel=1e-3) and len(shares) == 13


@pytest.mark.slow
def test_layer_decay_of_finetune_follows_the_depth(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    deep = (
        "--model swin_s --recipe finetune --data digits --image_size 32 --model_args.embed_dim 12 "
        "--model_args.num_heads [1,1,1,1] "
        "--model_args.window_size 2 --epochs 1 --workers 0 --dry_run"
    )
    assert main(deep.split()) == 0
    assert "layer_decay 0.8611: the recipe's 0.75 is for 12 layers and swin_s has 24" in capsys.readouterr().out
    for given in ("--layer_decay 0.75", "--model vit_nano4"):
        assert (
            main(
                [*deep.split(), *given.split()]
                if "decay" in given
                else f"{given} --recipe finetune --data digits --dry_run".split()
            )
            == 0
        )
        assert "0.8611" not in capsys.readouterr().out


def test_a_recipes_model_args_are_for_its_model(capsys, tmp_path):
    line = f"--dry_run --logger csv --accelerator cpu --workers 0 --global_batch_size 4 --runs_dir {tmp_path}"
    assert main(f"--recipe demo --model timm/test_convnext --model_args.drop_path 0.1 {line}".split()) == 0
    said = capsys.readouterr().out
    assert (
        "model_args of the recipe are for vit_nano4 and left out: patch_size, embed_dim, depth, num_heads, pool" in said
    )
    assert parse(["--recipe", "demo", "--model", "timm/test_convnext", "--model_args.drop_path", "0.1"]).model_args == {
        "drop_path": 0.1
    }
    assert parse(["--recipe", "demo", "--model_args.depth", "2"]).model_args == {
        "patch_size": 8,
        "embed_dim": 64,
        "depth": 2,
        "num_heads": 4,
        "pool": "mean",
    }
    assert parse(["--recipe", "convnext_b_384", "--model", "convnext_s"]).model_args == {}
