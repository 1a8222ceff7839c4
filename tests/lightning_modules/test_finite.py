"""What is not finite: a training ends with a sentence, nothing of it is scored, saved, loaded, exported or ranked, and
sound weights stay."""

import json
import shutil

import lightning as L
import pandas as pd
import pytest
import torch
from conftest import kept_environment, write_pictures

import datamodules
import models
from experiments import compare, export, predict, run
from experiments.config import read
from experiments.running import build, training
from lightning_modules.callbacks.finite import Finite, NotFinite
from lightning_modules.loggers.csv_logger import read_history
from lightning_modules.task import Task
from models import pretrained

SMALL = (
    "--data_dir pics --model vit_nano4 --model_args.embed_dim 32 --model_args.depth 1 --recipe none --image_size 16 "
    "--global_batch_size 8 "
    "--workers 0 --logger csv --accelerator cpu"
)
WILD = f"{SMALL} --epochs 4 --optimizer sgd --lr 1e30 --clip_grad null --warmup_steps 0"
LATE = (
    f"{SMALL} --epochs 4 --optimizer sgd --lr 1e30 --clip_grad null --schedule timm --warmup_epochs 1 "
    "--optimizer_args.warmup_lr 1e-4"
)  # wild from epoch 2 on


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pictures of three classes, and a sound run `sound` over one epoch."""
    root = tmp_path_factory.mktemp("finite")
    write_pictures(root / "pics" / "train", {"dark": 14, "grey": 13, "light": 13}, seed=1)
    write_pictures(root / "pics" / "test", {"dark": 3, "grey": 2, "light": 2}, seed=2)
    with kept_environment(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert run.main(f"{SMALL} --epochs 1 --lr 1e-3 --name sound".split()) == 0
    return root


@pytest.fixture(autouse=True)
def there(place, monkeypatch):
    monkeypatch.chdir(place)


def spoil(source, file, key="state_dict"):
    """A copy of a checkpoint with one NaN."""
    content = torch.load(source, weights_only=True)
    content[key]["model.head.weight"][0, 0] = torch.nan
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, file)
    return file


def ended(line):
    """Exit code, also where the run leaves by SystemExit."""
    try:
        return run.main(line.split())
    except SystemExit as stop:
        return stop.code


def test_a_wild_run_ends_with_a_sentence_and_leaves_no_weights(place, capsys):
    assert ended(f"{WILD} --name wild") == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith(
        "run.py: the loss is nan at step 2 (epoch 1), which learns from the pictures of the rows "
    )
    for words in (
        "train/",
        "and 3 more of train",
        "the last finite loss was 1.",
        "at step 1, with learning rate 1e+30 and gradient norm ",
        "a lower --lr (1e+29), --clip_grad 1",
        "No weights had been saved yet",
    ):
        assert words in said[0]
    folder = place / "runs" / "wild"
    result = json.loads((folder / "result.json").read_text())
    assert result["finished"] is False and said[0] == f"run.py: {result['not_finite']}"
    assert result["not_finite"][:20] in (folder / "report.html").read_text()
    assert not [*folder.glob("checkpoints/*")] and not any(
        "val/acc1" in row for row in read_history(folder / "metrics.csv")
    )
    with pytest.raises(FileNotFoundError):
        models.load(folder)
    assert compare.main(["runs/sound", "runs/wild", "--out", "compared"]) == 0
    table = pd.read_csv("compared/runs.csv").set_index("name")
    assert (
        table.index[0] == "sound"
        and pd.isna(table.loc["wild", "best"])
        and "the loss is nan at step 2" in table.loc["wild", "notes"]
    )


def test_the_rows_are_those_of_the_first_bad_step(place, monkeypatch, capsys):
    """One pass of two is not finite, at a step that is not the last before a look."""
    step, seen = Task.training_step, []

    def training_step(self, batch, batch_idx):
        outputs = step(self, batch, batch_idx)
        seen.append(sorted(batch["index"].tolist()))
        return outputs | {"loss": outputs["loss"] * (float("inf") if len(seen) == 4 else 1)}

    monkeypatch.setattr(Task, "training_step", training_step)
    assert ended(f"{SMALL} --epochs 1 --lr 1e-3 --micro_batch_size 4 --name rows") == 1
    said = capsys.readouterr().err
    assert "the loss is inf at step 2 (epoch 1)" in said and len(seen) > 4
    assert [
        int(word) for word in said.partition("rows ")[2].partition(" of train")[0].split() if word.isdigit()
    ] == seen[3]


def test_gradients_that_are_not_finite_end_it_too_but_not_under_a_scaler(place, monkeypatch, capsys):
    step = Task.training_step

    def training_step(self, batch, batch_idx):
        outputs = step(self, batch, batch_idx)
        zero = self.model.head.bias.sum() * 0
        return outputs | {
            "loss": outputs["loss"] + (zero.sqrt() if self.global_step == 2 else zero)
        }  # the root's slope at 0 is infinite

    monkeypatch.setattr(Task, "training_step", training_step)
    assert ended(f"{SMALL} --epochs 1 --lr 1e-3 --name slope") == 1
    assert "the gradient norm is nan at step 3 (epoch 1)" in capsys.readouterr().err
    made = build.resolve(read(f"{SMALL} --epochs 1 --lr 1e-3 --name scaled".split()))
    task, trainer = training.task(made), training.trainer(made)
    trainer.precision_plugin.scaler = (
        object()
    )  # as fp16 has one, which leaves such a step out; here the weights become NaN
    with pytest.raises(NotFinite, match="the loss is nan at step 4"):
        trainer.fit(task, made.data)


@pytest.mark.parametrize("more", ["", "--ema_decay 0.5 --average_checkpoints last-2 --save_every_steps 2"])
def test_sound_weights_stay_and_are_named(place, capsys, more):
    name = f"late{len(more)}"
    assert ended(f"{LATE} {more} --name {name}") == 1
    said, folder = capsys.readouterr().err, place / "runs" / name
    assert (
        "(epoch 2)" in said
        and f"runs/{name}/checkpoints/best.ckpt (step 4)" in said
        and f"runs/{name}/checkpoints/last.ckpt (step" in said
    )
    files = [*(folder / "checkpoints").glob("*.ckpt")]
    assert len(files) >= 2
    for file in files:
        content = torch.load(file, weights_only=True)
        assert not pretrained.not_finite(content["state_dict"]) and not pretrained.not_finite(
            content.get("ema_state_dict", {})
        )
    models.load(folder)
    again = ended(f"{LATE} {more} --name {name}")
    assert again == 1 and "(epoch 2)" in capsys.readouterr().err


@pytest.mark.fault
def test_all_ranks_end_together(place, launch, tmp_path):
    shutil.copytree(place / "pics", tmp_path / "pics")
    finished = launch(f"{WILD} --devices 2 --name ranks", ranks=2)
    assert (
        finished.code == 1
        and "the loss is nan at step 2" in finished.outs[0]
        and "Traceback" not in "".join(finished.outs)
    )
    assert "the loss is" not in finished.outs[1] and not [*(tmp_path / "runs" / "ranks").glob("checkpoints/*")]


def test_a_stock_trainer_ends_too(tmp_path):
    made = build.resolve(read(f"{WILD} --name stock --runs_dir {tmp_path}".split()))
    task = training.task(made)
    with pytest.raises(NotFinite, match="the loss is nan at step 2"):
        L.Trainer(
            max_epochs=2,
            logger=False,
            default_root_dir=tmp_path,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        ).fit(task, datamodules.create("folder", data_dir="pics", image_size=16, global_batch_size=8, workers=0))
    assert not [*tmp_path.rglob("*.ckpt")]


def test_a_step_reads_nothing_from_the_device(place, monkeypatch):
    """It is read at an epoch's end and before a save alone."""
    looks, check = [], Finite.check

    def counted(self, trainer, pl_module, *, weights):
        looks.append(trainer.global_step)
        check(self, trainer, pl_module, weights=weights)

    monkeypatch.setattr(Finite, "check", counted)
    assert (
        run.main(
            f"{SMALL} --global_batch_size 2 --epochs 2 --lr 1e-3 --val_fraction 0 --save_every_steps 13 --name "
            f"looks".split()
        )
        == 0
    )
    assert {*looks} == {13, 20, 26, 39, 40}


def test_outputs_that_are_not_finite_are_not_scored(place, monkeypatch, capsys):
    """Finite weights, and three pictures whose outputs are not: the epochs have no score, and the run says why it has
    none."""
    validation = Task._evaluate

    def evaluate(self, network, batch, stage, metrics):
        return validation(
            self, lambda image: network(image).index_fill(0, torch.arange(2), torch.nan), batch, stage, metrics
        )

    monkeypatch.setattr(Task, "_evaluate", evaluate)
    assert ended(f"{SMALL} --epochs 1 --lr 1e-3 --name outputs") == 1
    said = capsys.readouterr().err
    assert "warning: val: the outputs of 2 of 4 pictures are NaN or infinite, so they are not scored (epoch 1)" in said
    assert (
        "run.py: test: the outputs of 2 of 7 pictures are NaN" in said
        and "outputs/checkpoints/last.ckpt (step 4)" in said
    )
    folder = place / "runs" / "outputs"
    (row,) = [row for row in read_history(folder / "metrics.csv") if "val/loss" in row]
    assert row["val/acc1"] != row["val/acc1"] and row["val/loss"] != row["val/loss"]
    assert not (folder / "checkpoints" / "best.ckpt").exists() and not (folder / "predictions.csv").exists()


def test_weights_that_are_not_finite_are_refused_by_every_verb(place, capsys):
    bad = spoil(
        place / "runs" / "sound" / "checkpoints" / "best.ckpt", place / "runs" / "bad" / "checkpoints" / "best.ckpt"
    )
    other = f"{SMALL} --epochs 1 --lr 1e-3"
    for verb, line in (
        (export.main, "runs/bad"),
        (predict.main, "runs/bad --folder pics --accelerator cpu --out p.csv"),
        (run.main, f"{other} --init {bad} --name a"),
        (run.main, f"{other} --teacher {bad} --name b"),
        (run.main, f"--eval_only --init {bad} --name c"),
    ):
        assert verb(line.split()) == 2, line
        said = capsys.readouterr().err
        assert (
            f"{bad.relative_to(place)}: 1 of " in said and "hold NaN or infinity (the first is head.weight)" in said
        ), said
    assert (
        not [*bad.parents[1].glob("*.safetensors")]
        and not (place / "p.csv").exists()
        and not (place / "runs" / "a").exists()
    )


def test_a_resume_goes_past_weights_that_are_not_finite(place, capsys):
    line, folder = f"{SMALL} --epochs 3 --lr 1e-3 --name again", place / "runs" / "again" / "checkpoints"
    assert run.main(line.split()) == 0
    (folder.parent / "result.json").unlink()
    spoil(folder / "last.ckpt", folder / "last.ckpt")
    assert run.main(line.split()) == 0
    said = capsys.readouterr().out
    assert (
        "last.ckpt: 1 of " in said and "going on from last-1.ckpt" in said and (folder / "damaged-last.ckpt").exists()
    )


def test_an_old_run_of_such_a_network_is_not_ranked(place, capsys):
    shutil.copytree("runs/sound", "runs/old")
    file = place / "runs" / "old" / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"best": 1.0, "val/acc1": 1.0, "val/loss": None}))
    assert compare.main(["runs/sound", "runs/old", "--out", "compared"]) == 0
    row = pd.read_csv("compared/runs.csv").set_index("name").loc["old"]
    assert (
        pd.isna(row["best"])
        and "not ranked: its val/loss is no number" in row["notes"]
        and "old" in capsys.readouterr().out
    )


def test_large_numbers_are_finite():
    """Where their norm overflows too."""
    state = {
        "large": torch.full((10,), 3e38),
        "half": torch.full((1000,), 6e4, dtype=torch.float16),
        "none": torch.zeros(0),
    }
    assert pretrained.not_finite(state) == []
    state["half"][3] = torch.inf
    assert pretrained.not_finite(state) == ["half"]
