"""compare.py: the right numbers in the right order, noise called noise, and whatever is wrong with a run said."""

import csv
import json
import math
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import FORKS, result_of
from wandb_stub import WandbStub

from experiments import compare
from experiments.comparison import pairs as compare_pairs
from experiments.comparison import records as compare_runs
from experiments.comparison import row_scores, wandb_records
from experiments.comparison import tables as compare_tables
from lightning_modules.loggers import wandb_local

CLASSES = ["cat", "dog", "owl"]
FILES = {"runs.csv", "groups.csv", "runs.md", "curves.png", "index.html"}


def fake_run(
    root: Path,
    name: str,
    best: float | None = 0.5,
    *,
    metric: str = "val/acc1",
    seed: int = 0,
    epochs: int = 3,
    rows=None,
    result: dict | None = None,
    **config,
) -> Path:
    """A run directory by hand. rows: a table for predictions.csv, or (file, table). best None: not finished."""
    folder = root / name
    folder.mkdir(parents=True)
    knobs = {
        "model": "vit_nano4",
        "model_args": {},
        "data": "folder",
        "split_seed": 0,
        "seed": seed,
        "epochs": epochs,
        **config,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(knobs))
    last = 0.5 if best is None else best
    lines = [
        f"{epoch},{10 * epoch + 10},{2 - 0.1 * epoch},{last * (epoch + 1) / epochs}"
        for epoch in range(epochs if best is not None else 2)
    ]
    (folder / "metrics.csv").write_text(f"epoch,step,val/loss,{metric}\n" + "\n".join(lines) + "\n")
    if best is not None:
        values = {
            "model": knobs["model"],
            "data": "folder",
            "params": 1234567,
            "gmacs": 0.1234,
            "metric": metric,
            "best": best,
            "best_epoch": 2,
            metric: best,
            "train_seconds": 36.5,
            "images_per_sec": 301.7,
            "seed": seed,
            "finished": True,
        }
        (folder / "result.json").write_text(json.dumps({**values, **(result or {})}))
    if rows is not None:
        file, table = rows if isinstance(rows, tuple) else ("predictions.csv", rows)
        table.to_csv(folder / file, index=False)
    return folder


def class_rows(right: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """Predictions of which `right` (N,) are right."""
    rng = np.random.default_rng(seed)
    target = rng.integers(3, size=len(right))
    said = np.where(right, target, (target + 1) % 3)
    probability = np.full((len(right), 3), 0.1)
    probability[np.arange(len(right)), said] = 0.8
    table = pd.DataFrame({"id": [f"test/{n}.jpg" for n in range(len(right))], "target": [CLASSES[k] for k in target]})
    return pd.concat([table, pd.DataFrame(probability, columns=[f"prediction_{name}" for name in CLASSES])], axis=1)


def table_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def run_compare(capsys, *argv) -> tuple[int, str, str]:
    code = compare.main([str(word) for word in argv])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def no_pictures(monkeypatch):
    """Without charts, which take most of the time."""
    from experiments.comparison import charts

    monkeypatch.setattr(charts, "charts", lambda found: [])


class Page(HTMLParser):
    """Collects the tags, the text, and what is opened and never closed."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)


# the table


def test_numbers_are_those_of_result_json_and_rows_are_sorted(tmp_path, capsys, no_pictures):
    scores = {"b": 0.6585999727, "a": 0.1 + 0.2, "c": 0.6585999728}
    for place, (name, best) in enumerate(scores.items()):
        fake_run(
            tmp_path / "runs",
            name,
            best,
            lr=0.001 * (place + 1),
            result={"test/acc1": best / 3, "train_seconds": 679.37, "note": 'x,"y'},
        )
    code, out, _ = run_compare(capsys, tmp_path / "runs", "--out", tmp_path / "out")
    assert code == 0 and {file.name for file in (tmp_path / "out").iterdir()} == FILES
    rows = table_of(tmp_path / "out" / "runs.csv")
    assert (
        [row["name"] for row in rows]
        == ["c", "b", "a"]
        == re.findall(r"^\d +([abc]) ", out.split("Differences")[0], re.M)
    )
    for row in rows:
        result = result_of(tmp_path / "runs" / row["name"])
        for key, value in result.items():
            assert row[key] == (value if isinstance(value, str) else json.dumps(value)), (
                key
            )  # json writes the shortest that reads back equal
        assert row["score"] == repr(result["best"]) and float(row["hours"]) == result["train_seconds"] / 3600
    assert "65.86 %" in out and "lr" in out.splitlines()[2]


def test_only_knobs_that_differ_are_columns_and_defaults_fill_what_is_younger_than_a_run(tmp_path):
    fake_run(tmp_path, "old", model_args={"depth": 2}, devices=1)
    fake_run(
        tmp_path,
        "new",
        loss_args={},
        bad_images="error",
        model_args={"depth": 4},
        devices=2,
        workers=3,
        runs_dir="x",
        lr=1e-3,
        tags="a,b",
        logger_args={"attention": True},
    )
    fake_run(tmp_path, "seed", seed=1, model_args={"depth": 4})
    found = compare_tables.compare(compare_runs.find([str(tmp_path)]))
    assert found.differing == ["seed", "devices", "model_args.depth"]
    assert [sorted(run.name for run in group.runs) for group in found.groups] in (
        [["new", "seed"], ["old"]],
        [["old"], ["new", "seed"]],
    )


@pytest.mark.parametrize(
    "metric, title", [("val/acc1", "val/acc1"), ("test/acc1", "val/acc1"), ("val_ema/acc1", "val_ema/acc1")]
)
def test_a_curve_is_named_after_what_it_shows(tmp_path, metric, title):
    from experiments.comparison import charts

    fake_run(tmp_path, "a", metric="val/acc1" if metric == "test/acc1" else metric, result={"test/acc1": 0.4})
    made = charts.charts(compare_tables.compare(compare_runs.find([str(tmp_path)]), metric))
    assert made[0].title == title and made[2].title.startswith(f"{metric} against")


@pytest.mark.parametrize(
    "metric, first",
    [
        ("val/rmse", "low"),
        ("val/loss", "low"),
        ("val/mae", "low"),
        ("val/log_loss", "low"),
        ("val_ema/rmse", "low"),
        ("val/acc1", "high"),
        ("val/qwk", "high"),
        ("val/spearman", "high"),
    ],
)
def test_the_better_end_comes_first(tmp_path, metric, first):
    fake_run(tmp_path, "low", 0.2, metric=metric)
    fake_run(tmp_path, "high", 0.7, metric=metric, lr=0.1)
    assert compare_tables.compare(compare_runs.find([str(tmp_path)])).records[0].name == first


def test_the_direction_of_every_metric_is_known():
    from lightning_modules.objectives.metrics import METRICS

    smaller, larger = ({name for name, entry in METRICS.items() if entry.mode == mode} for mode in ("min", "max"))
    assert smaller <= compare_tables.SMALLER and larger <= compare_tables.LARGER


def test_the_direction_of_an_own_metric_is_that_in_which_epochs_were_chosen(tmp_path):
    for name, best, lr in (("low", 0.2, 1.0), ("high", 0.6, 2.0)):
        folder = fake_run(tmp_path, name, best, metric="val/pain", lr=lr)
        (folder / "metrics.csv").write_text(f"epoch,step,val/pain\n0,1,{best + 1}\n1,2,{best}\n2,3,{best + 2}\n")
    found = compare_tables.compare(compare_runs.find([str(tmp_path)]))
    assert found.smaller and found.records[0].name == "low" and "smaller" in " ".join(found.notes)
    fake_run(tmp_path, "said", 0.4, metric="val/pain", result={"mode": "max"}, lr=3.0)
    assert not compare_tables.compare(compare_runs.find([str(tmp_path)])).smaller


def test_seeds_are_folded_to_mean_and_spread(tmp_path, capsys, no_pictures):
    scores = [0.50, 0.52, 0.57]
    for seed, best in enumerate(scores):
        more = {"test/acc1": best + 0.1, "images_per_sec": 100.0 + seed}
        fake_run(tmp_path / "runs", f"soft-s{seed}", best, seed=seed, distill="soft", result=more)
    fake_run(tmp_path / "runs", "none-s0", 0.4)
    code, out, _ = run_compare(capsys, tmp_path / "runs", "--out", tmp_path / "out")
    first, second = table_of(tmp_path / "out" / "groups.csv")
    assert first["group"] == "soft-s*" and second["group"] == "none-s0"
    assert float(first["mean"]) == pytest.approx(np.mean(scores), abs=1e-15)
    assert float(first["sd"]) == pytest.approx(np.std(scores, ddof=1), abs=1e-15)
    assert first["n"] == "3" and first["seeds"] == "0 1 2" and second["n"] == "1" and second["sd"] == ""
    assert (
        float(first["test/acc1_mean"]) == pytest.approx(np.mean(scores) + 0.1)
        and float(first["images_per_sec"]) == 101.0
    )
    assert code == 0 and "53.00 % +- 3.61 (3)" in out and "40.00 % (1)" in out
    assert "53.00 % &#177; 3.61 (3)" in (tmp_path / "out" / "index.html").read_text("ascii")


def test_a_teacher_of_each_seed_is_one_group_and_another_teacher_is_not(tmp_path):
    for seed in range(2):
        fake_run(tmp_path, f"soft-s{seed}", 0.5, seed=seed, teacher=f"/w/c1/cache{seed}")
    fake_run(tmp_path, "soft-s2", 0.5, seed=2, teacher="/w/c1/cache0")
    fake_run(tmp_path, "size-s1", 0.5, seed=1, teacher="/w/c1/cache10")
    groups = {group.name: group for group in compare_tables.compare(compare_runs.find([str(tmp_path)])).groups}
    assert {*groups} == {"soft-s*", "soft-s2", "size-s1"} and groups["soft-s*"].knobs == {"teacher": "/w/c1/cache*"}


def value_rows(count: int, error: float, first: int = 0, fold: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(first)
    target = rng.uniform(1, 100, count)
    said = target + error * rng.choice([-1, 1], count)
    return pd.DataFrame({"Id": range(first, first + count), "fold": fold, "target": target, "prediction": said})


def test_folds_are_one_run_with_the_score_over_all_rows(tmp_path, capsys, no_pictures):
    for fold, (count, error) in enumerate([(30, 1.0), (60, 2.0), (30, 5.0)]):
        fake_run(
            tmp_path / "runs" / "pets",
            f"fold{fold}",
            error,
            metric="val/rmse",
            folds=3,
            fold=fold,
            rows=("oof.csv", value_rows(count, error, 100 * fold, fold)),
        )
    overall = math.sqrt((30 * 1 + 60 * 4 + 30 * 25) / 120)  # not the mean of 1, 2 and 5
    fake_run(tmp_path / "runs", "said", 3.1, metric="val/rmse", lr=1.0)
    code, _, _ = run_compare(capsys, tmp_path / "runs", "--out", tmp_path / "out")
    rows = table_of(tmp_path / "out" / "runs.csv")
    assert code == 0 and [row["name"] for row in rows] == ["pets", "pets/fold0", "pets/fold1", "pets/fold2", "said"]
    assert float(rows[0]["score"]) == pytest.approx(overall, rel=1e-12) and [row["fold_of"] for row in rows] == [
        "",
        *["pets"] * 3,
        "",
    ]
    assert float(rows[0]["hours"]) == pytest.approx(3 * 36.5 / 3600) and rows[0]["params"] == "1234567"
    assert table_of(tmp_path / "out" / "groups.csv")[0]["folds"] == "3"
    (tmp_path / "runs" / "pets" / "result.json").write_text(
        json.dumps({"overall": 1.25, "metric": "val/rmse", "finished": True})
    )
    compare.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert table_of(tmp_path / "out" / "runs.csv")[0]["score"] == "1.25"


def test_single_folds_side_by_side_are_gathered_and_a_missing_one_is_said(tmp_path):
    for fold in range(3):
        rows = value_rows(30, 1.0 + fold, 100 * fold)
        fake_run(
            tmp_path, f"pets-s0-f{fold}", 1.0 + fold, metric="val/rmse", folds=3, fold=fold, rows=("oof.csv", rows)
        )
    (run,) = compare_runs.find([str(tmp_path)])
    assert run.name == "pets-s0" and len(run.folds) == 3 and run.best == pytest.approx(math.sqrt(14 / 3))
    fake_run(tmp_path, "pets-s0", 2.25, metric="oof/rmse", folds=3, result={"overall": 2.25})  # what merged them
    (run,) = compare_runs.find([str(tmp_path)])
    assert run.name == "pets-s0" and len(run.folds) == 3 and run.best == 2.25 and compare_tables.compare([run]).smaller
    shutil.rmtree(tmp_path / "pets-s0")
    shutil.rmtree(tmp_path / "pets-s0-f1")
    (run,) = compare_runs.find([str(tmp_path)])
    assert run.best is None and run.state == "unfinished" and "2 of 3 folds finished" in run.notes


# what is wrong with runs


def test_what_is_not_finished_or_broken_is_listed(tmp_path, capsys, no_pictures):
    fake_run(tmp_path / "runs", "good")
    fake_run(tmp_path / "runs", "going", None, epochs=10, lr=0.1)
    fake_run(tmp_path / "runs", "cut", lr=0.2)
    (tmp_path / "runs" / "cut" / "result.json").write_text('{"best": 0.')
    fake_run(tmp_path / "runs", "text", lr=0.3, result={"best": "good"})
    fake_run(tmp_path / "runs", "nan", float("nan"), lr=0.4)
    fake_run(tmp_path / "runs", "list", lr=0.5)
    (tmp_path / "runs" / "list" / "result.json").write_text("[1]")
    (tmp_path / "runs" / "good-predict").mkdir()
    (tmp_path / "runs" / "good-predict" / "config.yaml").write_text(
        '{\n "verb": "predict",\n "runs": ["runs/good"]\n}\n'
    )  # no run
    code, out, _ = run_compare(capsys, tmp_path / "runs", "--out", tmp_path / "out")
    states = {row["name"]: (row["state"], row["notes"]) for row in table_of(tmp_path / "out" / "runs.csv")}
    assert code == 0 and len(states) == 6 and "Without a score, so not ranked" in out
    assert states["going"] == ("unfinished", "not finished: epoch 2 of 10")
    assert (
        states["cut"][0] == states["text"][0] == states["list"][0] == "broken"
        and "result.json cannot be read" in states["cut"][1]
    )
    assert "'good', not a number" in states["text"][1] and states["nan"] == ("finished", "its best val/acc1 is nan")
    page = (tmp_path / "out" / "index.html").read_text()
    assert all(name in page for name in states)


def test_several_metrics_are_said_and_the_commonest_sorts(tmp_path, capsys, no_pictures):
    fake_run(tmp_path / "runs", "a", 0.5)
    fake_run(tmp_path / "runs", "b", 0.6, lr=0.1)
    fake_run(tmp_path / "runs", "c", 1.2, metric="val/loss", lr=0.2, result={"val/acc1": 0.55})
    fake_run(tmp_path / "runs", "d", 1.2, metric="val/loss", lr=0.3)
    fake_run(tmp_path / "runs", "e", 0.7, metric="val_ema/acc1", lr=0.4)
    code, out, _ = run_compare(capsys, tmp_path / "runs", "--out", tmp_path / "out")
    rows = table_of(tmp_path / "out" / "runs.csv")
    assert code == 0 and [row["name"] for row in rows] == ["e", "b", "c", "a", "d"] and rows[-1]["score"] == ""
    assert "different metrics" in out and "chosen by val/loss (1.2), not by val/acc1" in rows[2]["notes"]
    code, out, _ = run_compare(capsys, tmp_path / "runs", "--out", tmp_path / "out", "--metric", "val/loss")
    assert code == 0 and table_of(tmp_path / "out" / "runs.csv")[0]["name"] == "c"
    code, _, error = run_compare(capsys, tmp_path / "runs", "--out", tmp_path / "out", "--metric", "val/los")
    assert code == 2 and "did you mean val/loss" in error


def test_runs_of_one_name_and_runs_given_twice(tmp_path):
    fake_run(tmp_path / "x", "same", 0.5)
    fake_run(tmp_path / "y", "same", 0.6, lr=0.1)
    records = compare_runs.find(
        [str(tmp_path / "x"), str(tmp_path / "y" / "same"), str(tmp_path), str(tmp_path / "y" / "." / "same")]
    )
    assert sorted(run.name for run in records) == ["x/same", "y/same"]
    assert all("another run is named same too" in run.notes for run in records)


@pytest.mark.parametrize(
    "made, argument, words",
    [
        (lambda root: None, "nothing", "no such file or folder"),
        (lambda root: (root / "empty").mkdir(), "empty", "there is no run in it"),
        (
            lambda root: fake_run(root / "runs", "going", None),
            "runs",
            "none of the 1 runs is finished with a score: going (not finished: epoch 2 of 3)",
        ),
        (lambda root: (root / "a.txt").write_text("x"), "a.txt", "neither a run directory nor a .wandb file"),
        (lambda root: (root / "a.wandb").write_text("x"), "a.wandb", "is not a .wandb file"),
    ],
)
def test_mistakes_end_with_a_line(tmp_path, capsys, made, argument, words, no_pictures):
    made(tmp_path)
    code, _, error = run_compare(capsys, tmp_path / argument, "--out", tmp_path / "out")
    assert code == 2 and words in error and len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_project_without_a_key_and_a_place_that_cannot_be_written(tmp_path, capsys, monkeypatch, no_pictures):
    for name in ("WANDB_API_KEY", "NETRC", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    code, _, error = run_compare(capsys, "entity/project")
    assert code == 2 and "needs a key (wandb login)" in error and "no such folder" in error
    fake_run(tmp_path / "runs", "good")
    (tmp_path / "file").write_text("")
    code, _, error = run_compare(capsys, "runs", "--out", "file")
    assert code == 2 and "file" in error


def test_the_report_without_its_package_or_project(tmp_path, capsys, monkeypatch):
    from experiments.comparison import wandb_report

    monkeypatch.setattr(wandb_report, "find_spec", lambda name: None)
    code, _, error = run_compare(capsys, tmp_path, "--report")
    assert code == 2 and "pip install wandb-workspaces" in error and len(error.splitlines()) == 1
    monkeypatch.setattr(wandb_report, "find_spec", lambda name: object())
    code, _, error = run_compare(capsys, tmp_path, "--report")
    assert code == 2 and "give it as entity/project" in error


# pairs


def paired(tmp_path, rights: dict[str, np.ndarray], **config) -> dict[tuple[str, str], compare_pairs.Pair]:
    for place, (name, right) in enumerate(rights.items()):
        fake_run(tmp_path, name, float(right.mean()), rows=class_rows(right), lr=1.0 + place)
    found = compare_tables.compare(compare_runs.find([str(tmp_path)]))
    return compare_pairs.matrix(found).pairs


def test_a_clear_difference_is_better_and_a_small_one_is_noise(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.random(2000) < 0.6
    flip = np.zeros(2000, bool)
    flip[rng.choice(np.flatnonzero(~base), 60, replace=False)] = True
    swap = base.copy()
    swap[rng.choice(np.flatnonzero(base), 40, replace=False)] = False
    swap[rng.choice(np.flatnonzero(~base), 45, replace=False)] = True
    pairs = paired(tmp_path, {"base": base, "more": base | flip, "swap": swap})
    assert pairs["more", "base"].verdict == "better" and pairs["base", "more"].verdict == "worse"
    assert (
        pairs["more", "base"].difference == pytest.approx(0.03)
        and pairs["base", "more"].low == -pairs["more", "base"].high
    )
    noise = pairs["swap", "base"]
    assert noise.verdict == "noise" and noise.low < 0 < noise.high and noise.rows == 2000 and noise.by == "rows"
    error = 1.96 * (swap.astype(float) - base).std() / math.sqrt(2000)  # the interval that theory gives
    assert noise.high - noise.difference == pytest.approx(
        error, rel=0.1
    ) and noise.difference - noise.low == pytest.approx(error, rel=0.1)


def test_paired_rows_tell_apart_what_two_separate_intervals_would_not(tmp_path):
    """reference numbers of Pawpularity: paired error 0.037 where each score's own is 0.17."""
    rng = np.random.default_rng(0)
    target, shared = rng.uniform(1, 100, 3000), rng.normal(0, 17, 3000)
    for name, own in (("a", 0.0), ("b", 4.0)):
        table = pd.DataFrame(
            {
                "Id": range(3000),
                "fold": 0,
                "target": target,
                "prediction": target + shared + rng.normal(0, 1 + own, 3000),
            }
        )
        score = math.sqrt(((table["prediction"] - target) ** 2).mean())
        fake_run(tmp_path, name, score, metric="val/rmse", lr=1 + own, rows=("oof.csv", table))
    found = compare_tables.compare(compare_runs.find([str(tmp_path)]))
    pair = compare_pairs.matrix(found).pairs["a", "b"]
    assert (
        pair.verdict == "better"
        and pair.difference < 0
        and pair.high - pair.low < 0.5 * 2 * 1.96 * 17 / math.sqrt(2 * 3000)
    )


def test_false_alarms_are_about_five_in_a_hundred():
    rng, alarms = np.random.default_rng(1), 0
    for _ in range(200):
        rights = rng.random((2, 300)) < 0.6
        ids, target = np.arange(300).astype(str), np.zeros((300, 1))
        tables = [row_scores.Rows(ids, target, each[:, None].astype(float), ["x"], "regression") for each in rights]
        drawn = row_scores.bootstrap(tables, "mae", draws=300)
        low, high = np.quantile(drawn[:, 0] - drawn[:, 1], [0.025, 0.975])
        alarms += not low <= 0 <= high
    assert 3 <= alarms <= 22


def test_seeds_count_and_one_lucky_seed_is_noise(tmp_path):
    """Two recipes alike, whose seeds differ by more than their rows: rows of single runs would call it a difference."""
    rng = np.random.default_rng(3)
    for group, shares in enumerate(([0.60, 0.66, 0.63], [0.65, 0.61, 0.67])):
        for seed, share in enumerate(shares):
            right = rng.permutation(np.arange(3000) < round(3000 * share))
            fake_run(tmp_path, f"g{group}-s{seed}", share, seed=seed, lr=1.0 + group, rows=class_rows(right))
    found = compare_tables.compare(compare_runs.find([str(tmp_path)]))
    made = compare_pairs.matrix(found)
    pair = made.pairs["g1-s*", "g0-s*"]
    assert (
        pair.verdict == "noise"
        and pair.by == "rows and seeds"
        and pair.difference == pytest.approx(0.04 / 3)
        and "Welch" in made.what
    )
    from scipy.stats import ttest_ind

    welch = ttest_ind([0.65, 0.61, 0.67], [0.60, 0.66, 0.63], equal_var=False).confidence_interval(0.95)
    assert welch.high < pair.high < welch.high + 0.02  # the rows' own noise comes on top
    shutil.rmtree(tmp_path / "g1-s0")
    shutil.rmtree(tmp_path / "g1-s1")
    found = compare_tables.compare(compare_runs.find([str(tmp_path)]))
    pair = compare_pairs.matrix(found).pairs["g1-s2", "g0-s*"]
    assert pair.verdict == "noise" and pair.by == "rows and one side's seeds"


def test_without_rows_seeds_decide_as_scipys_welch_does_and_one_run_says_nothing(tmp_path):
    scores = {"a": [0.50, 0.51, 0.52], "b": [0.60, 0.61, 0.63], "c": [0.615]}
    for place, (name, values) in enumerate(scores.items()):
        for seed, best in enumerate(values):
            fake_run(tmp_path, f"{name}-s{seed}", best, seed=seed, lr=1.0 + place)
    found = compare_tables.compare(compare_runs.find([str(tmp_path)]))
    made = compare_pairs.matrix(found)
    from scipy.stats import ttest_ind

    interval = ttest_ind(scores["b"], scores["a"], equal_var=False).confidence_interval(0.95)
    pair = made.pairs["b-s*", "a-s*"]
    assert (
        pair.verdict == "better"
        and pair.by == "seeds"
        and (pair.low, pair.high) == pytest.approx(tuple(interval), rel=1e-9)
    )
    assert (
        made.pairs["c-s0", "a-s*"].verdict == "unknown"
        and "n is too small (1 and 3 runs)" in made.pairs["c-s0", "a-s*"].why
    )


def test_rows_that_do_not_match_are_not_compared(tmp_path):
    right = np.arange(100) % 3 > 0
    fake_run(tmp_path, "all", 0.6, rows=class_rows(right), lr=1.0)
    fake_run(tmp_path, "half", 0.6, rows=class_rows(right).iloc[50:], lr=2.0)
    fake_run(tmp_path, "few", 0.6, rows=class_rows(right).iloc[:10], lr=3.0)
    fake_run(tmp_path, "other", 0.6, rows=class_rows(right, seed=5), lr=4.0)
    twice = pd.concat([class_rows(right), class_rows(right).iloc[:1]])
    fake_run(tmp_path, "twice", 0.6, rows=twice, lr=5.0)
    fake_run(tmp_path, "kaggle", 0.6, rows=class_rows(right).drop(columns="target"), lr=6.0)
    found = compare_tables.compare(compare_runs.find([str(tmp_path)]))
    made = compare_pairs.matrix(found)
    assert made.pairs["all", "half"].rows == 50 and made.pairs["all", "half"].verdict == "noise"
    assert (
        "10 rows in common are too few" in made.pairs["all", "few"].why
        and "targets of the same rows differ" in made.pairs["all", "other"].why
    )
    assert (
        any("an id is there twice" in note for note in made.notes) and made.pairs["all", "twice"].verdict == "unknown"
    )
    assert "no predictions with targets on both sides" in made.pairs["all", "kaggle"].why


def test_predictions_of_another_run_are_noticed(tmp_path):
    right = np.arange(100) < 60
    fake_run(tmp_path, "own", 0.6, rows=class_rows(right), lr=1.0)
    fake_run(tmp_path, "odd", 0.7, rows=class_rows(right), lr=2.0, result={"test/acc1": 0.75})
    notes = compare_pairs.matrix(compare_tables.compare(compare_runs.find([str(tmp_path)]))).notes
    assert notes == ["odd: predictions.csv gives acc1 0.6, its result 0.7 or 0.75: is it of the same run?"]


def test_scores_of_rows_are_scikit_learns(tmp_path):
    from sklearn import metrics

    rng = np.random.default_rng(0)
    probability, target = rng.dirichlet(np.ones(7), 200), rng.integers(7, size=200)
    names = [f"n{k}" for k in range(7)]
    rows = row_scores.Rows(np.arange(200).astype(str), np.array(names)[target], probability, names, "classification")
    assert row_scores.score(rows, "acc1") == metrics.accuracy_score(target, probability.argmax(1))
    assert row_scores.score(rows, "acc5") == pytest.approx(metrics.top_k_accuracy_score(target, probability, k=5))
    assert row_scores.score(rows, "loss") == pytest.approx(metrics.log_loss(target, probability))
    values, guess = rng.normal(size=(200, 2)), rng.normal(size=(200, 2))
    rows = row_scores.Rows(rows.ids, values, guess, ["x", "y"], "regression")
    assert row_scores.score(rows, "rmse") == pytest.approx(metrics.root_mean_squared_error(values, guess))
    assert row_scores.score(rows, "mae") == pytest.approx(metrics.mean_absolute_error(values, guess))
    assert row_scores.score(rows, "r2") == pytest.approx(metrics.r2_score(values, guess))
    labels, chance = (rng.random((200, 4)) < 0.3).astype(float), rng.random((200, 4))
    rows = row_scores.Rows(rows.ids, labels, chance, list("abcd"), "multilabel")
    assert row_scores.score(rows, "log_loss") == pytest.approx(
        np.mean([metrics.log_loss(labels[:, k], chance[:, k]) for k in range(4)])
    )


def test_scores_from_parts_are_those_of_the_house():
    from lightning_modules.objectives import metrics

    rng, ids, checked = np.random.default_rng(1), np.arange(90).astype(str), 0
    chances, classes, labels = (
        rng.dirichlet(np.ones(7), 90),
        rng.integers(7, size=90),
        (rng.random((90, 7)) < 0.4).astype(float),
    )
    names = [f"n{k}" for k in range(7)]
    tables = [
        (row_scores.Rows(ids, np.array(names)[classes], chances, names, "classification"), classes),
        (row_scores.Rows(ids, labels, chances, names, "multilabel"), labels),
        (row_scores.Rows(ids, 9 * chances, rng.normal(size=(90, 7)), names, "regression"), 9 * chances),
    ]
    for rows, target in tables:
        for name, entry in metrics.METRICS.items():
            if rows.task in entry.tasks:
                checked += row_scores.parts(rows, name) is not None
                house = metrics.score(name, target, rows.prediction, {"task": rows.task})
                assert row_scores.score(rows, name) == pytest.approx(house, rel=1e-12), (rows.task, name)
    assert checked >= 9  # acc1 acc5 loss log_loss, loss log_loss, rmse mae r2


def test_metrics_that_are_no_mean_over_rows(tmp_path):
    rng = np.random.default_rng(0)
    for place, noise in enumerate((0.5, 3.0)):
        target = np.arange(200) * 1.0
        rows = pd.DataFrame(
            {"Id": range(200), "fold": 0, "target": target, "prediction": target + noise * 20 * rng.normal(size=200)}
        )
        fake_run(
            tmp_path,
            f"r{place}",
            0.9 - 0.2 * place,
            metric="val/spearman",
            rows=("oof.csv", rows),
            lr=1.0 + place,
            task="regression",
        )
    pair = compare_pairs.matrix(compare_tables.compare(compare_runs.find([str(tmp_path)]))).pairs["r0", "r1"]
    assert pair.verdict == "better" and pair.rows == 200


def test_only_the_likeliest_class_is_enough_for_acc1_and_no_more(tmp_path):
    table = pd.DataFrame(
        {"id": [str(n) for n in range(50)], "target": "NA", "prediction": ["NA"] * 30 + ["0"] * 20, "probability": 0.5}
    )
    table.to_csv(tmp_path / "predictions.csv", index=False)
    rows = row_scores.read_rows([tmp_path / "predictions.csv"])
    assert row_scores.score(rows, "acc1") == 0.6 and row_scores.parts(rows, "acc5") is None


# the page


def many(root: Path, count: int = 30) -> None:
    rng = np.random.default_rng(0)
    models = ["vit_nano4", "swin_t", "convnext_t", "timm/tf_efficientnet_lite0", "deit_s16_distilled"]
    for place in range(count):
        right, model, lr = rng.random(500) < 0.5 + 0.01 * place, models[place % 5], 0.0001 * (place + 1)
        costs = {
            "params": int(1e6 * 3 ** (place % 5)),
            "gmacs": 0.02 * 4 ** (place % 5),
            "train_seconds": 60 + 7.0 * place,
            "images_per_sec": 900 / (1 + place % 5) + place,
        }
        fake_run(
            root,
            f"folder-{model.replace('/', '_')}-lr{lr:.4f}-s0",
            float(right.mean()),
            epochs=20,
            rows=class_rows(right),
            model=model,
            lr=lr,
            weight_decay=0.01 * (place % 3),
            result={"test/acc1": float(right.mean()), **costs},
        )


def test_thirty_runs_are_one_page_that_fetches_nothing(tmp_path, capsys):
    many(tmp_path / "runs")
    code, out, _ = run_compare(capsys, tmp_path / "runs", "--out", tmp_path / "out")
    assert code == 0 and len(table_of(tmp_path / "out" / "runs.csv")) == 30
    text = (tmp_path / "out" / "index.html").read_text()
    page = Page(text)
    assert not page.open and {tag for tag, _ in page.tags} & {"script", "link", "iframe"} == set()
    assert not [key for _, attrs in page.tags for key in attrs if key in ("src", "href")]
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert len(list(filter(None, labels))) == 6 and len(labels) == 6 + 30  # and the legend's lines
    assert not re.search(r"https?:|@import|url\(", text) and len(text) < 500_000
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text and text.count('class="scroll"') == 2  # the matrix and the runs
    assert max(map(len, out.splitlines()[2:33])) <= 160


def test_hostile_names_and_values_are_text(tmp_path, capsys):
    bad = '<script>alert(1)</script>&"|$x_1$'
    fake_run(
        tmp_path / "runs", "_start $\\frac{1}$ | <b>", 0.5, teacher=bad, model_args={bad: bad}, result={"model": bad}
    )
    fake_run(tmp_path / "runs", "名前-s1", 0.6, seed=1)
    code, _, _ = run_compare(capsys, tmp_path / "runs", "--out", tmp_path / "out")
    page = Page((tmp_path / "out" / "index.html").read_text())
    assert code == 0 and not page.open and not {"script", "b"} & {tag for tag, _ in page.tags}
    assert any(bad in text for text in page.text) and any("名前-s1" in text for text in page.text)
    lines = [line for line in (tmp_path / "out" / "runs.md").read_text().splitlines() if line.startswith("|")]
    table = [line.replace("\\|", "").count("|") for line in lines]
    assert "<script" not in "".join(lines) and table[0] == table[1] == table[2] == table[3]
    assert any(
        row["name"] == "_start $\\frac{1}$ | <b>" and row["teacher"] == bad
        for row in table_of(tmp_path / "out" / "runs.csv")
    )


def test_one_run_alone(tmp_path, capsys):
    fake_run(tmp_path, "only", 0.25)
    code, out, _ = run_compare(capsys, tmp_path / "only", "--out", tmp_path / "out")
    assert code == 0 and "1 run by val/acc1" in out and "25.00 %" in out
    assert {file.name for file in (tmp_path / "out").iterdir()} == FILES


# W&B


LINE = (
    "--recipe demo --model_args.depth 2 --model_args.embed_dim 32 --epochs 2 --global_batch_size 256 "
    "--val_fraction 0.2 --log_every_steps 2"
)


def test_two_runs_from_directories_and_from_their_offline_files_are_the_same(launch, tmp_path, capsys):
    """The end-to-end: two runs of ours; one of them killed and resumed, so its W&B run is in two files."""
    assert launch(f"{LINE} --name one").code == 0
    assert launch(f"{LINE} --name two --lr 5e-4", kill_at_step=6).code == -9
    assert launch(f"{LINE} --name two --lr 5e-4").code == 0
    code, out, _ = run_compare(capsys, tmp_path / "runs", "--out", tmp_path / "out")
    assert code == 0, out
    rows = {row["name"]: row for row in table_of(tmp_path / "out" / "runs.csv")}
    folders = compare_runs.find([str(tmp_path / "runs")])
    offline = compare_runs.find([str(tmp_path / "runs" / name / "wandb") for name in ("one", "two")])
    assert len(folders) == len(offline) == 2 and compare_tables.compare(folders).differing == ["lr"]
    for ours, theirs in zip(folders, offline):
        result = result_of(tmp_path / "runs" / ours.name)
        assert rows[ours.name]["best"] == repr(result["best"]) and rows[ours.name]["params"] == str(result["params"])
        assert theirs.name == ours.name and theirs.state == "finished" and theirs.knobs() == ours.knobs()
        assert theirs.result == {key: value for key, value in result.items() if value is not None}
        assert [sorted(row) for row in theirs.history] == [sorted(row) for row in ours.history] or ours.name == "two"
        for row in theirs.history:  # what was in memory when run `two` was killed is in neither
            (same,) = [each for each in ours.history if each["step"] == row["step"]]
            row, same = (
                {key: value for key, value in each.items() if not key.startswith("perf/")} for each in (row, same)
            )
            assert row == pytest.approx(
                same, rel=1e-9
            )  # steps between checkpoint and kill took other times when they were done again
    assert [len(run.history) for run in offline][0] == len(folders[0].history) >= 4
    assert (
        list((tmp_path / "out").glob("*.html"))
        and compare_pairs.matrix(compare_tables.compare(folders)).pairs["one", "two"].by == "rows"
    )


def wandb_file(path: Path, payloads: list[bytes]) -> None:
    """LevelDB's log format, by its specification: blocks of 32 KiB, kinds full, first, middle, last."""
    import struct
    import zlib

    content = bytearray(b":W&B" + struct.pack("<HB", 0xBEE1, 0))
    for payload in payloads:
        first = True
        while True:
            room = 32768 - len(content) % 32768
            if room < 7:
                content += b"\0" * room
                continue
            part, payload = payload[: room - 7], payload[room - 7 :]
            kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[first, not payload]
            content += struct.pack("<IHB", zlib.crc32(part, zlib.crc32(bytes([kind]))), len(part), kind) + part
            first = False
            if not payload:
                break
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_a_wandb_file_is_read_over_blocks_and_up_to_where_it_was_cut(tmp_path):
    payloads = [
        bytes([n % 256]) * size for n, size in enumerate((32751, 32700, 40, 100_000, 0, 32754, 7))
    ]  # after the first no header fits in
    path = tmp_path / "run-x.wandb"
    wandb_file(path, payloads)
    assert list(wandb_local.payloads(path)) == payloads
    path.write_bytes(path.read_bytes()[:-9])
    assert list(wandb_local.payloads(path)) == payloads[:-1]
    content = bytearray(path.read_bytes())
    content[32768 + 7 + 100] ^= 1  # inside the second
    path.write_bytes(content)
    assert list(wandb_local.payloads(path)) == payloads[:1]


def _child(function, arguments, log) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    code = function(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def apart(tmp_path: Path, function, *arguments) -> tuple[int, str]:
    """Call in a process of its own, since wandb is one for each process. Returns exit code and output."""
    log = tmp_path / "apart.log"
    child = FORKS.Process(target=_child, args=(function, arguments, str(log)))
    child.start()
    child.join(100)
    assert child.exitcode is not None, log.read_text()
    return child.exitcode, log.read_text()


def _compare_at(folder: str, env: dict[str, str], argv: list[str]) -> int:
    os.environ.update(env)
    os.chdir(folder)
    return compare.main(argv)


@pytest.mark.slow
def test_a_project_on_the_server_gives_the_same_table_and_a_report(launch, tmp_path):
    pytest.importorskip("wandb_workspaces")
    with WandbStub() as server:
        env = {**server.env, "WANDB_PROJECT": "pets", "HOME": str(tmp_path)}
        assert launch(f"{LINE} --name one", env=env).code == 0
        ((name, run),) = server.runs.items()
        logged, summary = {key for row in server.history(name) for key in row}, {*run["summary"]}
        server._run("r2", "pets").update(
            displayName="two",
            config={"model": {"value": "vit_nano4"}, "epochs": {"value": 2}, "lr": {"value": 5e-4}},
            history={
                0: json.dumps(
                    {"_step": 0, "trainer/global_step": 3, "epoch": 0, "val/acc1": 0.25, "train/loss": float("nan")}
                )
            },
        )
        code, said = apart(tmp_path, _compare_at, str(tmp_path), env, ["stub/pets", "--out", "out", "--report"])
        assert code == 0 and not server.unknown, (said, server.unknown)
        assert "report: http" in said and "workspace: http" in said, said
        code, said = apart(tmp_path, _report, env, compare_tables.Comparison("oof/acc1", False, [], [], [], [], []))
        assert code == 0 and len(server.views) == 4, said
        for view in server.views:
            _assert_panels_have_data(view, logged, summary)
        code, empty = apart(tmp_path, _compare_at, str(tmp_path), env, ["stub/nothing", "--out", "none"])
        assert code == 2 and "no run in it" in empty and "Traceback" not in empty
        server.fail_with = 401
        code, refused = apart(tmp_path, _compare_at, str(tmp_path), env, ["stub/pets", "--out", "none"])
        assert code == 2 and "stub/pets: " in refused and "Traceback" not in refused, refused
    first, second = table_of(tmp_path / "out" / "runs.csv")
    result = result_of(tmp_path / "runs" / "one")
    assert (
        first["name"] == "one"
        and second["name"] == "two"
        and (second["state"], second["notes"]) == ("unfinished", "not finished: epoch 1 of 2")
    )
    assert all(
        float(first[key]) == result[key] for key in ("best", "images_per_sec", "lr")
    )  # the server has 724 for 724.0
    assert {file.name for file in (tmp_path / "out").iterdir()} == FILES


def test_what_the_server_has_no_number_for_is_read_from_its_word():
    rows = [{wandb_local.STEP: 4, "train/loss": "NaN", "optim/grad_norm": "Infinity", "word": "NaNs"}]
    found = wandb_records._record(
        "one", {}, {"best": "-Infinity", "data": "digits", "finished": True}, rows, "finished", "stub/pets/1"
    )
    assert math.isnan(found.history[0].pop("train/loss")) and found.history == [
        {"optim/grad_norm": math.inf, "step": 4}
    ]
    assert found.result == {"best": -math.inf, "data": "digits", "finished": True}


def _report(env: dict[str, str], found) -> int:
    os.environ.update(env)
    from experiments.comparison import wandb_report

    print("\n".join(wandb_report.save("stub/pets", found)))
    return 0


def _panels(spec) -> list[tuple[str, dict]]:
    """(kind, config) of the panels anywhere in what W&B was given."""
    if isinstance(spec, list):
        return [panel for each in spec for panel in _panels(each)]
    if not isinstance(spec, dict):
        return []
    return (
        [(spec["viewType"], spec["config"])] if "viewType" in spec and "config" in spec else _panels([*spec.values()])
    )


def _assert_panels_have_data(view: dict, logged: set[str], summary: set[str]) -> None:
    panels = _panels(json.loads(view["spec"]))
    assert {kind for kind, _ in panels} == {
        "Run History Line Plot",
        "Bar Chart",
        "Run Comparer",
        "Scatter Plot",
    } and len(panels) == 8
    for kind, config in panels:
        if kind == "Run History Line Plot":
            assert {config["xAxis"], *config["metrics"]} <= logged
        elif kind != "Run Comparer":
            shown = config.get("metrics") or [config[axis].removeprefix("summary:") for axis in ("xAxis", "yAxis")]
            assert {*shown} <= summary


def test_its_help_tells_the_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        compare.main(["--help"])
    assert stop.value.code == 0 and "--metric" in capsys.readouterr().out


def test_the_terminal_has_room_for_what_differs_before_what_it_costs(tmp_path, capsys, no_pictures, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for place in range(13):
        fake_run(
            tmp_path,
            f"csv-timm_convnext_small-s0-{place:02}ab3f",
            0.5 + place / 100,
            lr=0.001 * (place + 1),
            mixup=[0, 0.2][place % 2],
            rand_augment="rand-m9-n2-mstd0.5-inc1",
            weight_decay=0.05 * (place % 3),
            result={"test/acc1": 0.5},
        )
    code, out, _ = run_compare(capsys, tmp_path, "--out", tmp_path / "out")
    table = out.split("\n\n")[1].splitlines()
    assert code == 0 and re.split("  +", table[0].strip())[:5] == ["#", "run", "seed", "val/acc1", "test/acc1"]
    assert {"lr", "mixup", "weight_decay"} <= {*table[0].split()} and max(map(len, table)) <= 100
    assert table[-1].startswith("(no room here, in runs.csv: parameters")
