"""Targets with a large offset: what 32 bits cannot tell apart is learned, written and submitted apart."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import kept_environment
from table_files import ids, write_comp

from experiments import predict, run, submit
from experiments.folds import merge

LINE = (
    "--data_dir bigreg --task regression --model vit_nano4 --model_args.embed_dim 32 --model_args.depth 1 --recipe "
    "none --image_size 16 "
    "--global_batch_size 8 --epochs 1 --lr 1e-3 --accelerator cpu --workers 0 --logger csv"
)
TIMES = 1_700_000_000 + np.random.default_rng(0).permutation(100)[:60]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run over two folds of 60 whole numbers from 1,700,000,000 on."""
    root = tmp_path_factory.mktemp("large")
    write_comp(
        root / "bigreg",
        {"Id": ids(60), "time": TIMES},
        {"Id": ids(4, "q")},
        {"Id": ids(4, "q"), "time": [1_700_000_000] * 4},
    )
    with kept_environment(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for fold in (0, 1):
            assert run.main(f"{LINE} --folds 2 --fold {fold} --runs_dir runs/big --name fold{fold}".split()) == 0
    return root


def test_targets_are_kept_and_written_whole(trained):
    table = pd.read_csv(trained / "runs" / "big" / "fold0" / "oof.csv", dtype=str).set_index("Id")
    known = pd.Series(TIMES, ids(60))
    assert [float(each) for each in table["target"]] == known[table.index].tolist() and len(table) == 30
    assert not table["target"].str.contains("e").any() and not table["prediction"].str.contains("e").any()
    error = table["target"].astype(float) - table["prediction"].astype(float)
    assert json.loads((trained / "runs" / "big" / "fold0" / "result.json").read_text())["best"] == pytest.approx(
        np.sqrt((error**2).mean()), rel=1e-6
    )
    assert table["prediction"].nunique() > 20 and 25 < np.sqrt((error**2).mean()) < 35
    spec = torch.load(trained / "runs" / "big" / "fold0" / "checkpoints" / "best.ckpt", weights_only=True)["spec"]
    learned = known.drop(table.index)
    assert spec["target_range"] == [[learned.min(), learned.max()]]


def test_predictions_are_written_and_submitted_whole(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    assert (
        predict.main(["runs/big", "--name", "both", "--accelerator", "cpu", "--workers", "0", "--batch_size", "3"]) == 0
    )
    files = [trained / "runs" / name / "predictions.csv" for name in ("big/fold0", "big/fold1", "both")]
    one, other, both = (pd.read_csv(file)["prediction"].to_numpy() for file in files)
    assert both == pytest.approx((one + other) / 2, abs=1e-4) and len({*both}) == 4
    capsys.readouterr()
    assert submit.main(["runs/both", "--sample", "bigreg/sample_submission.csv"]) == 0
    assert "e+" not in capsys.readouterr().out
    assert pd.read_csv("submission.csv")["time"].tolist() == both.tolist()


def test_folds_are_merged_whole(trained):
    order = pd.concat(
        [pd.read_csv(trained / "runs" / "big" / f"fold{fold}" / "oof.csv")[["Id", "fold"]] for fold in (0, 1)]
    )
    order.to_csv(trained / "folds.csv", index=False)
    places = {fold: trained / "runs" / "big" / f"fold{fold}" for fold in (0, 1)}
    spec = torch.load(places[0] / "checkpoints" / "best.ckpt", weights_only=True)["spec"]
    merged = merge.merge(trained, places, spec, "rmse")
    rows = pd.read_csv(trained / "oof.csv")
    assert merged["overall"] == pytest.approx(np.sqrt(((rows["target"] - rows["prediction"]) ** 2).mean()))
    assert (
        sorted(rows["target"]) == sorted(TIMES)
        and pd.read_csv(trained / "predictions.csv")["prediction"].nunique() == 4
    )
