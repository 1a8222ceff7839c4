"""`--init` from the command line: positions of another grid, rows of the head by name, pictures as before, foreign
files, what is refused."""

import argparse
import io
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
import yaml
from conftest import weights_of, write_pictures
from safetensors.torch import save_file
from table_files import ids, write_comp
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from timm.utils import CheckpointSaver

import models
from experiments.run import main
from models.swin import resize_table

SMALL = "--model_args.embed_dim 32 --model_args.depth 1 --model_args.num_heads 2"
VIT = f"--model vit_nano4 {SMALL}"
AS_SEEN = "--data_args.mean [0.1,0.2,0.3] --crop_pct 0.7 --data_args.interpolation bilinear"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of ant, bee, cat in `abc`, of bee, cat, dog in `bcd`, and what is run."""
    folder = tmp_path_factory.mktemp("init")
    for name in ("abc", "bcd"):
        write_pictures(
            folder / name / "train",
            dict.fromkeys([{"a": "ant", "b": "bee", "c": "cat", "d": "dog"}[letter] for letter in name], 6),
        )
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """run("--init one", "two", data="bcd") -> (exit code, what was printed); a word that names a run or a file of
    `folder` becomes its path."""

    def run(words, name="none", data="abc"):
        words = words.split()
        at = words.index("--init") + 1 if "--init" in words else 0
        for place in (folder / "runs" / words[at], folder / words[at]):
            words[at] = str(place) if at and place.exists() else words[at]
        line = (
            f"--data_dir {folder / data} --recipe none --val_fraction 0 --epochs 1 --global_batch_size 6 --workers 0 "
            f"--logger csv "
            f"--accelerator cpu --runs_dir {folder / 'runs'} --name {name}"
        )
        said = io.StringIO()
        with redirect_stdout(said), redirect_stderr(said):
            try:
                code = main([*line.split(), *words])
            except SystemExit as stop:
                code = stop.code
        return code, said.getvalue()

    return run


@pytest.fixture(scope="module")
def first(folder, run):
    """A run on ant, bee, cat, at 16 px, prepared in its own way."""
    code, said = run(f"{VIT} --image_size 16 {AS_SEEN}", "first")
    assert code == 0, said
    return network(folder, "first")


def network(folder, name):
    return {
        key.removeprefix("model."): value
        for key, value in weights_of(folder / "runs" / name / "checkpoints" / "last.ckpt").items()
    }


def prepared(folder, name):
    config = yaml.safe_load((folder / "runs" / name / "config.yaml").read_text())
    return {key: config[key] for key in ("image_size", "mean", "crop_pct", "interpolation")}


def tables(state):
    return {key: value for key, value in state.items() if key.endswith("bias_table")}


@pytest.mark.parametrize("model", [VIT, f"--model timm/vit_tiny_patch16_224 --model_args.patch_size 4 {SMALL}"])
def test_positions_come_from_the_grid_of_the_run(folder, run, model):
    name = "timm" if "timm" in model else "own"
    assert run(f"{model} --image_size 64x32", f"{name}-high")[0] == 0
    high = network(folder, f"{name}-high")["pos_embed"]
    for size, grid in (("32x64", (8, 16)), ("64x64", (16, 16))):
        code, said = run(f"{model} --init {name}-high --image_size {size} --lr 0", f"{name}-{size}")
        assert (
            code == 0 and "1 tensors resized to the image size" in said and f"image_size {size} (there 64x32)" in said
        ), said
        assert torch.equal(
            network(folder, f"{name}-{size}")["pos_embed"], resample_abs_pos_embed(high, grid, (16, 8))
        ), size
    assert (
        run(f"{model} --init {name}-high --lr 0", f"{name}-same")[0] == 0
    )  # at the run's own size, where none is given
    assert torch.equal(network(folder, f"{name}-same")["pos_embed"], high)


@pytest.mark.parametrize("model", ["swin_t", "timm/swin_tiny_patch4_window7_224"])
def test_bias_tables_come_from_the_windows_of_the_run(folder, run, model):
    name, line = (
        model.replace("/", "_"),
        f"--model {model} --model_args.embed_dim 16 --model_args.depths [1,1] --model_args.num_heads [1,2]",
    )
    assert run(f"{line} --image_size 64x32", f"{name}-high")[0] == 0
    code, said = run(f"{line} --init {name}-high --image_size 32x64 --lr 0", f"{name}-wide")
    assert code == 0 and "1 tensors resized to the image size" in said, said
    high, wide = (tables(network(folder, f"{name}-{size}")) for size in ("high", "wide"))
    old, new = (
        high["layers.1.blocks.0.attn.relative_position_bias_table"],
        wide["layers.1.blocks.0.attn.relative_position_bias_table"],
    )
    assert len(old) == len(new) == 13 * 7  # windows of 7 x 4 and of 4 x 7
    expected = (
        resize_rel_pos_bias_table(old, (4, 7), new.shape, (7, 4))
        if "timm" in model
        else resize_table(old, (4, 7), (7, 4))
    )
    assert torch.equal(new, expected)
    assert torch.equal(*(each["layers.0.blocks.0.attn.relative_position_bias_table"] for each in (high, wide)))


def test_tensors_that_nothing_resizes_are_refused(run):
    line = "--model timm/mixer_s32_224 --global_batch_size 18"
    assert run(f"{line} --image_size 128x64", "mixer")[0] == 0
    code, said = run(f"{line} --init mixer --image_size 64x128")
    assert code == 2 and "mlp_tokens.fc1.weight" in said and "give that --image_size" in said, said
    code, said = run(f"{line} --model_args.patch_size 8")
    assert code == 2 and "multiple values for keyword argument 'patch_size'" in said, said


def test_a_file_without_its_grid_has_the_one_asked_for(folder, run):
    torch.manual_seed(0)
    wide = models.create(
        "vit_nano4", 3, (16, 64), embed_dim=32, depth=1, num_heads=2
    )  # 4 x 16 patches, as many as 8 x 8
    torch.save(wide.state_dict(), folder / "wide.pth")
    code, said = run(f"{VIT} --init wide.pth --image_size 32x128 --lr 0", "wider")
    assert code == 0 and "positions taken as those of 4x16 patches, as asked for, not of 8x8" in said, said
    assert torch.equal(network(folder, "wider")["pos_embed"], resample_abs_pos_embed(wide.pos_embed, (8, 32), (4, 16)))
    line = f"--model timm/vit_tiny_patch16_224 --model_args.patch_size 4 {SMALL}"
    code, said = run(f"{line} --init wide.pth --image_size 32x128 --lr 0", "timm-wider")
    assert code == 0 and "4x16 patches" in said, said
    assert torch.equal(network(folder, "timm-wider")["pos_embed"], network(folder, "wider")["pos_embed"])
    code, said = run(f"{line} --init wide.pth --image_size 40x72 --dry_run")
    assert code == 0, said  # neither 65 nor 64 have that aspect: a square
    torch.save(
        models.create("vit_nano4", 3, (16, 32), embed_dim=32, depth=1, num_heads=2).state_dict(), folder / "half.pth"
    )
    code, said = run(f"{line} --init half.pth --image_size 64 --dry_run")
    assert code == 2 and "33 saved positions are neither a square grid nor one of the aspect 16:16" in said, said


@pytest.mark.parametrize(
    "words, outputs",
    [
        (VIT, ["head"]),
        (f"{VIT} --model_args.head_hidden 3", ["head.fc2"]),
        (f"{VIT} --model_args.dist_head true", ["head", "head_dist"]),
        ("--model timm/test_convnext", ["head.fc"]),
    ],
)
def test_rows_of_the_head_go_by_class(folder, run, words, outputs):
    one, two = (f"{'-'.join(outputs)}-{letters}{len(words)}" for letters in ("abc", "bcd"))
    assert run(f"{words} --image_size 32 --lr 0.01", one)[0] == 0
    code, said = run(f"{words} --init {one} --image_size 32 --lr 0", two, data="bcd")
    assert code == 0 and "2 of 3 classes taken, fresh: 1 (dog), left out: 1 (ant)" in said, said
    before, after = network(folder, one), network(folder, two)
    for key in before:
        if key.rpartition(".")[0] in outputs:
            assert torch.equal(after[key][:2], before[key][1:]) and before[key].any()
            assert not after[key][2].any() if "bias" in key else 0 < after[key][2].std() < 0.02
        elif not key.endswith("num_batches_tracked") and "running" not in key:
            assert torch.equal(after[key], before[key]), key


@pytest.mark.parametrize("task", ["regression", "multilabel"])
def test_rows_of_the_head_go_by_target(folder, run, task):
    draw, rows = np.random.RandomState(0), 12
    for name, targets in (("one", "pq"), ("two", "qr")):
        values = {
            target: draw.rand(rows) * 10 if task == "regression" else np.arange(rows) // (1 + ord(target) % 3) % 2
            for target in targets
        }
        write_comp(folder / f"{task}-{name}", {"Id": ids(rows)} | values)
    line = f"{VIT} --task {task} --image_size 16"
    code, said = run(f"{line} --target p,q --lr 0.01", f"{task}-p", data=f"{task}-one")
    assert code == 0, said
    code, said = run(f"{line} --target q,r --init {task}-p --lr 0", f"{task}-q", data=f"{task}-two")
    kind = "targets" if task == "regression" else "classes"
    assert code == 0 and f"1 of 2 {kind} taken, fresh: 1 (r), left out: 1 (p)" in said, said
    assert ("its targets lay within" in said) == (task == "regression")
    before, after = network(folder, f"{task}-p"), network(folder, f"{task}-q")
    assert torch.equal(after["head.weight"][0], before["head.weight"][1]) and before["head.weight"].any()
    if task == "regression":  # outputs that speak another way stand for something else
        code, said = run(f"{line} --target p,q --init {task}-p --loss mse --lr 0", f"{task}-mse", data=f"{task}-one")
        assert (
            code == 0 and "0 of 2 targets taken" in said and "outputs are sigmoid (1 a target), these linear" in said
        ), said


def test_other_classes_and_another_number(folder, run, first):
    write_pictures(folder / "bcde" / "train", {"bee": 6, "cat": 6, "dog": 6, "elk": 6})
    code, said = run(f"{VIT} --init first --lr 0", "four", data="bcde")
    assert code == 0 and "2 of 4 classes taken, fresh: 2 (dog, elk), left out: 1 (ant)" in said, said
    assert torch.equal(network(folder, "four")["head.weight"][:2], first["head.weight"][1:])
    code, said = run(f"{VIT} --init first --init_head reset --lr 0", "reset", data="bcde")
    assert code == 0 and "a fresh one of 4 starts" in said, said
    write_pictures(folder / "xyz" / "train", {"x": 6, "y": 6, "z": 6})
    code, said = run(f"{VIT} --init first --lr 0", "none-known", data="xyz")
    assert code == 0 and "0 of 3 classes taken" in said and network(folder, "none-known")["head.weight"].std() < 0.02, (
        said
    )
    code, said = run(f"{VIT} --init first", data="none-known")
    assert code == 2, said


def test_pictures_are_prepared_as_those_of_the_run(folder, run, first):
    code, said = run(f"{VIT} --init first", "as-before")
    assert code == 0 and prepared(folder, "as-before") == prepared(folder, "first") != {}, said
    assert "image_size 16x16, mean 0.1,0.2,0.3" in said and "interpolation bilinear, crop_pct 0.7" in said
    code, said = run(f"{VIT} --init first --crop_pct 0.9 --data_args.mean [0.5,0.5,0.5]", "otherwise")
    assert code == 0 and "but for mean 0.5,0.5,0.5 (there 0.1,0.2,0.3), crop_pct 0.9 (there 0.7)" in said, said
    assert prepared(folder, "otherwise") == prepared(folder, "first") | {"crop_pct": 0.9, "mean": [0.5, 0.5, 0.5]}


def test_a_part_of_a_network_is_refused_unless_asked_for(folder, run):
    theirs = torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [1, 2], [4, 4], num_classes=3)
    torch.save(theirs.state_dict(), folder / "swin.pth")
    line = (
        "--model swin_t --model_args.embed_dim 16 --model_args.depths [1,1] --model_args.num_heads [1,2] "
        "--image_size 32"
    )
    code, said = run(f"{line} --init swin.pth")
    assert (
        code == 2 and "missing beside the head" in said and "patch_embed.proj.weight" in said and "torchvision" in said
    ), said
    assert "--init_partial" in said and not (folder / "runs" / "none").exists()
    code, said = run(f"{line} --init swin.pth --init_partial", "part")
    assert code == 0 and "missing: " in said and "unexpected: " in said, said
    state = models.create("vit_nano4", 3, 16, embed_dim=32, depth=1, num_heads=2).state_dict()
    torch.save({key: value for key, value in state.items() if "head" not in key}, folder / "headless.pth")
    assert run(f"{VIT} --image_size 16 --init headless.pth --dry_run")[0] == 0


def trainer_files(folder):
    """Files as four trainers write them, of one small network: timm's (its own CheckpointSaver), DeiT's, MAE's and
    ConvNeXt's."""
    torch.manual_seed(0)
    model = models.create("vit_nano4", 3, 16, embed_dim=32, depth=1, num_heads=2)
    optimizer = torch.optim.AdamW(model.parameters())
    args = argparse.Namespace(
        model="vit_nano4", lr=1e-3, opt_betas=None, output_dir=Path("out"), best=np.float64(0.7), device="cuda"
    )
    (folder / "saved").mkdir()
    saver = CheckpointSaver(
        model, optimizer, args=args, checkpoint_dir=str(folder / "saved"), recovery_dir=str(folder / "saved")
    )
    saver.save_checkpoint(0, metric=0.5)
    (folder / "saved" / "last.pth.tar").rename(folder / "timm.pth.tar")
    common = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "scaler": {"scale": 65536.0},
        "args": args,
    }
    torch.save(common | {"lr_scheduler": {"base_values": [1e-3]}, "model_ema": model.state_dict()}, folder / "deit.pth")
    torch.save(common, folder / "mae.pth")
    torch.save(common | {"max_accuracy": np.float64(81.2)}, folder / "convnext.pth")
    with (
        zipfile.ZipFile(folder / "convnext.pth") as new,
        zipfile.ZipFile(folder / "numpy1.pth", "w") as old,
    ):  # as NumPy 1 names its numbers
        for entry in new.infolist():
            old.writestr(entry, new.read(entry).replace(b"numpy._core.", b"numpy.core."))
    return model.state_dict()


class Unknown:
    """Nothing that a file of weights may hold."""


def test_files_of_other_trainers(folder, run):
    state = trainer_files(folder)
    for file in ("timm.pth.tar", "deit.pth", "mae.pth", "convnext.pth", "numpy1.pth"):
        code, said = run(f"{VIT} --image_size 16 --init {file} --dry_run")
        assert code == 0 and f"{file}: {len(state)} of {len(state)} tensors\n" in said, said
    torch.save({"model": state, "hook": Unknown()}, folder / "unknown.pth")
    code, said = run(f"{VIT} --image_size 16 --init unknown.pth")
    assert code == 2 and "test_init.Unknown" in said and "weights_only=False" in said and "Traceback" not in said, said
    torch.save({"model": state, "hook": Unknown()}, folder / "old.pth", _use_new_zipfile_serialization=False)
    code, said = run(f"{VIT} --image_size 16 --init old.pth")
    assert code == 2 and "test_init.Unknown" in said, said


def test_one_rule_for_prefixes(folder, run):
    torch.manual_seed(0)
    state = models.create("vit_nano4", 3, 16, embed_dim=32, depth=1, num_heads=2).state_dict()
    lightning = {f"model.{key}": value for key, value in state.items()} | {"criterion.pos_weight": torch.ones(3)}
    torch.save({"state_dict": lightning, "epoch": 1, "hyper_parameters": {"lr": 0.1}}, folder / "lightning.ckpt")
    save_file({f"backbone.{key}": value.contiguous() for key, value in state.items()}, folder / "backbone.safetensors")
    two = {f"student.module.{key}": value for key, value in state.items()} | {
        f"teacher.module.{key}": value * 0 for key, value in state.items()
    }
    torch.save(two, folder / "two.pth")
    for file, left in (
        ("lightning.ckpt", "1 (criterion.pos_weight)"),
        ("backbone.safetensors", ""),
        ("two.pth", f"{len(state)} (teacher.module."),
    ):
        code, said = run(f"{VIT} --image_size 16 --init {file} --lr 0", file)
        assert code == 0 and f"{file}: {len(state)} of {len(state)} tensors" in said and left in said, said
        assert torch.equal(network(folder, file)["patch_embed.proj.weight"], state["patch_embed.proj.weight"])


def test_published_weights_are_named_with_what_they_learned(run, monkeypatch):
    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **more: original(name, **more))
    code, said = run("--model timm/test_vit --init pretrained --dry_run")
    assert (
        code == 0
        and "init pretrained (test_vit.r160_in1k, trained on ImageNet-1k): " in said
        and "a fresh one of 3 starts" in said
    ), said
    assert "pictures prepared as for --init pretrained: image_size 160x160" in said, said


def test_without_network_one_line(run, monkeypatch):
    def no_network(name, pretrained=False, **more):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(timm, "create_model", no_network)
    code, said = run("--model vit_s16 --init pretrained")
    assert (
        code == 2
        and said.count("\n") <= 2
        and "vit_small_patch16_224.augreg_in21k_ft_in1k could not be fetched" in said
    ), said
