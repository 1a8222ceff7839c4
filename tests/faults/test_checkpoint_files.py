"""Rows 13-17 and 29 of the fault table: full and read-only disks, damaged and hostile files, what a checkpoint may
hold, best and last."""

import os
import pickle
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from conftest import result_of, weights_of
from sabotage import TINY, fixed_accuracies, last, mounts_allowed, read_only, same_weights, troubled_disk

import models
from experiments.config import Config
from experiments.config import plain as plain_config
from lightning_modules.callbacks.checkpoints import AtomicCheckpointIO, plain
from models import pretrained

pytestmark = pytest.mark.fault
needs_mounts = pytest.mark.skipif(
    not mounts_allowed(), reason="file systems of one's own are not allowed here (unshare -rm)"
)


@needs_mounts
@pytest.mark.parametrize(
    "fault, error", [("full", "No space left"), pytest.param("read-only", "Read-only", marks=pytest.mark.slow)]
)
def test_row_13_a_disk_that_takes_nothing_for_a_while(pics, launch, fault, error):
    line = f"{TINY} --epochs 5 --save_every_steps 2"
    assert launch(f"{line} --name whole").code == 0
    ended = launch(f"{line} --name troubled", before=partial(troubled_disk, fault, 9, 15))
    assert (
        ended.code == 0 and error in ended.out and "Training goes on" in ended.out and "Traceback" not in ended.out
    ), ended.out
    whole, kept = pics / "runs" / "whole", pics / "kept" / "troubled"
    during = pretrained.read_checkpoint(pics / "during.ckpt")
    assert during["global_step"] == 8 and pretrained.intact(pics / "during.ckpt")
    assert (
        same_weights(last(whole), last(kept))
        and result_of(kept)["failed_saves"] >= 3
        and "saves of checkpoints failed" in ended.out
    )
    assert (kept / "metrics.csv").read_text().count("\n") == 6 and result_of(kept)["finished"]


@needs_mounts
@pytest.mark.slow
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_row_13_a_disk_that_takes_nothing_to_the_end(pics, launch, fault):
    line = f"{TINY} --epochs 4"
    assert launch(f"{line} --name whole").code == 0
    ended = launch(f"{line} --name troubled", before=partial(troubled_disk, fault, 9, None))
    assert ended.code == 1 and "the last step is not saved" in ended.out and "Traceback" not in ended.out, ended.out
    kept = pics / "kept" / "troubled"
    assert pretrained.read_checkpoint(last(kept))["global_step"] == 8 and not (kept / "result.json").exists()
    shutil.copytree(kept, pics / "runs" / "troubled", dirs_exist_ok=True)
    ended = launch(f"{line} --name troubled")
    assert ended.code == 0 and same_weights(last(pics / "runs" / "whole"), last(pics / "runs" / "troubled")), ended.out
    first, second = result_of(pics / "runs" / "whole"), result_of(pics / "runs" / "troubled")
    assert all(first[key] == second[key] for key in first if "/" in key or "best" in key)


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "flipped":  # inside a tensor: torch loads it without a word
        content[len(content) // 2] ^= 64
    elif how == "zeros":
        content[-4096:] = bytes(4096)
    file.write_bytes(b"" if how == "empty" else bytes(content))


@pytest.mark.parametrize(
    "how", ["truncated", "flipped", *(pytest.param(how, marks=pytest.mark.slow) for how in ("zeros", "empty"))]
)
def test_row_14_a_damaged_checkpoint_falls_back_to_the_one_before(pics, launch, how):
    line, run = f"{TINY} --epochs 3 --save_every_steps 3", pics / "runs" / "killed"
    assert launch(f"{line} --name whole").code == 0
    assert launch(f"{line} --name killed", kill_at_step=7).code == -9  # saved at 3, 4, 6
    damage(last(run), how)
    with pytest.raises(ValueError, match="damaged|not a readable|not loaded"):
        pretrained.read_checkpoint(last(run))
    assert "would resume from runs/killed/checkpoints/last-1.ckpt" in launch(f"{line} --name killed --dry_run").out
    assert last(run).is_file()
    ended = launch(f"{line} --name killed")
    assert ended.code == 0 and "going on from last-1.ckpt, step 4" in ended.out, ended.out
    assert last(run, "damaged-last.ckpt").is_file()
    assert same_weights(last(pics / "runs" / "whole"), last(run))


@pytest.mark.slow
def test_row_14_both_damaged_is_refused_with_the_way_out(pics, launch):
    line, run = f"{TINY} --epochs 3 --save_every_steps 3", pics / "runs" / "killed"
    assert launch(f"{line} --name killed", kill_at_step=7).code == -9
    damage(last(run), "truncated")
    damage(last(run, "last-1.ckpt"), "flipped")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    refused = launch(f"{line} --name killed")
    assert refused.code == 2 and "Traceback" not in refused.out and len(refused.out.splitlines()) <= 5, refused.out
    assert all(
        word in refused.out
        for word in ("--overwrite", "--name", "last.ckpt", "last-1.ckpt", "--resume runs/killed/checkpoints/best.ckpt")
    )
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    beside = launch(f"{line} --name beside --resume runs/killed/checkpoints/best.ckpt")
    assert beside.code == 0 and result_of(pics / "runs" / "beside")["steps"] == 12, beside.out
    assert launch(f"{line} --name killed --overwrite").code == 0


@needs_mounts
@pytest.mark.slow
def test_row_15_a_directory_that_cannot_be_written_is_refused_at_the_start(pics, launch):
    (pics / "runs").mkdir()
    ended = launch(f"{TINY} --epochs 2 --name new", before=partial(read_only, "runs"))
    assert ended.code == 2 and "cannot be written: Read-only" in ended.out and "epoch 1/2" not in ended.out, ended.out
    assert launch(f"{TINY} --epochs 2 --name old", kill_at_step=5).code == -9
    for place in ("runs", "runs/old/checkpoints"):
        ended = launch(f"{TINY} --epochs 2 --name old", before=partial(read_only, place))
        assert ended.code == 2 and "cannot be written: Read-only" in ended.out and "Traceback" not in ended.out, (
            ended.out
        )
    assert launch(f"{TINY} --epochs 2 --name old").code == 0


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("touch ran",)


def test_row_16_evil_and_remote_checkpoints_are_refused(pics, launch):
    torch.save({"state_dict": {"head.weight": torch.zeros(1)}, "config": Evil()}, pics / "evil.ckpt")
    (pics / "evil.pth").write_bytes(pickle.dumps(Evil()))
    for words in (
        "--resume evil.ckpt",
        "--init evil.ckpt",
        "--init evil.pth",
        "--resume https://host/last.ckpt",
        "--init http://host/last.ckpt",
        "--eval_only --init s3://bucket/last.ckpt",
    ):
        ended = launch(f"{TINY} --epochs 1 --name refused {words}")
        expected = "from files only" if "://" in words else "could run code"
        assert ended.code == 2 and expected in ended.out and "Traceback" not in ended.out, ended.out
    for read in (models.load, pretrained.read_weights, AtomicCheckpointIO().load_checkpoint):
        for source in ("https://host/last.ckpt", pics / "evil.ckpt"):
            with pytest.raises(ValueError, match="from files only|could run code"):
                read(source)
    assert not (pics / "ran").exists() and not (pics / "runs" / "refused").exists()


@dataclass
class Args:
    path: Path
    rate: np.float64


class WithArgs(L.LightningModule):
    def __init__(self, args, numbers, folder):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, _):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), np.float64(0.1))


def test_row_17_what_python_puts_into_a_checkpoint_loads_with_weights_only(tmp_path):
    module = WithArgs(
        Args(Path("a/b"), np.float64(0.5)),
        {"n": np.int64(3), "row": np.arange(2), "pair": (np.float32(1), None)},
        Path("runs"),
    )
    quiet = dict(
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        accelerator="cpu",
    )
    trainer = L.Trainer(max_steps=2, plugins=[AtomicCheckpointIO()], **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(torch.ones(4, 1)))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = torch.load(tmp_path / "x.ckpt", weights_only=True)
    numbers = {"n": 3, "row": [0, 1], "pair": (1.0, None)}
    assert loaded["hyper_parameters"] == {"args": {"path": "a/b", "rate": 0.5}, "numbers": numbers, "folder": "runs"}
    assert loaded["optimizer_states"][0]["param_groups"][0]["lr"] == 0.1
    with pytest.raises(TypeError, match=r"checkpoint\.callbacks\.a\[1\] is a Evil"):
        plain({"callbacks": {"a": [1, Evil()]}})
    config = plain_config(
        Config(model="vit_nano4", model_args={"drop_path": np.float64(0.1), "where": Path("a")}, data_dir=None)
    )
    assert yaml.safe_load(yaml.safe_dump(config))["model_args"] == {"drop_path": 0.1, "where": "a"}


def test_row_17_every_checkpoint_of_a_run_is_plain_sealed_and_whole(pics, launch):
    assert launch(f"{TINY} --epochs 2 --patience 5 --save_every_steps 1 --name one").code == 0
    files = sorted((pics / "runs" / "one" / "checkpoints").iterdir())
    assert [file.name for file in files] == ["best.ckpt", "last-1.ckpt", "last.ckpt"]
    for file in files:
        torch.load(file, weights_only=True)
        assert pretrained.SEAL in file.read_bytes()[-80:] and pretrained.intact(file)
    assert [torch.load(file, weights_only=True)["global_step"] for file in files[1:]] == [7, 8]


def test_row_29_best_is_the_best_and_last_the_last(pics, launch):
    ended = launch(f"{TINY} --epochs 4 --name one", before=partial(fixed_accuracies, [0.1, 0.9, 0.8, 0.5]))
    assert ended.code == 0, ended.out
    run = pics / "runs" / "one"
    steps = {
        name: torch.load(last(run, name), weights_only=True)["global_step"]
        for name in ("best.ckpt", "last-1.ckpt", "last.ckpt")
    }
    assert steps == {"best.ckpt": 8, "last-1.ckpt": 12, "last.ckpt": 16}
    assert not all(
        torch.equal(value, weights_of(last(run))[key]) for key, value in weights_of(last(run, "best.ckpt")).items()
    )
    result = result_of(run)
    assert (result["best_epoch"], result["stopped_epoch"], result["steps"]) == (1, 3, 16)
    equal = launch(f"{TINY} --epochs 3 --name equal", before=partial(fixed_accuracies, [0.5, 0.5, float("nan")]))
    assert (
        equal.code == 0
        and torch.load(last(pics / "runs" / "equal", "best.ckpt"), weights_only=True)["global_step"] == 4
    )
