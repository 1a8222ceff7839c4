"""Rows 11 and 28 of the fault table: sets that do not divide by the ranks, and a run that comes back to another world
or other data."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import result_of, write_pictures
from sabotage import TINY, largest_difference, last

import models
from lightning_modules.loggers.csv_logger import read_history

pytestmark = pytest.mark.fault
CALM = TINY.replace("drop_path 0.2", "drop_path 0") + " --epochs 3 --save_every_steps 3"


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_row_11_thirteen_samples_on_two_ranks(pics, launch, workers):
    """A network that says class 0 whatever it sees, and a test split in which that is right once: 1/13, not 1/7 or
    1/14."""
    shutil.rmtree(pics / "pics" / "test")
    write_pictures(pics / "pics" / "test", {"dark": 1, "grey": 6, "light": 6})
    network = models.create("vit_nano4", 3, 16, embed_dim=32, depth=2)
    torch.nn.init.zeros_(network.head.weight)
    with torch.no_grad():
        network.head.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    torch.save(network.state_dict(), pics / "zero.pth")
    line = TINY.replace("--workers 0", f"--workers {workers}") + " --eval_only --init zero.pth"
    for ranks in (1, 2):
        ended = launch(f"{line} --devices {ranks} --name ranks{ranks}", ranks=ranks)
        assert ended.code == 0, ended.out
        assert result_of(pics / "runs" / f"ranks{ranks}")["test/acc1"] == pytest.approx(1 / 13, abs=1e-7)
    one, two = (result_of(pics / "runs" / f"ranks{ranks}") for ranks in (1, 2))
    assert one["test/acc1"] == two["test/acc1"] and one["test/loss"] == pytest.approx(two["test/loss"], rel=1e-6)


@pytest.mark.slow
def test_row_11_fewer_samples_than_ranks_and_none(pics, launch):
    shutil.rmtree(pics / "pics" / "test")
    write_pictures(pics / "pics" / "test", {"grey": 1})
    line = f"{TINY} --epochs 1 --devices 2"
    ended = launch(f"{line} --name few", ranks=2)
    assert ended.code == 0 and result_of(pics / "runs" / "few")["test/acc1"] in (0.0, 1.0), ended.out
    alone = launch(f"{TINY} --epochs 1 --eval_only --init runs/few --name alone")
    assert (
        alone.code == 0
        and result_of(pics / "runs" / "alone")["test/acc1"] == result_of(pics / "runs" / "few")["test/acc1"]
    )
    (pics / "pics" / "test" / "grey" / "0.jpg").unlink()
    none = launch(f"{line} --eval_only --init runs/few --name none", ranks=2)
    assert none.code == 2 and "holds no picture" in none.out and "Traceback" not in none.out, none.out


def same_but_for_rounding(whole, moved):
    """Losses to 1e-6, weights to 1e-4 (AdamW enlarges rounding where gradients are small); the same rows. Other samples
    make 1e-3."""
    assert result_of(moved)["steps"] == 12 and largest_difference(last(whole), last(moved)) < 1e-4
    one, other = (read_history(run / "metrics.csv") for run in (whole, moved))
    assert [(row["epoch"], row["step"]) for row in one] == [(row["epoch"], row["step"]) for row in other]
    for key in ("train/loss", "val/loss", "train/acc1", "val/acc1"):
        assert [row[key] for row in one] == pytest.approx([row[key] for row in other], abs=1e-6)


@pytest.mark.parametrize(
    "ranks, step",
    [
        ((1, 2), 7),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (((2, 1), 7), ((1, 2), 4), ((2, 1), 8), ((1, 2), 3), ((2, 1), 5))
        ),
    ],
)
def test_row_28_another_number_of_ranks_goes_on_by_samples(pics, launch, ranks, step):
    """With micro batches of 4, 1 rank makes two passes a step and 2 ranks make one; checkpoints at 3, 4, 6, 8, 9,
    12."""
    assert launch(f"{CALM} --name whole").code == 0
    assert launch(f"{CALM} --devices {ranks[0]} --name moved", ranks=ranks[0], kill_at_step=step).code == -9
    ended = launch(f"{CALM} --devices {ranks[1]} --name moved", ranks=ranks[1])
    assert (
        ended.code == 0
        and f"saved by {ranks[0]} process" in ended.out
        and f"going on with {ranks[1]} at the same sample" in ended.out
    ), ended.out
    assert result_of(pics / "runs" / "moved")["world_size"] == ranks[1]
    same_but_for_rounding(pics / "runs" / "whole", pics / "runs" / "moved")


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(8, 2), (2, 4)])
def test_row_28_another_micro_batch_goes_on_by_samples(pics, launch, before, after):
    line = CALM.replace(" --micro_batch_size 4", "")
    assert launch(f"{line} --micro_batch_size {before} --name whole").code == 0
    assert launch(f"{line} --micro_batch_size {before} --name moved", kill_at_step=7).code == -9
    ended = launch(f"{line} --micro_batch_size {after} --name moved")
    assert ended.code == 0, ended.out
    same_but_for_rounding(pics / "runs" / "whole", pics / "runs" / "moved")


def refused(launch, line, *words):
    ended = launch(line)
    assert ended.code == 2 and "Traceback" not in ended.out and all(word in ended.out for word in words), ended.out
    assert len(ended.out.splitlines()) <= 8


def one_more(root: Path) -> None:
    shutil.copy(root / "pics" / "train" / "grey" / "0.jpg", root / "pics" / "train" / "grey" / "99.jpg")


def test_row_28_other_data_are_refused_with_the_difference(pics, launch):
    assert launch(f"{CALM} --name killed", kill_at_step=7).code == -9
    before = {file: file.read_bytes() for file in (pics / "runs").rglob("*") if file.is_file()}
    one_more(pics)
    refused(launch, f"{CALM} --name killed", "fingerprint", "samples ->", "--overwrite")
    refused(launch, f"{CALM} --name other --resume runs/killed", "fingerprint", "--init")
    (pics / "pics" / "train" / "grey" / "99.jpg").unlink()
    (pics / "pics" / "train" / "grey").rename(pics / "pics" / "train" / "green")
    (pics / "pics" / "test" / "grey").rename(pics / "pics" / "test" / "green")
    refused(launch, f"{CALM} --name killed", "gone: grey", "new: green")
    (pics / "pics" / "train" / "green").rename(pics / "pics" / "train" / "grey")
    (pics / "pics" / "test" / "green").rename(pics / "pics" / "test" / "grey")
    assert {file: file.read_bytes() for file in (pics / "runs").rglob("*") if file.is_file()} == before
    assert launch(f"{CALM} --name killed").code == 0


def test_row_28_another_batch_seed_or_model_is_refused_with_the_difference(pics, launch):
    assert launch(f"{CALM} --name killed", kill_at_step=7).code == -9
    for flags, words in (
        ("--global_batch_size 4", "global_batch_size 8 -> 4"),
        ("--seed 1", "seed 0 -> 1"),
        ("--model_args.depth 3", "depth"),
        ("--image_size 20", "image_size [16, 16] -> [20, 20]"),
    ):
        refused(launch, f"{CALM} --name other --resume runs/killed {flags}", words)
        assert not (pics / "runs" / "other").exists()
    refused(launch, f"{CALM} --name killed --global_batch_size 4", "global_batch_size 8 -> 4")


def test_row_28_a_finished_run_says_when_its_data_have_changed(pics, launch):
    assert launch(f"{CALM} --name done").code == 0
    assert "already finished" in launch(f"{CALM} --name done").out
    one_more(pics)
    refused(launch, f"{CALM} --name done", "is finished", "changed since", "--overwrite")
