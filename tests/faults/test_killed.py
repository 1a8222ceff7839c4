"""Rows 1-4 and 12 of the fault table: kill -9 at any moment, resumed by the same command, ends as if nothing had
happened."""

import ast
import itertools
import os
from functools import partial

import pytest
import torch
from conftest import result_of
from sabotage import (
    TINY,
    die_at_replace,
    fixed_accuracies,
    kill_when,
    last,
    record_order,
    same_weights,
    several,
    slow_writes,
)

import models
from lightning_modules.loggers.csv_logger import read_history

pytestmark = pytest.mark.fault


def check(pics, launch, line, kills, ranks=1):
    """Kill one run at each of these steps, resume it to the end, and hold it against a run left alone."""
    line = f"{line} --devices {ranks}"
    assert (whole := launch(f"{line} --name whole", ranks=ranks)).code == 0, whole.out
    for step in kills:
        assert launch(f"{line} --name killed", ranks=ranks, kill_at_step=step).code == -9
    ended = launch(f"{line} --name killed", ranks=ranks)
    assert ended.code == 0 and "resumed from" in ended.out, ended.out
    one, other = pics / "runs" / "whole", pics / "runs" / "killed"
    assert same_weights(last(one), last(other)) and same_weights(last(one, "best.ckpt"), last(other, "best.ckpt"))
    first, second = result_of(one), result_of(other)
    assert {key for key in first if first[key] != second[key]} <= {
        "train_seconds",
        "seconds_per_epoch",
        "images_per_sec",
        "peak_memory_mb",
        "asked",
    }
    first, second = (
        [{key: value for key, value in row.items() if "perf" not in key} for row in read_history(run / "metrics.csv")]
        for run in (one, other)
    )
    assert first == (second if ranks == 1 else [pytest.approx(row, rel=1e-6) for row in second])


def test_row_1_killed_inside_an_epoch(pics, launch):
    check(pics, launch, f"{TINY} --epochs 3 --save_every_steps 3", kills=(5, 7, 7))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_row_2_two_ranks_killed_with_workers_and_accumulation(pics, launch, workers):
    line = TINY.replace("--workers 0", f"--workers {workers}").replace("--micro_batch_size 4", "--micro_batch_size 2")
    check(pics, launch, f"{line} --epochs 3 --save_every_steps 3", kills=(4, 7), ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("every", [4, 5])
def test_row_3_killed_right_after_an_epochs_last_step(pics, launch, every, workers):
    line = TINY.replace("--workers 0", f"--workers {workers}")
    check(pics, launch, f"{line} --epochs 3 --save_every_steps {every}", kills=(4, 8))


@pytest.mark.slow
def test_row_3_killed_between_the_last_step_and_its_checkpoint(pics, launch):
    """The epoch's checkpoint is not there yet; best.ckpt, saved before it, is."""
    line = f"{TINY} --epochs 3 --save_every_steps 3"
    assert launch(f"{line} --name whole").code == 0
    assert (
        launch(f"{line} --name killed", before=partial(die_at_replace, "last.ckpt", 4)).code == -9
    )  # steps 3, 4, 6, 8
    ended = launch(f"{line} --name killed")
    assert ended.code == 0 and same_weights(last(pics / "runs" / "whole"), last(pics / "runs" / "killed")), ended.out


@pytest.mark.slow
@pytest.mark.parametrize("ranks, workers, step", [(1, 2, 4), (1, 2, 6), (2, 2, 4), (2, 0, 7)])
def test_row_4_the_order_after_a_resume_is_the_uninterrupted_one(pics, launch, ranks, workers, step):
    line = TINY.replace("--workers 0", f"--workers {workers}") + f" --epochs 3 --save_every_steps 3 --devices {ranks}"
    assert (
        launch(f"{line} --name whole", ranks=1 if ranks == 1 else 2, before=partial(record_order, "whole.txt")).code
        == 0
    )
    assert launch(f"{line} --name killed", ranks=ranks, kill_at_step=step).code == -9
    assert launch(f"{line} --name killed", ranks=ranks, before=partial(record_order, "resumed.txt")).code == 0
    whole, resumed = (
        [ast.literal_eval(line.replace(" ", ",", 2)) for line in (pics / file).read_text().splitlines()]
        for file in ("whole.txt", "resumed.txt")
    )
    start = max(saved for saved in (3, 4, 6, 8) if saved <= step)
    assert sorted(resumed) == sorted(row for row in whole if row[0] >= start)
    for _, rows in itertools.groupby(sorted(whole, key=lambda row: row[1]), key=lambda row: row[1]):
        seen = [index for row in rows for index in row[2]]
        assert len(seen) == len(set(seen)) == 32


@pytest.mark.parametrize("name", ["last.ckpt", pytest.param("best.ckpt", marks=pytest.mark.slow)])
def test_row_12_killed_while_saving(pics, launch, tmp_path, name):
    line, run = f"{TINY} --epochs 3", pics / "runs" / "killed"
    (tmp_path / "elsewhere").mkdir()
    assert launch(f"{line} --name whole").code == 0
    assert launch(f"{line} --name killed", kill_at_step=5, before=partial(fixed_accuracies, [0.1, 0.2, 0.3])).code == -9
    before = last(run, name).read_bytes()
    partial_file = run / "checkpoints" / f".{name}.partial"
    slow = partial(several, slow_writes, partial(fixed_accuracies, [0.1, 0.2, 0.3]))
    ended = launch(
        f"{line} --name killed", before=slow, watch=kill_when(partial_file), env={"TMPDIR": str(tmp_path / "elsewhere")}
    )
    assert ended.code == -9 and partial_file.is_file(), ended.out
    assert last(run, name).read_bytes() == before and torch.load(last(run, name), weights_only=True)["global_step"] == 4
    ended = launch(f"{line} --name killed")
    assert ended.code == 0 and "last.ckpt" in ended.out and not partial_file.exists(), ended.out
    assert same_weights(last(pics / "runs" / "whole"), last(run))
    assert not os.listdir(tmp_path / "elsewhere")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["last-1.ckpt", "last.ckpt"])
def test_row_12_killed_between_the_renames(pics, launch, name):
    """At one moment only last-1.ckpt is there."""
    line, run = f"{TINY} --epochs 4", pics / "runs" / "killed"
    assert launch(f"{line} --name whole").code == 0
    assert (
        launch(f"{line} --name killed", before=partial(die_at_replace, name, 2 if name == "last-1.ckpt" else 3)).code
        == -9
    )
    assert last(run).is_file() == (name == "last-1.ckpt") and last(run, "last-1.ckpt").is_file()
    assert models.load(run)
    ended = launch(f"{line} --name killed")
    assert ended.code == 0 and ("is not there" in ended.out) == (name == "last.ckpt"), ended.out
    assert same_weights(last(pics / "runs" / "whole"), last(run))
