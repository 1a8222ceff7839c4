"""Multilabel and regression from the command line: what is learned, logged, chosen, predicted; killed, on two ranks,
from a teacher."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import result_of, weights_of
from numbers_data import LINE, SIZES, DataModule, register
from sklearn.metrics import average_precision_score
from small_runs import rows_of
from table_files import write_comp

import models
from lightning_modules.callbacks.prediction_table import arrays
from lightning_modules.objectives.metrics import score
from lightning_modules.objectives.targets import predict

MIXED = "--mixup 0.8 --cutmix 1.0 --model_args.drop_path 0.2"


@pytest.fixture
def train(tmp_path, launch):
    """train("--epochs 2", name="one") -> (run directory, what it printed); it must end with 0."""

    def run(words, name="one", ranks=1, code=0, **how):
        line = f"{LINE} --micro_batch_size {8 // ranks} {words} --devices {ranks} --name {name}"
        ended = launch(line, ranks=ranks, before=register, **how)
        assert ended.code == code, ended.out
        return tmp_path / "runs" / name, ended.out

    return run


def columns(file, start):
    return pd.read_csv(file).filter(regex=f"^{start}").to_numpy()


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--loss mse",
        "--loss huber --loss_args.delta 0.2 --data_args.targets 2",
        "--loss l1 --mixup 0.2 --augment_args.mix_mode roll",
        "--loss ordinal --loss_args.bins 11 --data_args.targets 2 --cutmix 1",
        "--loss distribution --loss_args.target_weights [3] --ema_decay 0.5",
    ],
)
def test_a_regression_is_learned_and_scored_in_its_own_units(train, words):
    run, said = train(f"--epochs 3 {words}")
    result, last, oof = result_of(run), rows_of(run)[-1], pd.read_csv(run / "oof.csv")
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    spec, stage = checkpoint["spec"], "val_ema" if "ema" in words else "val"
    target, prediction = columns(run / "oof.csv", "target"), columns(run / "oof.csv", "prediction")
    assert target.shape == prediction.shape == (13, 2 if "targets 2" in words else 1) and target.max() > 80
    for name in ("rmse", "mae", "r2", "spearman"):
        assert result[f"{stage}/{name}"] == pytest.approx(
            score(name, *arrays(oof, spec), spec), rel=1e-9
        )  # metrics.csv has ten digits
    assert result["metric"] == f"{stage}/rmse" and result["best"] == min(
        float(row[f"{stage}/rmse"]) for row in rows_of(run)
    )
    assert (
        list(oof.columns[:2]) == ["Id", "fold"]
        and oof["Id"].tolist() == [f"v{n:02}" for n in range(13)]
        and set(oof["fold"]) == {0}
    )
    assert not [name for name in last if name.startswith("train/") and name != "train/loss"]
    assert f"{stage}/rmse {result['best']:.5g}" in said
    assert (
        checkpoint["config"]["label_smoothing"]
        == yaml.safe_load((run / "config.yaml").read_text())["label_smoothing"]
        == 0
    )
    network, spec = models.load(run)
    future = pd.read_csv(run / "predictions.csv")
    assert future["Id"].tolist() == [f"p{n:02}" for n in range(SIZES["predict"])] and not {"target", "fold"} & {
        *future.columns
    }
    with torch.no_grad():
        assert predict(network(torch.zeros(1, 3, 16, 16)), spec).shape == (1, prediction.shape[1])


def test_multilabel(train):
    run, said = train(
        "--epochs 3 --data_args.kind multilabel --mixup 0.3 --label_smoothing 0.05 --data_args.labelled true"
    )
    result, rows = result_of(run), rows_of(run)
    target, prediction = columns(run / "oof.csv", "target_"), columns(run / "oof.csv", "prediction_")
    assert result["metric"] == "val/map" and result["best"] == max(float(row["val/map"]) for row in rows)
    assert result["val/map"] == pytest.approx(average_precision_score(target, prediction, average="macro"), rel=1e-9)
    assert set(np.unique(target)) == {0, 1} and list(pd.read_csv(run / "oof.csv").columns[2:5]) == [
        "target_red",
        "target_green",
        "target_blue",
    ]
    assert {"test/map", "test/f1", "test/auroc", "test/loss"} <= result.keys() and "train/acc1" not in rows[0]
    assert result["val/loss"] == pytest.approx(
        score("loss", target, prediction, {"task": "multilabel"}), rel=1e-5
    )  # without smoothing
    assert f"test/map {result['test/map']:.5g}" in said


def test_two_ranks_score_and_predict_as_one(train):
    train("--epochs 2", "trained")
    words = "--eval_only --init runs/trained"
    one, two = train(f"{words} --global_batch_size 5", "one")[0], train(words, "two", ranks=2)[0]
    assert {key: value for key, value in result_of(one).items() if key.startswith("val/")} == pytest.approx(
        {key: value for key, value in result_of(two).items() if key.startswith("val/")}, rel=1e-6
    )
    a, b, first = (pd.read_csv(run / "oof.csv") for run in (one, two, one.parent / "trained"))
    assert a["Id"].tolist() == b["Id"].tolist() == first["Id"].tolist()
    assert np.allclose(a["prediction"], b["prediction"], rtol=1e-5) and np.allclose(
        a["prediction"], first["prediction"], rtol=1e-5
    )
    assert result_of(one)["val/rmse"] == pytest.approx(np.sqrt(((a["target"] - a["prediction"]) ** 2).mean()), rel=1e-6)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_regression_killed_twice_is_the_uninterrupted_one(train, launch, ranks):
    words = f"--epochs 3 --save_every_steps 2 {MIXED} --ema_decay 0.9 --data_args.targets 2"
    whole = train(words, "whole", ranks)[0]
    for step in (3, 8):
        train(words, "killed", ranks, code=-9, kill_at_step=step)
    killed, said = train(words, "killed", ranks)
    assert "resumed from" in said
    for name in ("last.ckpt", "best.ckpt"):
        first, second = (weights_of(run / "checkpoints" / name) for run in (whole, killed))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    for name in ("oof.csv", "predictions.csv"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    one, other = (
        [{key: value for key, value in row.items() if "val" in key} for row in rows_of(run)] for run in (whole, killed)
    )
    assert one == other and len(one) == 3


MY = (
    "import numpy as np\ndef worst(target, prediction):\n    return np.abs(target - prediction).max()\nworst.mode = "
    "'min'\n"
)


def test_a_metric_of_ones_own_chooses_and_stops(train, tmp_path):
    (tmp_path / "my.py").write_text(MY)
    run, said = train("--epochs 4 --metric my.py:worst --patience 3 --average_checkpoints best-2 --lr 3e-3")
    result, rows, oof = result_of(run), rows_of(run), pd.read_csv(run / "oof.csv")
    values = [float(row["val/worst"]) for row in rows]
    assert (
        result["metric"] == "val/worst"
        and result["best"] == min(values)
        and result["best_epoch"] == int(np.argmin(values))
    )
    assert sorted(map(int, result["averaged_epochs"].split())) == sorted(np.argsort(values)[:2].tolist())
    assert result["val/worst"] == pytest.approx(
        (oof["target"] - oof["prediction"]).abs().max(), rel=1e-6
    )  # of the averaged weights


def test_a_metric_without_a_value_ends_with_the_last_epoch(train, tmp_path):
    (tmp_path / "my.py").write_text("import math\ndef nothing(target, prediction):\n    return math.nan\n")
    run, _ = train("--epochs 2 --metric my.py:nothing --patience 3")
    result = json.loads(
        (run / "result.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )
    assert result["val/nothing"] is result["best"] is result["best_epoch"] is None and result["val/rmse"] > 0
    assert not (run / "checkpoints" / "best.ckpt").exists() and len(pd.read_csv(run / "oof.csv")) > 0


def test_another_metric_of_classes(train):
    run, _ = train("--epochs 2 --data_args.kind classification --metric log_loss")
    result, rows = result_of(run), rows_of(run)
    assert (
        result["best"] == min(float(row["val/log_loss"]) for row in rows) and {"val/acc1", "val/loss"} <= result.keys()
    )
    assert result["val/log_loss"] == pytest.approx(result["val/loss"], rel=1e-6)
    assert list(pd.read_csv(run / "oof.csv").columns) == [
        "Id",
        "fold",
        "target",
        "prediction_dark",
        "prediction_bright",
    ]


def test_an_evaluation_keeps_the_units_of_the_training(train):
    trained = train("--epochs 2 --loss distribution --loss_args.bins 7", "trained")[0]
    scored = train("--eval_only --init runs/trained --data_args.high 50", "scored")[0]
    first, again = (pd.read_csv(run / "oof.csv") for run in (trained, scored))
    assert np.allclose(first["prediction"], again["prediction"]) and np.allclose(first["target"], 2 * again["target"])


@pytest.mark.parametrize(
    "words, says",
    [
        ("--loss cross_entropy", "--loss cross_entropy is for classification; for regression there are bce, mse"),
        ("--data_args.kind multilabel --loss mse", "--loss mse is for regression; for multilabel there are bce"),
        (
            "--data_args.kind classification --loss huber",
            "--loss huber is for regression; for classification there are cross_entropy",
        ),
        ("--loss mse --loss_args.bins 9", "--loss_args.bins: --loss mse of a regression takes target_weights"),
        ("--loss ordinal --loss_args.bins one", "--loss_args.bins one: must be a whole number, at least 2"),
        ("--loss_args.target_weights [1,2]", "has 2 numbers, the data 1 targets (red)"),
        ("--label_smoothing 0.2", "of a regression --label_smoothing 0"),
        ("--metric rmsee", "did you mean rmse"),
        ("--metric acc1", "--metric acc1 is for classification; for regression"),
        ("--metric my.py:f", "there is no file my.py"),
    ],
)
def test_mistakes_end_with_a_line(train, tmp_path, words, says):
    _, said = train(f"--epochs 1 {words}", code=2)
    assert says in said and "Traceback" not in said and not (tmp_path / "runs").exists()


def test_the_plan_and_the_lists_know_the_tasks(train):
    assert "red 0 to 100, green 0 to 100" in train("--epochs 1 --data_args.targets 2 --dry_run")[1]
    assert "3 labels" in train("--epochs 1 --data_args.kind multilabel --dry_run")[1]
    losses, metrics = (" ".join(train(f"--list {what}")[1].split()) for what in ("losses", "metrics"))
    assert "--loss bce classification, multilabel, regression:" in losses and "target_weights" in losses
    assert "rmse min regression: root of the mean squared error" in metrics and "my.py:function" in metrics


TEACHER = "--epochs 4 --lr 5e-3"


def test_a_regression_student_learns_from_a_regression_teacher(train):
    train(TEACHER, "teacher")
    for name in ("one", "two"):
        train("--epochs 1", name)
    run, _ = train(
        f"--epochs 6 --lr 5e-3 --teacher runs/teacher --distill_args.alpha 0.8 {MIXED} --model_args.dist_head true",
        "student",
    )
    rows = rows_of(run)
    assert (
        result_of(run)["metric"] == "val/rmse" and yaml.safe_load((run / "config.yaml").read_text())["distill"] == "mse"
    )
    assert min(float(row["train/distill_loss"]) for row in rows) < 0.5 * float(rows[0]["train/distill_loss"])
    assert "train/acc1" not in rows[0]
    twin, _ = train("--epochs 1 --lr 0 --init runs/teacher --teacher runs/teacher --distill_args.alpha 1", "twin")
    assert abs(float(rows_of(twin)[0]["train/loss"])) < 1e-9
    assert result_of(twin)["val/rmse"] == pytest.approx(result_of(run.parent / "teacher")["val/rmse"], rel=1e-6)
    train("--epochs 1 --teacher runs/one,runs/two --distill features --data_args.kind regression", "several", code=2)
    train("--epochs 1 --teacher runs/one,runs/two", "several")


def test_a_multilabel_student(train):
    train(f"{TEACHER} --data_args.kind multilabel", "teacher")
    for number, words in enumerate(
        ("", "--distill binary --distill_args.tau 2 --mixup 0.8", "--distill features --distill_args.metric cosine")
    ):
        run, _ = train(f"--epochs 1 --data_args.kind multilabel --teacher runs/teacher {words}", f"student{number}")
        assert float(rows_of(run)[0]["train/distill_loss"]) > 0 and result_of(run)["metric"] == "val/map"
    _, said = train("--epochs 1 --data_args.kind multilabel --teacher runs/teacher --distill soft", code=2)
    assert "distillation loss soft is for classification; for multilabel there are binary, mse, features" in said


def test_a_teacher_of_another_loss_teaches_in_own_units(train):
    """Both are predictions in own units, whatever the outputs are: the loss is their squared difference in shares of
    the student's range."""
    train("--epochs 2 --lr 5e-3 --loss ordinal --loss_args.bins 5 --data_args.targets 2", "teacher")
    plain = "--crop_scale [1,1] --augment_args.crop_ratio [1,1] --hflip 0 --data_args.targets 2"
    for loss in ("distribution", "mse"):
        run, _ = train(f"--epochs 1 --lr 0 --loss {loss} --teacher runs/teacher --distill_args.alpha 1 {plain}", loss)
        data, found = DataModule(image_size=16, global_batch_size=8, targets=2), []
        images = torch.stack(
            [torch.from_numpy(np.array(data.splits["train"].open(name))) for name in data.splits["train"].names]
        )
        for folder in (run, run.parent / "teacher"):
            network, spec = models.load(folder)
            x = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(spec["mean"])[:, None, None]) / torch.tensor(
                spec["std"]
            )[:, None, None]
            with torch.no_grad():
                found.append(predict(network(x), spec))
        expected = float(((found[0] - found[1]) / 100).square().mean())
        assert expected > 1e-4 and float(rows_of(run)[0]["train/distill_loss"]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "words, says",
    [
        ("--data_args.targets 2", "1 target_names (red, ...), not 2"),
        ("--data_args.kind multilabel", "task regression, not multilabel"),
    ],
)
def test_a_teacher_of_other_targets_is_refused(train, words, says):
    train("--epochs 1", "teacher")
    _, said = train(f"--epochs 1 --teacher runs/teacher {words}", "student", code=2)
    assert "runs/teacher was trained for other targets" in said and says in said, said


def prepare():
    register()
    import experiments.prepare
    import experiments.run

    experiments.run.main = experiments.prepare.main


@pytest.mark.slow
def test_a_cached_teacher_of_numbers(train, launch, tmp_path):
    train(f"{TEACHER} --data_args.targets 2 --loss ordinal --loss_args.bins 5", "teacher")
    same = f"--micro_batch_size 4 --data_args.targets 2 --loss ordinal --loss_args.bins 5 --epochs 2 {MIXED}"
    made = launch(f"teacher --out cache {LINE} {same} --teacher runs/teacher", before=prepare)
    assert made.code == 0, made.out
    checked = launch(f"teacher --out cache {LINE} {same} --teacher runs/teacher --check_cache 16", before=prepare)
    assert checked.code == 0 and float(checked.out.split("largest difference ")[1].split()[0]) < 1e-6, (
        checked.out
    )  # the last bit of a sigmoid
    live, cached = (
        weights_of(train(f"{same} --teacher {teacher}", name)[0] / "checkpoints" / "last.ckpt")
        for name, teacher in (("live", "runs/teacher"), ("cached", "cache"))
    )
    assert all(torch.allclose(live[key], cached[key], atol=1e-6) for key in live)
    _, said = train(f"{same} --data_args.high 50 --teacher cache", "other", code=2)
    assert (
        "data_args {'targets': 2} -> {'targets': 2, 'high': 50}" in said and not (tmp_path / "runs" / "other").exists()
    )
    train(f"{same.replace('ordinal', 'distribution').replace('bins 5', 'bins 4')} --teacher cache", "other")
    about = tmp_path / "cache" / "cache.json"
    about.write_text(json.dumps({key: value for key, value in json.loads(about.read_text()).items() if key != "units"}))
    _, said = train(f"{same} --teacher cache", "old", code=2)
    assert "its answers are logits" in said and not (tmp_path / "runs" / "old").exists()


TABLE = (
    "--data_dir comp --image_size 16 --model vit_nano4 --model_args.embed_dim 16 --model_args.depth 1 --recipe none "
    "--accelerator cpu "
    "--global_batch_size 8 --workers 0 --logger csv --epochs 1"
)


def test_a_table_is_answered_by_its_own_ids_on_any_number_of_ranks(launch, tmp_path):
    rng, rows, asked = np.random.RandomState(0), [f"{n:03}" for n in range(33)], [f"9{n:02}" for n in range(5)]
    score_column = np.round(rng.uniform(1, 100, 33), 1)
    write_comp(
        tmp_path / "comp",
        {"Id": rows, "Blur": rng.randint(0, 2, 33), "Pawpularity": score_column},
        {"Id": asked, "Blur": 1},
        {"Id": asked, "Pawpularity": 50.5},
    )
    for name, ranks in (("one", 1), ("two", 2)):
        ended = launch(
            f"{TABLE} --folds 3 --fold 2 --model_args.drop_path 0 --devices {ranks} --name {name}", ranks=ranks
        )
        assert ended.code == 0, ended.out
    one, two = (pd.read_csv(tmp_path / "runs" / name / "oof.csv", dtype=str) for name in ("one", "two"))
    assert list(one.columns) == ["Id", "fold", "target", "prediction"] and set(one["fold"]) == {"2"} and len(one) == 11
    truth = dict(zip(rows, score_column))
    assert all(float(target) == truth[key] for key, target in zip(one["Id"], one["target"]))
    assert one[["Id", "target"]].equals(two[["Id", "target"]])
    assert np.allclose(one["prediction"].astype(float), two["prediction"].astype(float), rtol=1e-4)
    for name in ("one", "two"):
        assert pd.read_csv(tmp_path / "runs" / name / "predictions.csv", dtype=str)["Id"].tolist() == asked
    spec = models.load(tmp_path / "runs" / "one")[1]
    assert result_of(tmp_path / "runs" / "one")["val/rmse"] == pytest.approx(
        score("rmse", *arrays(one, spec), spec), rel=1e-9
    )
    scored = launch("--eval_only --init runs/one --accelerator cpu --workers 0 --logger csv --name scored")
    assert scored.code == 0, scored.out
    assert (tmp_path / "runs" / "scored" / "oof.csv").read_text() == (tmp_path / "runs" / "one" / "oof.csv").read_text()
