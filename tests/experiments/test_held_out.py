"""Weights that have learned rows which a run holds out are refused: as first weights, as teachers, from runs, files and
caches."""

import multiprocessing
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import launcher, weights_of, write_pictures
from fold_processes import quick
from table_files import ids, write_comp

from experiments import export, prepare, run
from experiments.folds import processes
from experiments.running import forecast

TINY = (
    "--image_size 16 --model vit_nano4 --model_args.embed_dim 16 --model_args.depth 1 --model_args.patch_size 8 "
    "--recipe none --epochs 1 "
    "--lr 1e-3 --warmup_steps 0 --workers 0 --logger none --global_batch_size 8 --micro_batch_size 8 --accelerator "
    "cpu --hflip 0"
)
TABLE = f"{TINY} --data_dir comp"
SEEN = "rows that are held out here ("


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A regression whose folds have other ranges: a run over 3 folds (`first`), one that learns from each fold's own
    (`second`, at rate 0), and single runs on shares and on all rows."""
    folder = tmp_path_factory.mktemp("trained")
    score = np.random.default_rng(0).uniform(0, 100, 30).round(1)
    write_comp(
        folder / "comp", {"Id": ids(30), "Score": score}, {"Id": ids(4, "e")}, {"Id": ids(4, "e"), "Score": [50.5] * 4}
    )
    write_pictures(folder / "pics" / "train", {"dark": 12, "light": 12})
    for line in (
        f"{TABLE} --folds 3 --name first",
        f"{TABLE} --folds 3 --name second --lr 0 --init runs/first --teacher runs/first --distill_args.alpha 1",
    ):
        ended = launcher(folder)(line, before=quick)
        assert ended.code == 0, ended.out
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in (
            f"{TABLE} --name share",
            f"{TABLE} --val_fraction 0 --name all",
            f"{TINY} --data_dir pics --name pics",
        ):
            assert run.main(line.split()) == 0
        assert export.main(["runs/first/fold0", "--out", "fold0.safetensors"]) == 0
    return folder


@pytest.fixture
def typed(trained, monkeypatch, capfd):
    """typed("--init ...") -> (exit code, what was printed), of a plan."""
    monkeypatch.chdir(trained)
    monkeypatch.setattr(processes, "PROCESSES", multiprocessing.get_context("fork"))
    monkeypatch.setattr(forecast, "images_per_second", lambda *_: 100.0)

    def main(words, line=TABLE, verb=run.main):
        try:
            code = verb([*line.split(), *words.split(), "--dry_run"] if verb is run.main else words.split())
        except SystemExit as stop:
            code = stop.code
        told = capfd.readouterr()
        return code, told.out + told.err

    return main


def test_each_fold_starts_and_learns_from_its_own(trained):
    for fold in range(3):
        first, second = (
            weights_of(trained / "runs" / name / f"fold{fold}" / "checkpoints" / "last.ckpt")
            for name in ("first", "second")
        )
        assert all(torch.equal(first[key], second[key]) for key in first)
        lines = pd.read_csv(trained / "runs" / "second" / f"fold{fold}" / "metrics.csv")
        assert (
            lines["train/distill_loss"].abs().max() < 1e-9
        )  # in own units: the ranges of student and teacher may differ
    assert len(pd.read_csv(trained / "runs" / "second" / "oof.csv")) == 30


@pytest.mark.parametrize(
    "words",
    [
        "--folds 3 --init runs/first/fold0",
        "--folds 3 --fold 1 --init runs/first/fold0/checkpoints/last.ckpt",
        "--folds 3 --teacher runs/first/fold0",
        "--folds 3 --fold 2 --teacher runs/first/fold2,runs/first/fold1",
        "--folds 3 --fold 1 --init fold0.safetensors",
        "--folds 3 --fold 1 --init runs/all",
        "--folds 3 --fold 0 --teacher runs/share",
        "--split_seed 1 --init runs/share",
        "--val_fraction 0.4 --teacher runs/share",
        "--init runs/first/fold1",
        "--folds 3 --fold 1 --teacher vit_nano4 --teacher_init runs/first/fold0",
        "--eval_only --init runs/share --split_seed 1",
    ],
)
def test_weights_that_have_learned_what_is_held_out_are_refused(typed, trained, words):
    code, told = typed(words)
    assert code == 2 and SEEN in told and "--allow_seen" in told and "Traceback" not in told, told
    if "--fold " not in words:
        code, told = typed(f"{words} --allow_seen")
        assert code == 0 and told.count(SEEN) >= 1, told
    assert {each.name for each in (trained / "runs").iterdir()} <= {
        "first",
        "second",
        "share",
        "all",
        "pics",
        "folds",
        "allowed",
        "chain",
    }


@pytest.mark.parametrize(
    "words, line",
    [
        ("--folds 3 --fold 1 --init runs/first", TABLE),
        ("--folds 3 --init runs/first --teacher runs/second", TABLE),
        ("--init runs/share", TABLE),
        ("--folds 3 --fold 0 --init runs/first/fold0", TABLE),
        ("--val_fraction 0 --init runs/share", TABLE),
        ("--eval_only --init runs/share", TABLE),
        ("--init runs/pics", f"{TINY} --data_dir pics"),
        ("--eval_only --init runs/share", ""),
        ("--init runs/pics --init_head reset", TABLE.replace("comp", "other")),
    ],
)
def test_what_has_not_is_taken(typed, trained, words, line):
    if not (trained / "other").exists():
        write_comp(
            trained / "other",
            {"Id": ids(20), "Score": range(20)},
            {"Id": ids(4, "e")},
            {"Id": ids(4, "e"), "Score": [5.5] * 4},
        )
    code, told = typed(words, line)
    assert code == 0 and SEEN not in told and "cannot be told" not in told, told


def test_of_folders_moved_and_changed_ones(typed, trained):
    code, told = typed("--split_seed 1 --init runs/pics", f"{TINY} --data_dir pics")
    assert code == 2 and SEEN in told, told
    shutil.copytree(trained / "comp", trained / "moved")
    code, told = typed("--split_seed 1 --init runs/share", TABLE.replace("comp", "moved"))
    assert code == 2 and SEEN in told, told
    table, before = trained / "comp" / "train.csv", (trained / "comp" / "train.csv").read_bytes()
    pd.read_csv(table).iloc[1:].to_csv(table, index=False)
    try:
        code, told = typed("--split_seed 1 --init runs/share")
        assert code == 0 and "has changed since" in told and "cannot be told" in told, told
    finally:
        table.write_bytes(before)


def test_what_they_started_from_counts(typed, trained):
    """A run that was allowed to learn from a teacher of another fold hands on what that has seen."""
    assert run.main(f"{TABLE} --folds 3 --fold 1 --teacher runs/first/fold0 --allow_seen --name chain".split()) == 0
    code, told = typed("--folds 3 --fold 1 --init runs/chain")
    assert (
        code == 2
        and f"--init runs/chain: {trained}/runs/first/fold0, which it has learned from, has learned 10 of the 10 {SEEN}"
        in told
    ), told


def test_a_cached_teacher(typed, trained):
    same = f"{TABLE} --folds 3 --fold 1 --crop_scale [1,1] --augment_args.crop_ratio [1,1]"
    code, told = typed(f"teacher --out cache {same} --teacher runs/first/fold0", verb=prepare.main)
    assert code == 2 and SEEN in told and not (trained / "cache").exists(), told
    code, told = typed(f"teacher --out cache {same} --teacher runs/first/fold0 --allow_seen", verb=prepare.main)
    assert code == 0, told
    code, told = typed("--teacher cache", same)
    assert code == 2 and SEEN in told, told
    code, told = typed(f"teacher --out own {same} --teacher runs/first", verb=prepare.main)
    assert code == 0 and typed("--teacher own", same)[0] == 0, told
    code, told = typed("--teacher own", same.replace("--fold 1", ""))
    assert code == 2 and "rows that one fold trains on" in told, told


@pytest.mark.parametrize(
    "words, says",
    [
        ("--init runs/first", "--init runs/first is a run over 3 folds: one of them is --init runs/first/fold0"),
        ("--teacher runs/first", "--teacher runs/first is a run over 3 folds"),
        ("--eval_only --init runs/first", "--init runs/first is a run over 3 folds"),
        ("--folds 4 --init runs/first", "over 3 folds, not 4"),
        ("--folds 3 --init runs/part", "its fold 2 has no weights yet"),
        ("--folds 3 --teacher runs/part", "its fold 2 has no weights yet"),
    ],
)
def test_a_run_over_folds_that_does_not_fit(typed, trained, words, says):
    if not (trained / "runs" / "part").exists() and "part" in words:
        shutil.copytree(trained / "runs" / "first", trained / "runs" / "part")
        shutil.rmtree(trained / "runs" / "part" / "fold2" / "checkpoints")
    code, told = typed(words)
    assert code == 2 and says in told and "Traceback" not in told, told
    shutil.rmtree(trained / "runs" / "part", ignore_errors=True)
    if "part" not in words:
        assert export.main(["runs/first"]) == 2
