"""A competition from its folder to an accepted submission: run.py --folds, predict.py, submit.py, by the command line
alone."""

import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import result_of
from fold_processes import quick
from sklearn.metrics import root_mean_squared_error
from table_files import PAWPULARITY, write_picture
from test_submit import accept

from experiments import predict, submit

LINE = (
    "--data_dir comp --data pawpularity --model vit_nano4 --model_args.depth 1 --model_args.embed_dim 16 --image_size "
    "16 --folds 3 --epochs 1 "
    "--global_batch_size 8 --workers 0 --logger csv --accelerator cpu --name paws"
)


@pytest.mark.skipif(
    not (PAWPULARITY / "train.csv").is_file(), reason="the tables of Pawpularity are not in shared/data"
)
def test_from_the_tables_of_pawpularity_to_a_submission(tmp_path, launch, monkeypatch, capsys):
    (comp := tmp_path / "comp").mkdir()
    pd.read_csv(PAWPULARITY / "train.csv").head(45).to_csv(comp / "train.csv", index=False)
    for name in ("test", "sample_submission"):
        shutil.copy(PAWPULARITY / f"{name}.csv", comp)
    for split in ("train", "test"):
        for row, name in enumerate(pd.read_csv(comp / f"{split}.csv")["Id"]):
            write_picture(comp / split / f"{name}.jpg", row)
    ended = launch(LINE, before=quick, timeout=240)
    assert ended.code == 0, ended.out
    oof, result = pd.read_csv(tmp_path / "runs" / "paws" / "oof.csv"), result_of(tmp_path / "runs" / "paws")
    assert sorted(oof["Id"]) == sorted(pd.read_csv(comp / "train.csv")["Id"]) and sorted(set(oof["fold"])) == [0, 1, 2]
    assert result["overall"] == pytest.approx(root_mean_squared_error(oof["target"], oof["prediction"]), rel=1e-6)
    assert result["ci_low"] < result["overall"] < result["ci_high"] and result["finished"]

    monkeypatch.chdir(tmp_path)
    assert predict.main(["runs/paws", "--accelerator", "cpu", "--workers", "0"]) == 0
    assert submit.main(["runs/paws-predict"]) == 0
    assert "kaggle competitions submit" in capsys.readouterr().out
    rows = accept(comp / "sample_submission.csv", tmp_path / "submission.csv")
    merged = pd.read_csv(tmp_path / "runs" / "paws" / "predictions.csv").set_index("Id")[
        "prediction"
    ]  # what the run itself said
    assert len(rows) == 8 and all(0 < float(row["Pawpularity"]) < 100 for row in rows)
    np.testing.assert_allclose(
        [float(row["Pawpularity"]) for row in rows], merged.loc[[row["Id"] for row in rows]], rtol=1e-4
    )
