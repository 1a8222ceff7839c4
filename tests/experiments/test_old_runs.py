"""Run directories, config files and image caches that commit 015dab6 wrote are resumed, loaded and used.

`tests/fixtures/old_run` holds, all written by that commit: `stopped`, a run killed at step 18 of 30; `expected_*`, what
the same run reached without the kill; `finished`, a run of one epoch; `images` and `cache`, a folder and its cache.
"""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import result_of, weights_of

import datamodules
import models
from experiments import config, predict

OLD = Path(__file__).parents[1] / "fixtures" / "old_run"
SMALL = (
    "--model vit_nano4 --model_args.embed_dim 16 --model_args.depth 1 --model_args.num_heads 2 "
    "--model_args.mlp_ratio 1 --image_size 8 --data digits --recipe none --logger csv --workers 0 --accelerator cpu"
)
COMMAND = (
    f"{SMALL} --model_args.drop_path 0.1 --epochs 3 --global_batch_size 128 --lr 3e-3 --mixup 0.2 --ema_decay 0.9 "
    "--save_every_steps 3 --log_every_steps 5 --name stopped"
)
FILE_TIME = 1_600_000_000 * 10**9  # nanoseconds; the name of a cache depends on the times of the files


def near(key, value):
    """Equal up to what other CPUs' kernels may change in 30 steps."""
    return pytest.approx(value, abs=0.02) if "acc" in key or key == "best" else pytest.approx(value, rel=1e-3)


def _rows(file):
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


@pytest.fixture
def runs(tmp_path):
    for name in ("stopped", "finished"):
        shutil.copytree(OLD / name, tmp_path / "runs" / name)
    return tmp_path / "runs"


def test_a_stopped_run_resumes_and_ends_as_if_it_had_not_stopped(runs, launch):
    done = launch(COMMAND)
    assert done.code == 0, done.out
    expected, found = _rows(OLD / "expected_metrics.csv"), _rows(runs / "stopped/metrics.csv")
    assert len(found) == len(expected)
    for key in ("train/loss", "train/acc1"):  # an epoch's last row has been the mean over the whole epoch since then
        expected[-1][key] = (float(expected[-2][key]) + float(expected[-1][key])) / 2
    for row, wanted in zip(found, expected, strict=True):
        for key, value in wanted.items():
            assert (row[key] == "") == (value == ""), (key, row)
            assert not value or float(row[key]) == near(key, float(value)), (key, row)
    result = result_of(runs / "stopped")
    for key, value in json.loads((OLD / "expected_result.json").read_text()).items():
        assert result[key] == (near(key, value) if isinstance(value, float) else value), key
    assert result["finished"]


def test_a_finished_run_loads_and_predicts(runs, capsys):
    network, spec = models.load(runs / "finished")
    stored = weights_of(runs / "finished/checkpoints/best.ckpt")
    assert not network.training and spec["class_names"] == [*"0123456789"] and spec["image_size"] == [8, 8]
    assert all(torch.equal(value, stored[f"model.{key}"]) for key, value in network.state_dict().items())
    out = runs.parent / "out.csv"
    assert predict.main([str(runs / "finished"), "--folder", str(OLD / "images/test"), "--out", str(out)]) == 0
    rows = _rows(out)
    assert len(rows) == 4 and sum(float(rows[0][f"prediction_{digit}"]) for digit in range(10)) == pytest.approx(1)


def test_a_finished_run_is_scored_anew(runs, launch):
    done = launch(f"{SMALL} --eval_only --init runs/finished --name again")
    assert done.code == 0, done.out
    before, now = result_of(runs / "finished"), result_of(runs / "again")
    assert all(now[key] == near(key, before[key]) for key in ("test/acc1", "test/acc5", "test/loss"))


def test_a_finished_run_is_a_teacher(runs, launch):
    done = launch(f"{SMALL} --epochs 1 --global_batch_size 256 --teacher runs/finished --distill soft --name student")
    assert done.code == 0, done.out
    assert result_of(runs / "student")["finished"]


def test_an_old_config_file_is_read(runs):
    cfg = config.parse(["--config", str(runs / "stopped/config.yaml"), "--name", "again"])
    assert (cfg.model, cfg.data, cfg.epochs, cfg.lr, cfg.mixup, cfg.ema_decay) == (
        "vit_nano4",
        "digits",
        3,
        0.003,
        0.2,
        0.9,
    )
    assert cfg == config.parse([*COMMAND.split(), "--config", str(runs / "stopped/config.yaml"), "--name", "again"])


def test_an_old_cache_is_used_as_it_is(tmp_path):
    shutil.copytree(OLD / "images", tmp_path / "images")
    shutil.copytree(OLD / "cache", tmp_path / "cache")
    for file in (tmp_path / "images").rglob("*.jpg"):
        content = file.read_bytes()
        file.write_bytes(content[:2] + bytes(len(content) - 4) + content[-2:])  # only the cache knows the pixels now
        os.utime(file, ns=(FILE_TIME, FILE_TIME))
    data = datamodules.create(
        "folder",
        data_dir=str(tmp_path / "images"),
        cache_dir=str(tmp_path / "cache"),
        image_size=16,
        crop_pct=1.0,
        global_batch_size=4,
        workers=0,
    )
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*")}
    data.setup("test")
    batches = [*data.test_dataloader()]
    brightness = torch.cat([batch["image"].float().mean((1, 2, 3)) for batch in batches])
    classes = torch.cat([batch["target"] for batch in batches])
    assert len(classes) == 4 and brightness[classes == 0].max() + 100 < brightness[classes == 1].min()
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*")}
