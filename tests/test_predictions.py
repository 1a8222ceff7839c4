"""Predictions: every row once and in order, whatever the number of ranks."""
import numpy as np
import pandas as pd
import pytest
from conftest import result_of, write_pictures

from lightning_modules.predictions import merge

LINE = "--image_size 16 --model vit_nano4 --model_args.embed_dim 32 --model_args.depth 2 --recipe none --global_batch_size 6 --epochs 1 " \
       "--workers 0 --logger csv --lr 2e-3"

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
    assert list(tables[0]["id"]) == [f"test/{name}/{n}.jpg" for name, count in (("dark", 5), ("grey", 4), ("light", 4)) for n in range(count)]
    assert all(name.split("/")[1] == target for name, target in zip(tables[0]["id"], tables[0]["target"]))
    likeliest = tables[0].iloc[:, 2:].to_numpy().argmax(1)
    right = np.array(["dark", "grey", "light"])[likeliest] == tables[0]["target"]
    assert right.mean() == pytest.approx(result_of(runs / "one")["test/acc1"])
    for table in tables[1:]:
        assert (table[["id", "target"]] == tables[0][["id", "target"]]).all(axis=None)
        assert np.allclose(table.iloc[:, 2:], tables[0].iloc[:, 2:], atol=1e-6)
    assert not list(runs.rglob("*.partial"))


def test_fewer_samples_than_ranks_and_a_split_that_only_validates(runs, launch):
    assert launch(f"--data_dir pics {LINE} --name one").code == 0
    ended = launch(f"{AGAIN} --data_dir few --devices 3 --name few", ranks=3)
    assert ended.code == 0, ended.out
    assert list(pd.read_csv(runs / "few" / "predictions.csv")["id"]) == ["val/dark/0.jpg", "val/light/0.jpg"]


@pytest.mark.parametrize("rows, words", [([[0, 2], [1]], "1 of 4 rows missing"), ([[0, 1, 2], [2, 3]], "1 there twice")])
def test_incomplete_shards_are_refused(tmp_path, rows, words):
    shards = []
    for number, index in enumerate(rows):
        shards.append(tmp_path / f"{number}.npz")
        np.savez(shards[-1], index=np.array(index), target=np.zeros(len(index), int), prediction=np.ones((len(index), 2)))
    with pytest.raises(RuntimeError, match=words):
        merge(shards, 4)
