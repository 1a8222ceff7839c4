"""Predictions: every row once and in order, whatever the number of ranks."""

import numpy as np
import pandas as pd
import pytest
from conftest import result_of, write_pictures

from lightning_modules.callbacks.prediction_table import arrays, table, write
from lightning_modules.callbacks.predictions import merge
from lightning_modules.objectives.metrics import score

LINE = (
    "--image_size 16 --model vit_nano4 --model_args.embed_dim 32 --model_args.depth 2 --recipe none "
    "--global_batch_size 6 --epochs 1 "
    "--workers 0 --logger csv --lr 2e-3"
)

AGAIN = "--eval_only --init runs/one --accelerator cpu --global_batch_size 6 --logger csv"


@pytest.fixture
def runs(tmp_path):
    write_pictures(tmp_path / "pics" / "train", {"dark": 14, "grey": 13, "light": 13}, seed=1)
    write_pictures(tmp_path / "pics" / "test", {"dark": 5, "grey": 4, "light": 4}, seed=2)
    write_pictures(tmp_path / "few" / "val", {"dark": 1, "light": 1}, seed=3)
    return tmp_path / "runs"


def test_the_same_table_from_any_number_of_ranks(runs, launch):
    assert launch(f"--data_dir pics {LINE} --name one").code == 0
    for ranks in (2, 3):
        ended = launch(f"{AGAIN} --devices {ranks} --name by{ranks}", ranks=ranks)
        assert ended.code == 0, ended.out
    tables = [pd.read_csv(runs / name / "predictions.csv") for name in ("one", "by2", "by3")]
    assert list(tables[0].columns) == ["id", "target", "prediction_dark", "prediction_grey", "prediction_light"]
    assert list(tables[0]["id"]) == [
        f"test/{name}/{n}.jpg" for name, count in (("dark", 5), ("grey", 4), ("light", 4)) for n in range(count)
    ]
    assert all(name.split("/")[1] == target for name, target in zip(tables[0]["id"], tables[0]["target"]))
    likeliest = tables[0].iloc[:, 2:].to_numpy().argmax(1)
    right = np.array(["dark", "grey", "light"])[likeliest] == tables[0]["target"]
    assert right.mean() == pytest.approx(result_of(runs / "one")["test/acc1"])
    for other in tables[1:]:
        assert (other[["id", "target"]] == tables[0][["id", "target"]]).all(axis=None)
        assert np.allclose(other.iloc[:, 2:], tables[0].iloc[:, 2:], atol=1e-6)
    assert not list(runs.rglob("*.partial"))


def test_fewer_samples_than_ranks_and_a_split_that_only_validates(runs, launch):
    assert launch(f"--data_dir pics {LINE} --name one").code == 0
    ended = launch(f"{AGAIN} --data_dir few --devices 3 --name few", ranks=3)
    assert ended.code == 0, ended.out
    assert list(pd.read_csv(runs / "few" / "predictions.csv")["id"]) == ["val/dark/0.jpg", "val/light/0.jpg"]


@pytest.mark.parametrize(
    "rows, words", [([[0, 2], [1]], "1 of 4 rows missing"), ([[0, 1, 2], [2, 3]], "1 there twice")]
)
def test_incomplete_shards_are_refused(tmp_path, rows, words):
    shards = []
    for number, index in enumerate(rows):
        shards.append(tmp_path / f"{number}.npz")
        np.savez(
            shards[-1], index=np.array(index), target=np.zeros(len(index), int), prediction=np.ones((len(index), 2))
        )
    with pytest.raises(RuntimeError, match=words):
        merge(shards, 4)


CLASSES = {"task": "classification", "class_names": ["10", "9", "001"], "target_names": None, "id_column": "Id"}
LABELS = {"task": "multilabel", "class_names": ["scab", "rust"], "target_names": None, "id_column": "image"}
NUMBER = {"task": "regression", "class_names": None, "target_names": ["Pawpularity"], "id_column": "Id"}
NUMBERS = NUMBER | {"target_names": ["x", "y"]}


@pytest.mark.parametrize(
    "spec, expected",
    [
        (CLASSES, "Id,fold,target,prediction_10,prediction_9,prediction_001"),
        (NUMBER, "Id,fold,target,prediction"),
        (LABELS, "image,fold,target_scab,target_rust,prediction_scab,prediction_rust"),
        (NUMBERS, "Id,fold,target_x,target_y,prediction_x,prediction_y"),
    ],
)
def test_a_table_reads_back_to_the_last_bit(tmp_path, spec, expected):
    rng, width = np.random.default_rng(0), len(spec["class_names"] or spec["target_names"])
    prediction = rng.random((50, width)).astype(np.float32)
    target = rng.integers(0, 2, (50, width)).astype(np.float32)
    if spec["task"] == "classification":
        prediction, target = prediction / prediction.sum(1, keepdims=True), rng.integers(0, 3, 50)
    elif spec["task"] == "regression":
        prediction, target = 1.7e9 + 97.3 * rng.random((50, width)), rng.normal(40, 20, (50, width))
    write(table([f"{n:03}" for n in range(50)], spec, prediction, target, 2), tmp_path / "oof.csv")
    content = pd.read_csv(tmp_path / "oof.csv", dtype=str)
    assert ",".join(content.columns) == expected and set(content["fold"]) == {"2"} and content.iloc[7, 0] == "007"
    assert [file.name for file in tmp_path.iterdir()] == ["oof.csv"]
    again, found = arrays(content, spec)
    assert np.array_equal(found, prediction) and np.array_equal(again, target) and found.dtype == prediction.dtype
    name = {"classification": "log_loss", "multilabel": "map", "regression": "rmse"}[spec["task"]]
    assert score(name, again, found, spec) == score(name, target, prediction, spec)
    assert arrays(table(["a"] * 50, spec, prediction), spec)[0] is None and "fold" not in table(
        ["a"] * 50, spec, prediction
    )
    with pytest.raises(ValueError, match="there is no column 'prediction"):
        arrays(content.drop(columns=content.columns[-1]), spec)


def test_folds_of_their_own_and_strange_classes():
    content = table(["a", "b"], CLASSES, np.eye(3)[:2], np.array([0, 2]), np.array([1, 0]))
    assert content["fold"].tolist() == [1, 0] and content["target"].tolist() == ["10", "001"]
    with pytest.raises(ValueError, match="column 'target' has '7', which is no class"):
        arrays(content.assign(target=["10", "7"]), CLASSES)


def test_many_classes_are_all_written_where_a_submission_may_want_them():
    spec = {"task": "classification", "class_names": [f"c{k}" for k in range(101)], "target_names": None}
    likely = np.eye(101, dtype=np.float32)[[5, 100]]
    assert table(["a", "b"], spec, likely)["prediction"].tolist() == ["c5", "c100"]
    assert table(["a", "b"], spec, likely)["probability"].tolist() == [1, 1]
    assert table(["a", "b"], spec | {"id_column": "Id"}, likely).shape == (2, 102)
