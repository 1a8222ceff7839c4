"""All folds of a table: processes, signals, time, and one score over all rows."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import result_of
from fold_processes import quick
from PIL import Image
from scipy import stats
from sklearn.metrics import roc_auc_score

import datamodules
from datamodules.tables import folds
from experiments.config import parse
from experiments.folds import directories, merge, processes
from experiments.processes import pool as children
from experiments.running import run_directory
from lightning_modules.callbacks.signals import ORDER

LINE = (
    "--data_dir comp --image_size 16 --model vit_nano4 --model_args.embed_dim 32 --model_args.depth 2 "
    "--model_args.drop_path 0.2 --recipe none "
    "--global_batch_size 8 --lr 2e-3 --workers 0 --logger csv --accelerator cpu --epochs 2"
)


@pytest.fixture
def comp(tmp_path):
    """A competition of 45 pictures whose brightness is the score; 6 to predict."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 45), ("test", 6)):
        (tmp_path / "comp" / split).mkdir(parents=True)
        bright = rng.integers(0, 200, count)
        for n in range(count):
            Image.fromarray((rng.integers(0, 56, (16, 16, 3)) + bright[n]).astype(np.uint8)).save(
                tmp_path / "comp" / split / f"{split[1]}{n:02}.jpg"
            )
        table = pd.DataFrame(
            {"Id": [f"{split[1]}{n:02}" for n in range(count)], "Score": (bright / 2 + rng.random(count)).round(2)}
        )
        (table if split == "train" else table[["Id"]]).to_csv(tmp_path / "comp" / f"{split}.csv", index=False)
    table.assign(Score=30.5).to_csv(tmp_path / "comp" / "sample_submission.csv", index=False)
    return tmp_path


def test_all_folds_are_trained_merged_and_scored_over_all_rows(comp, launch):
    alone = launch(f"{LINE} --folds 3 --fold 1 --name all-f1")
    assert alone.code == 0, alone.out
    ended = launch(f"{LINE} --folds 3 --name all", before=quick)
    assert ended.code == 0, ended.out
    folder, train = comp / "runs" / "all", pd.read_csv(comp / "comp" / "train.csv")
    assert (folder / "fold1").is_symlink() and (
        folder / "fold1"
    ).resolve() == comp / "runs" / "all-f1"  # what was run alone counts
    assert not (folder / "checkpoints").exists()
    fold = folds.assign(train["Score"].to_numpy(np.float32)[:, None], "regression", 3, 0)
    written = pd.read_csv(folder / "folds.csv")
    (kept,) = (comp / "runs" / "folds").iterdir()
    assert (
        (written["fold"] == fold).all()
        and kept.name.startswith("comp-")
        and kept.read_text() == (folder / "folds.csv").read_text()
    )

    oof, result = pd.read_csv(folder / "oof.csv"), result_of(folder)
    assert (
        oof["Id"].tolist() == train["Id"].tolist()
        and (oof["fold"] == fold).all()
        and np.allclose(oof["target"], train["Score"])
    )
    squared = (oof["prediction"] - train["Score"]) ** 2
    assert (
        result["overall"] == result["best"] == pytest.approx(np.sqrt(squared.mean()), rel=1e-6)
        and result["metric"] == "oof/rmse"
    )
    assert result["fold_scores"] == pytest.approx(np.sqrt(squared.groupby(fold).mean()).tolist(), rel=1e-6)
    assert result["ci_low"] < result["overall"] < result["ci_high"] and result["n_boot"] == 1000
    places = [folder / f"fold{k}" for k in range(3)]
    parts = [pd.read_csv(place / "predictions.csv") for place in places]
    mean = pd.read_csv(folder / "predictions.csv")
    assert mean["Id"].tolist() == [f"e{n:02}" for n in range(6)] and [*mean] == ["Id", "prediction"]
    assert np.allclose(mean["prediction"], np.mean([part["prediction"] for part in parts], 0), rtol=1e-6)
    assert result["folds"] == result["folds_finished"] == 3 and result["finished"] is True
    assert result["train_seconds"] == pytest.approx(
        sum(result_of(place)["train_seconds"] for place in places), abs=0.02
    )
    for word in (
        "1 finished, 2 to do, one after the other",
        "by those before",
        "fold 0 has ended after",
        "oof/rmse",
        "the mean of 3 folds",
    ):
        assert word in ended.out, ended.out

    worst = (folder / "report.html").read_text().split('<section id="worst">')[1].split("</section>")[0]
    assert worst.count("<img") == 32 and "no picture" not in worst  # of the rows of every fold
    assert (
        ended.out.count("table id_column") == 1
        and "GPU available" not in ended.out
        and "next: python experiments/submit.py runs/all" in ended.out
    )
    again = launch(f"{LINE} --folds 3 --name all", before=quick)
    assert again.code == 0 and "already finished" in again.out
    other = launch(f"{LINE} --folds 3 --name all --lr 1e-4", before=quick)
    assert other.code == 2 and "lr 0.002 -> 0.0001" in other.out


def test_a_plan_writes_nothing(comp, launch):
    planned = launch(f"{LINE} --folds 3 --name plan --dry_run", before=quick)
    assert planned.code == 0 and "all of this 3 times" in planned.out and not (comp / "runs").exists(), planned.out


def interrupt(how, moment, children, seconds=60):
    """When the fold has got so far, signal the process over it."""
    child, deadline = children[0], time.monotonic() + seconds
    while not moment() and time.monotonic() < deadline and child.is_alive():
        time.sleep(0.02)
    os.kill(child.pid, how)


def test_killed_and_preempted_folds_go_on_to_the_undisturbed_bytes(comp, launch):
    line = f"{LINE} --folds 2 --epochs 5 --save_every_steps 1"  # long enough for a signal to come in time
    assert launch(f"{line} --name whole", before=quick).code == 0
    folder = comp / "runs" / "hit"
    in_fold_0, in_fold_1 = (
        (lambda fold=fold: (folder / f"fold{fold}" / "checkpoints" / "last.ckpt").exists()) for fold in (0, 1)
    )
    killed = launch(
        f"{line} --name hit", before=quick, watch=lambda children: interrupt(signal.SIGKILL, in_fold_0, children)
    )
    assert killed.code == -9
    time.sleep(0.5)  # a fold that went on would save again
    saved = (folder / "fold0" / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    time.sleep(0.5)
    assert (
        saved == (folder / "fold0" / "checkpoints" / "last.ckpt").stat().st_mtime_ns
        and not (folder / "fold0" / "result.json").exists()
    )
    stopped = launch(
        f"{line} --name hit", before=quick, watch=lambda children: interrupt(signal.SIGTERM, in_fold_1, children)
    )
    assert stopped.code == 75 and "SIGTERM: saved step" in stopped.out and "fold 0 has ended" in stopped.out, (
        stopped.out
    )
    assert result_of(folder)["finished"] is False and not (folder / "oof.csv").exists()
    ended = launch(f"{line} --name hit", before=quick)
    assert ended.code == 0 and "1 finished, 1 to do" in ended.out and "resumed from" in ended.out, ended.out
    for name in ("oof.csv", "predictions.csv", "folds.csv"):
        assert (folder / name).read_bytes() == (comp / "runs" / "whole" / name).read_bytes()
    assert result_of(folder)["overall"] == result_of(comp / "runs" / "whole")["overall"]


@pytest.mark.slow
def test_in_processes_of_their_own_a_signal_to_the_first_stops_all(comp, launch):
    """As from a shell: nothing is forked, and the plan and each fold import everything anew."""
    folder = comp / "runs" / "real"
    stopped = launch(
        f"{LINE} --folds 2 --epochs 500 --name real",
        timeout=250,
        watch=lambda children: interrupt(
            signal.SIGTERM, (folder / "fold0" / "checkpoints" / "last.ckpt").exists, children, 200
        ),
    )
    assert stopped.code == 75 and "SIGTERM: saved step" in stopped.out and "images/s measured now" in stopped.out, (
        stopped.out
    )
    ended = launch(f"{LINE} --folds 2 --name other", timeout=250)
    assert ended.code == 0 and result_of(comp / "runs" / "other")["finished"] is True, ended.out


def test_ctrl_c_leaves_with_its_code(comp, launch):
    folder = comp / "runs" / "hit"
    stopped = launch(
        f"{LINE} --folds 2 --epochs 200 --name hit",
        before=quick,
        watch=lambda children: interrupt(
            signal.SIGINT, (folder / "fold0" / "checkpoints" / "last.ckpt").exists, children
        ),
    )
    assert stopped.code == 130 and "SIGINT: saved step" in stopped.out, stopped.out


def test_a_fold_that_fails_stops_the_rest_and_gives_its_code(comp, launch):
    ended = launch(f"{LINE} --folds 3 --name bad", before=break_fold_1)
    assert (
        ended.code == 7
        and "fold 1 has stopped" in ended.out
        and "exit code 7" in ended.out
        and "fold 2 starts" not in ended.out
    ), ended.out
    assert "1 of 3 folds (0)" in ended.out and result_of(comp / "runs" / "bad")["finished"] is False
    assert len(pd.read_csv(comp / "runs" / "bad" / "oof.csv")) == 15
    assert launch(f"{LINE} --folds 3 --name bad", before=quick).code == 0
    assert (
        len(pd.read_csv(comp / "runs" / "bad" / "oof.csv")) == 45
        and result_of(comp / "runs" / "bad")["finished"] is True
    )


def break_fold_1():
    quick()
    healthy = children.start
    children.start = lambda argv, env, log: (
        subprocess.Popen([sys.executable, "-c", "exit(7)"]) if "fold1" in argv else healthy(argv, env, log)
    )


@pytest.mark.parametrize(
    "line, env, words",
    [
        ("--folds 3", {"RANK": "0", "WORLD_SIZE": "2"}, "--fold I (0 to 2)"),
        ("--folds 3", {"SLURM_PROCID": "0", "SLURM_NTASKS": "3", "SLURM_STEP_ID": "0"}, "--fold I (0 to 2)"),
        ("--folds 3 --resume runs/x", {}, "--resume is for one run"),
        ("--folds 3 --eval_only --init runs/x", {}, "--eval_only is for one run"),
        ("--folds 46", {}, "the table has 45 rows"),
        ("--folds 3 --target Nothing", {}, "Nothing"),
        ("--folds 3 --data digits --data_dir null", {}, "--folds is for tables"),
    ],
)
def test_what_folds_cannot_be_ends_with_a_line(comp, launch, line, env, words):
    ended = launch(
        f"{LINE} {line}".replace("--data_dir comp", "" if "digits" in line else "--data_dir comp"),
        env=env,
        before=quick,
    )
    assert ended.code == 2 and words in ended.out and "Traceback" not in ended.out and not (comp / "runs").exists(), (
        ended.out
    )


def test_folds_of_ones_own(comp):
    common = dict(data_dir=str(comp / "comp"), image_size=16, global_batch_size=4, workers=0, folds=3, fold=1)
    own, ids = comp / "own.csv", pd.read_csv(comp / "comp" / "train.csv")["Id"].tolist()
    folds.write(own, ids, np.arange(45) // 15, "Id")
    data = datamodules.create("csv", **common, folds_at=str(own))
    assert data.splits["val"].ids.tolist() == ids[15:30]
    by_rule = datamodules.create("csv", **common, folds_at=str(comp / "kept"))
    assert (by_rule.fold_numbers != data.fold_numbers).any() and not (comp / "kept").exists()
    by_rule.keep_folds()
    (file,) = (comp / "kept").iterdir()
    text = file.read_text()
    file.write_text("Id,fold\n" + "".join(f"{name},{n % 3}\n" for n, name in enumerate(ids)))
    assert (
        datamodules.create("csv", **common, folds_at=str(comp / "kept")).fold_numbers == np.arange(45) % 3
    ).all()  # what is written holds
    file.write_text(text.replace(f"{ids[3]},", "other,"))
    for at, words in ((comp / "kept", "line 5"), (comp / "none.csv", "there is no such file")):
        with pytest.raises(ValueError, match=words):
            datamodules.create("csv", **common, folds_at=str(at))


def test_another_table_under_the_same_name_is_refused(comp, launch):
    ended = launch(f"{LINE} --folds 2 --name one", before=break_fold_1)
    assert ended.code == 7
    table = pd.read_csv(comp / "comp" / "train.csv")
    table.iloc[:0:-1].to_csv(comp / "comp" / "train.csv", index=False)
    ended = launch(f"{LINE} --folds 2 --name one", before=quick)
    assert ended.code == 2 and "is of another table" in ended.out and "folds.csv" in ended.out, ended.out


# without a process


class Clock:
    """Time that passes only in `sleep`."""

    now = 1000.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    strftime, gmtime = staticmethod(time.strftime), staticmethod(time.gmtime)


@pytest.fixture
def acted(tmp_path, monkeypatch):
    """acted(seconds each fold takes, hours=..., devices=..., strategy=...) -> (Folds, [(argv, env)]): folds that only
    take time."""
    clock = Clock()
    monkeypatch.setattr(children, "time", clock)
    monkeypatch.setattr(processes.notice, "asked", 0)

    def make(takes, hours=None, gpus=(), **cfg):
        started, k = [], len(takes)
        (tmp_path / "all").mkdir(exist_ok=True)

        class Acted:
            def __init__(self, argv, env, log):
                self.fold, self.since, self.code = int(argv[argv.index("--fold") + 1]), clock.now, None
                started.append((argv, env))
                (tmp_path / "all" / f"fold{self.fold}").mkdir(exist_ok=True)

            def poll(self):
                if self.code is None and clock.now - self.since >= takes[self.fold]:
                    self.code = 0
                    (tmp_path / "all" / f"fold{self.fold}" / "result.json").write_text(
                        '{"finished": true, "metric": "val/rmse", "best": 1.5}'
                    )
                return self.code

            def send_signal(self, signum):
                self.code = 75

        monkeypatch.setattr(children, "start", Acted)
        values = {
            "model": "m",
            "data": "csv",
            "folds": k,
            "epochs": 4,
            "devices": 1,
            "strategy": "auto",
            "hours": hours,
        } | cfg
        plan = {
            "cfg": values,
            "folder": str(tmp_path / "all"),
            "gpus": [*gpus],
            "rows": 9,
            "forecast_seconds": 100.0,
            "speed": 10.0,
            "steps": 16,
            "folds_file": "f.csv",
        }
        return processes.Folds(plan, ("--model", "m", "--folds", str(k)), clock.now), started

    return make


def test_a_fold_that_would_not_end_in_time_is_not_started(acted, capsys):
    run, started = acted([1000, 1400, 1000, 1000], hours=1.2)  # 4320 s, of which 60 are kept
    assert run.run() == 75 and len(started) == 3 and run.finished() == [0, 1, 2]
    out = capsys.readouterr().out
    assert "fold 3 would take about 23:20 and 14:19 are left" in out or "fold 3 would take about 23:2" in out
    run, started = acted([1000, 1400, 1000, 1000], hours=0.5)
    assert (
        run.run() == 0 and len(started) == 1 and run.finished() == [0, 1, 2, 3]
    )  # the next launch knows what they took
    assert "3 finished, 1 to do" in capsys.readouterr().out


def test_without_any_time_no_fold_is_started(acted, capsys):
    run, started = acted([10, 10], hours=0)
    assert (
        run.run() == 75
        and started == []
        and "--hours: fold 0 has no time left, so it is not started" in capsys.readouterr().out
    )


def test_a_running_fold_is_told_to_save_when_the_time_is_over(acted, capsys):
    run, started = acted([5000, 100], hours=1)
    assert run.run() == 75 and len(started) == 1 and "the time of --hours is over" in capsys.readouterr().out
    assert run.seconds[0] == pytest.approx(3540, abs=2) and run.seconds[1] == 0
    (Path(run.plan["folder"]) / "fold0" / "metrics.csv").write_text("epoch,step\n0,4\n1,8\n2,12\n")
    run, started = acted([1200, 100], hours=0.2)
    assert run.expected(0) == pytest.approx(3540 / 0.75 / 4, abs=2)  # three epochs of four took 3540 seconds
    assert run.run() == 75 and started == []
    run, started = acted([1200, 100], hours=2)
    assert run.run() == 0 and len(started) == 2


def test_folds_share_the_devices(acted):
    run, started = acted([100, 300, 100, 100, 100], devices=2, strategy="folds", gpus=["4", "7"])
    assert run.run() == 0
    assert [argv[argv.index("--fold") + 1] for argv, _ in started] == list("01234")
    assert [env["CUDA_VISIBLE_DEVICES"] for _, env in started] == ["4", "7", "4", "4", "4"]
    assert all(argv[-4:] == ["--devices", "1", "--strategy", "auto"] for argv, _ in started)


def test_a_signal_reaches_every_fold_that_runs(acted, monkeypatch, capsys):
    run, started = acted([1000] * 4, devices=2, strategy="folds")
    clock, sleep = children.time, children.time.sleep

    def asked_later(seconds):
        sleep(seconds)
        processes.notice.asked = 1 + ORDER.index(signal.SIGTERM) if clock.now > 1500 else 0

    monkeypatch.setattr(clock, "sleep", asked_later)
    assert run.run() == 75 and len(started) == 2 and run.pool.running == []
    kept = result_of(Path(run.plan["folder"]))
    assert kept["fold_seconds"] == pytest.approx([500, 500, 0, 0], abs=2) and kept["finished"] is False


def test_the_forecast_follows_the_slowest_so_far(acted, capsys):
    run, _ = acted([60, 120, 60])
    assert run.run() == 0
    out = capsys.readouterr().out
    assert (
        "about 1:40 of training steps each, 5:00 together" in out
        and "2 left, about 2:0" in out
        and "1 left, about 2:0" in out
    )


def test_folds_run_at_once_on_two_devices(comp, launch):
    ended = launch(f"{LINE} --folds 2 --devices 2 --strategy folds --name two", before=quick)
    assert ended.code == 0 and "2 at a time" in ended.out and "epoch 1/2" not in ended.out, ended.out
    assert "epoch 2/2" in (comp / "runs" / "two" / "fold1.log").read_text()
    assert len(pd.read_csv(comp / "runs" / "two" / "oof.csv")) == 45


def test_names_and_groups():
    line = "--model vit_nano4 --data csv --recipe none --seed 3 --folds 5"
    cfg, alone = parse(line.split()), parse(["--model", "vit_nano4", "--data", "csv", "--recipe", "none"])
    one = parse([*line.split(), "--fold", "2"])
    assert (
        run_directory.run_name(cfg, alone) == "csv-vit_nano4-s3-folds5"
        and run_directory.run_name(one, alone) == "csv-vit_nano4-s3-f2-folds5"
    )
    for folder, wanted in (
        ("runs/csv-vit_nano4-s3-folds5/fold2", ("csv-vit_nano4-s3-folds5-f2", "csv-vit_nano4-s3-folds5")),
        ("runs/csv-vit_nano4-s3-f2-folds5", ("csv-vit_nano4-s3-f2-folds5", "csv-vit_nano4-s3-folds5")),
        ("runs/mine-f2", ("mine-f2", "mine")),
    ):
        assert directories.name_and_group(Path(folder), one) == wanted
    assert directories.name_and_group(Path("runs/mine"), cfg) == ("mine", None)


def test_wandb_groups_the_folds(comp, launch):
    ended = launch(
        f"{LINE.replace('--logger csv', '--logger wandb')} --epochs 1 --folds 2 --fold 1 --name mine-f1",
        before=tell_wandb,
    )
    assert ended.code == 0, ended.out
    told = json.loads((comp / "told.json").read_text())
    assert (
        told["group"] == "mine"
        and told["name"] == "mine-f1"
        and told["config"]["fold"] == 1
        and told["config"]["seed"] == 0
    )


def tell_wandb():
    import wandb

    init = wandb.init

    def told(**kwargs):
        run = init(**kwargs)
        Path("told.json").write_text(json.dumps({"group": run.group, "name": run.name, "config": dict(run.config)}))
        return run

    wandb.init = told


# the merge


CLASSES = {"task": "classification", "class_names": ["cat", "dog"], "target_names": None, "id_column": "Id"}


@pytest.fixture
def merged(tmp_path):
    """Two folds of ten rows with two classes, and four rows to predict: (folder, {fold: its directory})."""
    rng = np.random.default_rng(3)
    ids, fold = [f"0{n}" for n in range(10)], np.arange(10) % 2
    folds.write(tmp_path / "folds.csv", ids, fold, "Id")
    for k in (0, 1):
        place = tmp_path / f"fold{k}"
        place.mkdir()
        cat = rng.random(5).round(3)
        pd.DataFrame(
            {
                "Id": np.array(ids)[fold == k][::-1],
                "fold": k,
                "target": ["cat", "dog", "cat", "dog", "dog"],
                "prediction_cat": cat,
                "prediction_dog": 1 - cat,
            }
        ).to_csv(place / "oof.csv", index=False)
        cat = rng.random(4).round(3)
        pd.DataFrame(
            {"Id": [f"0{n}" for n in range(4)][:: 1 - 2 * k], "prediction_cat": cat, "prediction_dog": 1 - cat}
        ).to_csv(place / "predictions.csv", index=False)
    return tmp_path, {k: tmp_path / f"fold{k}" for k in (0, 1)}


def test_everything_is_joined_by_id(merged):
    folder, places = merged
    said = merge.merge(folder, places, CLASSES, "log_loss")
    oof = pd.read_csv(folder / "oof.csv", dtype={"Id": str})
    assert oof["Id"].tolist() == [f"0{n}" for n in range(10)] and oof["fold"].tolist() == [0, 1] * 5
    right = np.where(oof["target"] == "cat", oof["prediction_cat"], oof["prediction_dog"])
    assert said["overall"] == pytest.approx(-np.log(right).mean()) and said["fold_scores"][1] == pytest.approx(
        -np.log(right[1::2]).mean()
    )
    of_all = merge.merge(folder, places, CLASSES, "auroc")
    assert of_all["overall"] == pytest.approx(roc_auc_score(oof["target"] == "dog", oof["prediction_dog"]))
    means = [roc_auc_score(part["target"] == "dog", part["prediction_dog"]) for _, part in oof.groupby("fold")]
    assert (
        of_all["fold_scores"] == pytest.approx(means) and abs(of_all["overall"] - np.mean(means)) > 0.01
    )  # not a mean of means
    first, second = (
        pd.read_csv(place / "predictions.csv", dtype={"Id": str}).set_index("Id") for place in places.values()
    )
    mean = pd.read_csv(folder / "predictions.csv", dtype={"Id": str}).set_index("Id")
    pd.testing.assert_frame_equal(mean, (first + second.loc[first.index]) / 2, rtol=1e-6)
    assert said["test_rows"] == 4 and said["oof_rows"] == 10 and said["metric"] == "oof/log_loss"


def test_one_fold_of_two_is_scored_alone(merged):
    folder, places = merged
    said = merge.merge(folder, {1: places[1]}, CLASSES, "acc1")
    assert (
        said["fold_scores"][0] is None
        and said["fold_scores"][1] == said["overall"]
        and said["oof_rows"] == 5
        and said["predictions_of"] == 1
    )


@pytest.mark.parametrize(
    "file, change, words",
    [
        ("oof.csv", lambda text: text.replace("02,", "00,", 1), "the id 00 is there twice"),
        ("oof.csv", lambda text: text.replace("02,0", "05,0", 1), "1 ids missing, 1 of other folds (such as 05)"),
        ("oof.csv", lambda text: "\n".join(text.splitlines()[:-1]) + "\n", "1 ids missing"),
        ("oof.csv", lambda text: text.replace("02,0,", "02,1,"), "is not of fold 0"),
        ("oof.csv", lambda text: text.replace("target", "label"), "has the columns"),
        ("oof.csv", lambda text: text.replace("dog,", "eel,", 1), "'eel', which is no class"),
        ("oof.csv", None, "is not there"),
        ("predictions.csv", lambda text: text.replace("03,", "09,"), "other ids or columns"),
        ("predictions.csv", lambda text: text.replace("03,", "01,"), "other ids or columns"),
        ("predictions.csv", lambda text: text.replace("_cat", "_eel"), "other ids or columns"),
        ("predictions.csv", None, "predictions.csv is not there"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(merged, file, change, words):
    folder, places = merged
    path = places[0] / file
    path.write_text(change(path.read_text())) if change else path.unlink()
    with pytest.raises(ValueError) as error:
        merge.merge(folder, places, CLASSES, "acc1")
    assert words in str(error.value), error.value


def test_rows_with_bad_pictures_may_be_missing(merged):
    folder, places = merged
    path = places[0] / "oof.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    assert merge.merge(folder, places, CLASSES, "acc1", skipped=True)["oof_rows"] == 9


def test_the_interval_is_that_of_scipys_bootstrap():
    error = np.random.default_rng(0).exponential(1, 400)
    low, high, resamples = merge.interval(lambda rows: np.sqrt((error[rows] ** 2).mean()), 400, 1)
    theirs = stats.bootstrap(
        (error,),
        lambda x, axis: np.sqrt((x**2).mean(axis)),
        n_resamples=4000,
        method="percentile",
        vectorized=True,
        confidence_level=0.95,
    ).confidence_interval
    assert (
        resamples == 1000
        and low == pytest.approx(theirs.low, rel=0.03)
        and high == pytest.approx(theirs.high, rel=0.03)
    )
    assert high - low == pytest.approx(theirs.high - theirs.low, rel=0.25)  # both are draws, of 1,000 and 4,000
    assert (low, high, resamples) == merge.interval(lambda rows: np.sqrt((error[rows] ** 2).mean()), 400, 1)
    assert merge.interval(lambda rows: float("nan"), 50_000, 10)[2] == 200
