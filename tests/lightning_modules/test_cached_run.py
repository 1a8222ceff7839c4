"""Training with a cached teacher: exact over kills and ranks, and refused where the cache is another run's."""

import json
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import result_of, weights_of
from small_runs import rows_of
from test_teacher_cache import HARD, MIXED, TINY, cached, prepare, taught  # noqa: F401

import datamodules
import lightning_modules
import models


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a.keys() | b.keys())


@pytest.mark.fault
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_twice_in_mid_epoch_is_uninterrupted_to_the_byte(taught, launch, ranks):  # noqa: F811
    cached(taught, launch, f"{MIXED} --epochs 3", ranks)
    line = (
        f"{TINY} --devices {ranks} {MIXED} --epochs 3 --teacher cache --distill soft --distill_args.tau 2 "
        f"--model_args.dist_head true --lr 1e-2 "
        "--save_every_steps 1"
    )
    whole = launch(f"{line} --name whole", ranks=ranks)
    assert whole.code == 0, "\n".join(whole.outs)
    for step in (2, 7):
        assert launch(f"{line} --name killed", ranks=ranks, kill_at_step=step).code == -9
    ended = launch(f"{line} --name killed", ranks=ranks)
    assert ended.code == 0 and "resumed from" in ended.out, "\n".join(ended.outs)
    runs = taught / "runs"
    for name in ("best.ckpt", "last.ckpt"):
        assert same(
            weights_of(runs / "whole" / "checkpoints" / name), weights_of(runs / "killed" / "checkpoints" / name)
        )
    a, b = (
        [{key: value for key, value in row.items() if "perf/" not in key} for row in rows_of(runs / name)]
        for name in ("whole", "killed")
    )
    assert a == b and len(a) >= 3
    assert [
        key
        for key in torch.load(runs / "whole" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        if "teacher" in key
    ] == []


def test_cached_training_is_live_training_and_two_ranks_are_one(taught, launch):  # noqa: F811
    """Without mixing and batch norm, with all classes kept: the live teacher's run to float16's rounding, on one rank
    and on two."""
    cached(taught, launch, f"{HARD} --epochs 2 --topk 3")
    line = f"{TINY} {HARD} --epochs 2 --distill soft --lr 1e-2 --optimizer sgd"
    for name, rest, ranks in (
        ("live", "--teacher runs/teacher", 1),
        ("pair", "--teacher runs/teacher --devices 2", 2),
        ("one", "--teacher cache", 1),
        ("two", "--teacher cache --devices 2", 2),
    ):
        ended = launch(f"{line} {rest} --name {name}", ranks=ranks)
        assert ended.code == 0, "\n".join(ended.outs)
    live, pair, one, two = (
        weights_of(taught / "runs" / name / "checkpoints" / "last.ckpt") for name in ("live", "pair", "one", "two")
    )
    assert all((live[key].double() - pair[key].double()).abs().max() < 1e-6 for key in live)
    assert all(
        (live[key].double() - one[key].double()).abs().max() < 1e-4 for key in live
    )  # the cache is in half precision
    assert all((one[key].double() - two[key].double()).abs().max() < 1e-6 for key in one)
    assert result_of(taught / "runs" / "one")["test/acc1"] == result_of(taught / "runs" / "two")["test/acc1"]


def in_a_trainer_of_ones_own(folder: Path) -> None:
    """The same cache and the same checks through `lightning_modules.create`."""
    prepared = models.preprocessing("vit_nano4") | {"image_size": 16}
    flags = dict(max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)

    def made(**knobs):
        data = datamodules.create(
            "folder",
            data_dir=str(folder / "pics"),
            global_batch_size=8,
            micro_batch_size=2,
            workers=0,
            **prepared,
            **knobs,
        )
        small = {"embed_dim": 16, "depth": 1}
        return lightning_modules.create("vit_nano4", data, folder / "cache", epochs=2, model_args=small), data

    task, data = made()
    trainer = L.Trainer(**flags, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(task, datamodule=data)
    assert torch.isfinite(trainer.callback_metrics["train/distill_loss"])
    task, data = made(hflip=0.0)
    with pytest.raises(ValueError, match="hflip 0.5 -> 0.0"):
        L.Trainer(**flags).fit(task, datamodule=data)
    with pytest.raises(ValueError, match="belong to the rows of a data module"):
        L.Trainer(**flags).fit(task, data.train_dataloader())


def test_a_cache_of_another_run_is_refused_before_anything_is_written(taught, launch):  # noqa: F811
    cached(taught, launch, "--epochs 2")
    for flags, words in (
        ("--seed 1", "seed 0 -> 1"),
        ("--hflip 0", "hflip 0.5 -> 0.0"),
        ("--image_size 24", "image_size [16, 16] -> [24, 24]"),
        ("--epochs 3", "2 are stored, 3 asked for"),
        ("--distill features", "holds logits"),
        ("--teacher cache,runs/teacher", "stands alone"),
        ("--teacher_init runs/teacher", "is a cache of its answers"),
    ):
        ended = launch(f"{TINY} --epochs 2 --teacher cache --name student {flags}")
        assert ended.code == 2 and words in ended.out, ended.out
        assert "Traceback" not in ended.out and not (taught / "runs" / "student").exists()
    in_a_trainer_of_ones_own(taught)
    (taught / "cache" / "epoch0001-rank0.safetensors").unlink()
    ended = launch(f"{TINY} --epochs 2 --teacher cache --name student")
    assert ended.code == 2 and "1 shards are missing" in ended.out


def test_a_cache_exchanged_under_its_name_is_refused_on_resume(taught, launch):  # noqa: F811
    cached(taught, launch, "--epochs 2")
    line = f"{TINY} --epochs 2 --teacher cache --name student --save_every_steps 1"
    assert launch(line, kill_at_step=2).code == -9
    shutil.rmtree(taught / "cache")
    cached(taught, launch, "--epochs 2 --topk 1")
    ended = launch(line)
    assert ended.code == 2 and "the teacher cache: its content is another" in ended.out, ended.out


def test_mixed_passes_are_of_the_size_the_teacher_saw(taught, launch):  # noqa: F811
    cached(taught, launch, "--mixup 0.8 --epochs 1")
    ended = launch(TINY.replace("--micro_batch_size 2", "--mixup 0.8 --epochs 1 --teacher cache --name student"))
    assert ended.code == 0, ended.out
    assert "micro_batch_size: 2" in (taught / "runs" / "student" / "config.yaml").read_text()
    assert json.loads((taught / "cache" / "cache.json").read_text())["identity"]["pass_size"] == 2
