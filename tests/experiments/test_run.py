"""The main job from the command line: run directory, resume after kill -9, two processes, mistakes."""

import atexit
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import result_of, weights_of, write_damaged, write_pictures
from small_runs import TINY, rows_of

import models
from experiments import export, run
from lightning_modules.callbacks.checkpoints import BestCheckpoint


def test_a_run_leaves_what_the_contract_says(pics, launch):
    ended = launch(f"{TINY} --epochs 3 --name one")
    assert ended.code == 0, ended.out
    folder = pics / "runs" / "one"
    result = result_of(folder)
    expected = (
        "model data params gmacs metric best best_epoch stopped_epoch val/acc1 test/acc1 epochs steps lr "
        "global_batch_size train_seconds "
        "seconds_per_epoch images_per_sec peak_memory_mb world_size seed commit finished"
    )
    assert set(expected.split()) <= set(result) and result["finished"] is True and result["steps"] == 12
    rows = rows_of(folder)
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2] and [int(row["step"]) for row in rows] == [4, 8, 12]
    assert result["best"] == max(float(row["val/acc1"]) for row in rows) == result["val/acc1"]
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    assert stored["data"] == "folder" and not {"name", "runs_dir", "overwrite", "resume"} & set(stored)
    checkpoint = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert (
        checkpoint["spec"]["class_names"] == ["dark", "grey", "light"] and checkpoint["config"]["model"] == "vit_nano4"
    )
    assert all(key.startswith("model.") for key in checkpoint["state_dict"])
    network, spec = models.load(folder)
    assert not network.training and network(torch.zeros(1, 3, 16, 16)).shape == (1, spec["num_outputs"])

    again = launch(f"{TINY} --epochs 3 --name one")
    assert again.code == 0 and "already finished" in again.out and rows_of(folder) == rows
    other = launch(f"{TINY} --epochs 3 --name one --lr 1e-4")
    assert other.code == 2 and "lr 0.002 -> 0.0001" in other.out and "--name" in other.out
    assert launch(f"{TINY} --epochs 3 --name one --lr 1e-4 --overwrite").code == 0
    assert result_of(folder)["lr"] == 1e-4

    repeat = launch("--config runs/one/config.yaml --name again")
    assert repeat.code == 0, repeat.out
    first, second = (
        weights_of(folder / "checkpoints" / "last.ckpt"),
        weights_of(pics / "runs" / "again" / "checkpoints" / "last.ckpt"),
    )
    assert all(torch.equal(first[key], second[key]) for key in first)

    scored = launch("--config runs/one/config.yaml --eval_only --init runs/one --name scored")
    assert scored.code == 0 and result_of(pics / "runs" / "scored")["test/acc1"] == result_of(folder)["test/acc1"]


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_and_resumed_is_the_undisturbed_run(pics, launch, ranks):
    line = f"{TINY} --epochs 3 --save_every_steps 3 --devices {ranks} --accelerator cpu"
    whole = launch(f"{line} --name whole", ranks=ranks)
    assert whole.code == 0, whole.out
    for step in (2, 4, 8):  # before any checkpoint, inside an epoch, at an epoch's end
        assert launch(f"{line} --name killed", ranks=ranks, kill_at_step=step).code == -9
    ended = launch(f"{line} --name killed", ranks=ranks)
    assert ended.code == 0 and "resumed from" in ended.out, ended.out
    assert [int(row["epoch"]) for row in rows_of(pics / "runs" / "killed")] == [0, 1, 2]
    first, second = (weights_of(pics / "runs" / name / "checkpoints" / "last.ckpt") for name in ("whole", "killed"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert result_of(pics / "runs" / "whole")["test/acc1"] == result_of(pics / "runs" / "killed")["test/acc1"]


def test_two_processes_score_as_one(pics, launch):
    assert launch(f"{TINY} --epochs 1 --name trained").code == 0
    line = "--config runs/trained/config.yaml --eval_only --init runs/trained --accelerator cpu"
    assert launch(f"{line} --name one").code == 0
    two = launch(f"{line} --devices 2 --accelerator cpu --name two", ranks=2)
    assert two.code == 0, two.out
    one, two = result_of(pics / "runs" / "one"), result_of(pics / "runs" / "two")
    assert two["world_size"] == 2
    assert one["test/acc1"] == two["test/acc1"] and one["test/loss"] == pytest.approx(two["test/loss"], rel=1e-6)


def test_two_processes_learn_as_one_without_dropout(pics, launch):
    line = f"{TINY} --model_args.drop_path 0 --epochs 2 --accelerator cpu"
    assert launch(f"{line} --name one").code == 0
    ended = launch(f"{line} --devices 2 --accelerator cpu --name two", ranks=2)
    assert ended.code == 0, ended.out
    for one, two in zip(rows_of(pics / "runs" / "one"), rows_of(pics / "runs" / "two")):
        assert float(one["train/loss"]) == pytest.approx(float(two["train/loss"]), abs=2e-6)
        assert float(one["val/loss"]) == pytest.approx(float(two["val/loss"]), abs=2e-5)


def test_init_continues_from_a_run_and_says_what_it_took(pics, launch):
    assert launch(f"{TINY} --epochs 1 --name first").code == 0
    write_pictures(pics / "four" / "train", {"a": 9, "b": 9, "c": 9, "d": 9})
    line = TINY.replace("--data_dir pics", "--data_dir four") + " --epochs 1 --init runs/first"
    refused = launch(f"{line} --name second")
    assert refused.code == 2 and "--init_head reset" in refused.out and not (pics / "runs" / "second").exists()
    ended = launch(f"{line} --name second --init_head reset")
    assert ended.code == 0 and "a fresh one of 4 starts" in ended.out, ended.out


def test_resume_from_another_run_carries_its_full_state(pics, launch):
    line = f"{TINY} --epochs 3"
    assert launch(f"{line} --name whole").code == 0
    assert launch(f"{line} --name killed", kill_at_step=9).code == -9
    ended = launch(f"{line} --name onward --resume runs/killed")
    assert ended.code == 0 and "resumed from runs/killed" in ended.out, ended.out
    first, second = (weights_of(pics / "runs" / name / "checkpoints" / "last.ckpt") for name in ("whole", "onward"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert [int(row["epoch"]) for row in rows_of(pics / "runs" / "onward")] == [2]


def test_the_best_of_another_run_is_no_mark_to_beat(tmp_path):
    callback = BestCheckpoint(tmp_path, "val/acc1", "max")
    callback.load_state_dict({"best": 0.9})
    assert callback.best is None  # --resume brought the state, not the weights it speaks of
    callback.path.touch()
    callback.load_state_dict({"best": 0.9})
    assert callback.best == 0.9


def test_of_equal_scores_the_first_epoch_is_the_best_after_a_resume_too(pics, launch):
    line = f"{TINY} --epochs 4 --lr 0 --name equal"
    assert launch(line, kill_at_step=9).code == -9
    ended = launch(line)
    assert ended.code == 0 and "resumed from" in ended.out, ended.out
    assert len({row["val/acc1"] for row in rows_of(pics / "runs" / "equal")}) == 1
    assert result_of(pics / "runs" / "equal")["best_epoch"] == 0
    assert torch.load(pics / "runs" / "equal" / "checkpoints" / "best.ckpt", weights_only=True)["epoch"] == 0


def test_a_run_is_evaluated_as_it_was_trained_and_repeated_from_its_config(pics, launch):
    line = f"{TINY} --epochs 1 --data_args.mean [0.1,0.2,0.3] --crop_pct 0.7"
    assert launch(line).code == 0
    (folder,) = (pics / "runs").iterdir()
    scored = launch(f"--eval_only --init {folder} --logger csv --name scored")
    assert scored.code == 0, scored.out
    assert result_of(pics / "runs" / "scored")["test/acc1"] == result_of(folder)["test/acc1"]
    assert result_of(pics / "runs" / "scored")["test/loss"] == pytest.approx(result_of(folder)["test/loss"], rel=1e-6)
    assert rows_of(pics / "runs" / "scored")[0]["test/acc1"]
    again = launch(f"--config {folder}/config.yaml")
    assert again.code == 0 and "already finished" in again.out, again.out


def test_an_exported_file_and_old_foreign_weights_are_evaluated(pics, launch):
    assert launch(f"{TINY} --epochs 1 --data_args.mean [0.1,0.2,0.3] --name one").code == 0
    assert export.main([str(pics / "runs" / "one"), "--out", str(pics / "one.safetensors")]) == 0
    exported = launch("--eval_only --init one.safetensors --data_dir pics --logger csv --name exported")
    assert exported.code == 0, exported.out
    assert result_of(pics / "runs" / "exported")["test/acc1"] == result_of(pics / "runs" / "one")["test/acc1"]
    weights = {
        key.removeprefix("model."): value
        for key, value in weights_of(pics / "runs" / "one" / "checkpoints" / "best.ckpt").items()
    }
    torch.save(weights, pics / "old.pth", _use_new_zipfile_serialization=False)
    old = launch(f"{TINY} --data_args.mean [0.1,0.2,0.3] --eval_only --init old.pth --name old")
    assert old.code == 0, old.out
    assert result_of(pics / "runs" / "old")["test/acc1"] == result_of(pics / "runs" / "one")["test/acc1"]


def test_weights_left_untrained_are_no_evaluation(pics, launch):
    torch.save({"cls_token": torch.zeros(1, 1, 32)}, pics / "part.pth")
    part = launch(f"{TINY} --eval_only --init part.pth")
    assert part.code == 2 and "untrained" in part.out, part.out
    assert launch(f"{TINY} --epochs 1 --name three").code == 0
    write_pictures(pics / "four" / "val", {"a": 2, "b": 2, "c": 2, "d": 2})
    other = launch(
        f"{TINY.replace('--data_dir pics', '--data_dir four')} --eval_only --init runs/three --init_head reset"
    )
    assert other.code == 2, other.out


def test_without_val_there_is_a_history_all_the_same(pics, launch):
    assert launch(f"{TINY} --epochs 2 --val_fraction 0 --name bare").code == 0
    assert [(int(row["epoch"]), int(row["step"])) for row in rows_of(pics / "runs" / "bare")] == [(0, 5), (1, 10)]
    assert all(float(row["train/loss"]) > 0 for row in rows_of(pics / "runs" / "bare"))


def test_half_precision_and_a_distilled_student_train(pics, launch):
    line = TINY.replace("--model vit_nano4", "--model deit_ti16_distilled").replace(
        "--micro_batch_size 4", "--model_args.num_heads 2"
    )
    ended = launch(f"{line} --precision bf16-mixed --epochs 1 --name half")
    assert ended.code == 0, ended.out
    assert all(
        bool(torch.isfinite(value).all())
        for value in weights_of(pics / "runs" / "half" / "checkpoints" / "last.ckpt").values()
    )


def test_the_real_command_starts_its_own_processes(pics):
    """Lightning's launcher re-runs the command line for the second process; run.py is started as a person would."""
    command = [
        sys.executable,
        str(Path(run.__file__)),
        *f"{TINY} --epochs 1 --devices 2 --accelerator cpu --name two".split(),
    ]
    ended = subprocess.run(command, cwd=pics, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert result_of(pics / "runs" / "two")["world_size"] == 2 and ended.stdout.count("recipe none") == 1


@pytest.mark.parametrize(
    "line, words",
    [
        ("--model vit_b61 --data digits", "vit_b16"),
        ("--model timm/resnet81 --data digits", "timm/resnet"),
        ("--model vit_nano4 --data digit", "digits"),
        ("--model vit_nano4 --data digits --model_args.dept 3", "depth"),
        ("--model vit_nano4 --data digits --data_args.perclass 3", "perclass"),
        ("--data digits", "--model"),
        ("--model vit_nano4 --data_dir nowhere", "nowhere"),
        ("--model vit_nano4 --data digits --image_size 30", "32x32"),
        ("--model vit_nano4 --data digits --global_batch_size 5000", "--global_batch_size"),
        ("--devices 2", "--accelerator cpu"),
        ("--accelerator gpu", "no GPU"),
        ("--recipe demo --init nowhere.pth", "nowhere.pth"),
        ("--resume nowhere", "nowhere"),
        ("--model vit_nano4 --data digits --model_args.depth abc", "depth 'abc'"),
        ("--model vit_nano4 --data digits --model_args.depth 0", "depth 0"),
        ("--model vit_nano4 --data digits --model_args.num_outputs 5", "num_outputs"),
        ("--precision 16-mixed", "16-mixed"),
        ("--model timm/vit_tiny_patch16_224.nosuch --data digits", "augreg_in21k"),
        ("--eval_only --resume nowhere", "--init"),
        ("--model timm/resnet18 --data digits --model_args.pretrained true", "--init"),
        ("--devices 3 --accelerator cpu", "--global_batch_size"),
        ("--strategy dpp", "ddp"),
        ("--strategy fsdp", "--strategy"),
        ("--name ../up", "--name"),
        ("--patience 2 --val_fraction 0", "--patience"),
    ],
)
def test_mistakes_exit_2_in_few_lines_and_leave_nothing(tmp_path, launch, line, words):
    ended = launch(line + " --logger csv")
    assert ended.code == 2 and words in ended.out and "Traceback" not in ended.out, ended.out
    assert len(ended.out.splitlines()) <= 6 and not (tmp_path / "runs").exists()


def test_the_main_job_without_imagenet_or_devices_says_what_it_needs(tmp_path, launch):
    ended = launch("--model vit_b16 --devices 8")
    assert ended.code == 2 and all(
        word in ended.out for word in ("--devices 8", "--accelerator cpu", "data/imagenet", "--data digits")
    ), ended.out
    assert len(ended.out.splitlines()) <= 10 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_picture_ends_the_run_with_its_name(pics, launch, workers):
    write_damaged(pics / "pics" / "train" / "grey" / "3.jpg")
    write_damaged(pics / "pics" / "train" / "dark" / "4.jpg")
    ended = launch(
        f"{TINY.replace('--workers 0', '')} --workers {workers} --epochs 1 --val_fraction 0 --global_batch_size 40"
    )
    assert (
        ended.code == 1 and "cannot read picture" in ended.out and ".jpg" in ended.out and "Traceback" not in ended.out
    ), ended.out


def test_dry_run_prints_the_plan_and_writes_nothing(pics, launch):
    ended = launch(f"{TINY} --epochs 3 --dry_run")
    assert ended.code == 0 and not (pics / "runs").exists(), ended.out
    assert "8 = 1 nodes x 1 devices x 2 passes x 4 pictures" in ended.out and "12 = 3 epochs x 4" in ended.out
    assert all(word in ended.out for word in ("parameters", "GMACs", "memory", "time", "run directory"))


@pytest.mark.parametrize(
    "what, words",
    [
        ("models", ("vit_b16", "86,567,656", "17.56")),
        ("data", ("digits", "folder", "imagenet")),
        ("recipes", ("demo",)),
    ],
)
def test_list(launch, what, words):
    ended = launch(f"--list {what}")
    assert ended.code == 0 and all(word in ended.out for word in words)


def test_early_stopping_and_test_of_the_best(pics, launch):
    ended = launch(f"{TINY} --epochs 30 --patience 2 --lr 0 --name still")
    assert ended.code == 0, ended.out
    result = result_of(pics / "runs" / "still")
    assert result["stopped_epoch"] == 2 and result["epochs"] == 30


def test_two_ranks_score_the_batch_norm_that_is_saved(tmp_path, launch):
    write_pictures(tmp_path / "pics" / "train", {"dark": 20, "grey": 20, "light": 20}, side=32)
    line = (
        "--data_dir pics --image_size 32 --model timm/test_resnet --recipe none --val_fraction 0.4 --workers 0 "
        "--logger csv"
    )
    trained = launch(
        f"{line} --global_batch_size 12 --lr 3e-3 --epochs 1 --devices 2 --accelerator cpu --name two", ranks=2
    )
    assert trained.code == 0, trained.out
    scored = launch(f"{line} --eval_only --init runs/two/checkpoints/last.ckpt --name again")
    assert scored.code == 0, scored.out
    assert result_of(tmp_path / "runs" / "again")["val/loss"] == pytest.approx(
        result_of(tmp_path / "runs" / "two")["val/loss"], rel=1e-5
    )


@pytest.mark.parametrize(
    "line, words",
    [
        ("--optimizer_args.betas 0.9", "adamw does not take these values"),
        ("--augment_args.vflip abc", "vflip 'abc' is not float"),
        ("--warmup_steps 5000", "--warmup_steps 5000 is more than the run's 4 steps"),
        ("--average_checkpoints best-1 --val_fraction 0", "no val split"),
        ("--freeze 2", "fraction"),
        ("--augment_args.train_size 18", "--augment_args.train_size 18"),
        ("--loss bce_deit3", "--loss bce_deit3"),
        ("--rand_augment rand-x9", "rand_augment"),
    ],
)
def test_what_cannot_be_learned_ends_with_a_line(pics, launch, line, words):
    ended = launch(f"{TINY} --epochs 1 {line}")
    assert ended.code == 2 and words in ended.out and "Traceback" not in ended.out, ended.out
    assert not (pics / "runs").exists()


def test_what_is_perhaps_not_meant_is_said(pics, launch):
    out = launch(
        f"{TINY} --epochs 1 --ema_decay 0.9999 --freeze 0.5 --augment_args.mix_mode elem --average_checkpoints last-9 "
        "--dry_run"
    ).out
    for words in (
        "looks back over 10000 of only 4 steps",
        "keep their random first values",
        "mix_mode elem is inactive",
        "there are only 1 epochs",
    ):
        assert words in out, out


def test_another_runs_state_is_refused_with_another_optimizer(pics, launch):
    assert launch(f"{TINY} --epochs 1 --name one").code == 0
    ended = launch(f"{TINY} --epochs 2 --resume runs/one --weight_decay 0.9 --optimizer sgd --name two")
    assert ended.code == 2 and "weight_decay 0.05 -> 0.9" in ended.out and "optimizer adamw -> sgd" in ended.out, (
        ended.out
    )


def test_few_rows_are_scored_evenly_over_the_split(pics, monkeypatch):
    monkeypatch.chdir(pics)
    line = (
        "--data_dir pics --model vit_nano4 --model_args.depth 1 --image_size 16 --global_batch_size 20 --epochs 1 "
        "--workers 0 --logger csv"
    )
    assert run.main(f"{line} --data_args.limit_val 3 --name few".split()) == 0
    with open(pics / "runs" / "few" / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["target"] for row in rows] == ["dark", "grey", "light"]
    assert result_of(pics / "runs" / "few")["test/acc1"] * 3 % 1 == pytest.approx(0, abs=1e-6)


def test_a_fast_dev_run_goes_through_everything_and_keeps_nothing(pics, monkeypatch, capsys):
    monkeypatch.chdir(pics)
    monkeypatch.setattr(tempfile, "tempdir", str(pics))
    monkeypatch.setattr(atexit, "register", lambda remove, folder, **words: leave.append((folder, remove)))
    leave = []
    line = (
        "--data_dir pics --model vit_nano4 --model_args.depth 1 --image_size 16 --global_batch_size 4 --epochs 30 "
        "--workers 0 --fast_dev_run"
    )
    assert run.main(line.split()) == 0
    assert "fast_dev_run: 2 steps, 4 pictures of val and 13 of test; nothing is kept" in capsys.readouterr().out
    ((folder, remove),) = leave
    (left,) = Path(folder).iterdir()
    assert {"result.json", "report.html", "predictions.csv", "checkpoints"} <= {file.name for file in left.iterdir()}
    remove(folder)
    assert not Path(folder).exists() and not (pics / "runs").exists()


@pytest.mark.parametrize("more", ["--global_batch_size 8 --micro_batch_size 1", "--global_batch_size 1"])
def test_batch_norm_of_one_picture_is_refused_before_the_first_step(pics, monkeypatch, capsys, more):
    monkeypatch.chdir(pics)
    line = (
        f"--data_dir pics --model timm/resnet10t --recipe none --image_size 32 --epochs 1 --workers 0 --logger csv "
        f"--accelerator cpu {more}"
    )
    assert run.main(line.split()) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("run.py: --micro_batch_size 1: a pass of one picture")
        and "timm/resnet10t" in said
        and len(said.splitlines()) == 1
    )
    assert not (pics / "runs").exists()
