"""Which rows of train.csv are trained on: a column that says it, rows without a label, and classes that one side never
sees."""

import pandas as pd
import pytest
import yaml
from conftest import result_of
from table_files import ids, write_comp
from verb import TINY, decided

from experiments import run

PARTS = ["train"] * 24 + ["valid"] * 8 + ["test"] * 8


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VITLAB_DECISION", raising=False)


def test_rows_for_test_are_scored_and_never_trained_on(tmp_path, capsys):
    write_comp(tmp_path / "comp", {"Id": ids(40), "label": ["a", "b"] * 20, "split": PARTS})
    assert run.main(["--data_dir", "comp", *TINY, "--name", "one"]) == 0
    said = capsys.readouterr().out
    assert (
        "table split by column split (its name and its words): train 24, val 8, test 8; --data_args.split_column none "
        "does without" in said
    )
    assert (
        pd.read_csv("runs/one/oof.csv")["Id"].tolist() == ids(40)[24:32]
        and pd.read_csv("runs/one/predictions.csv")["Id"].tolist() == ids(40)[32:]
    )
    assert result_of(tmp_path / "runs/one")["steps"] == 6 and "test/acc1" in result_of(tmp_path / "runs/one")
    assert yaml.safe_load((tmp_path / "runs/one/config.yaml").read_text())["data_args"] == {"split_column": "split"}
    assert (
        run.main(["--data_dir", "comp", *TINY, "--name", "one"]) == 0 and "already finished" in capsys.readouterr().out
    )
    assert (
        run.main(["--config", "runs/one/config.yaml", "--name", "one"]) == 0
        and "already finished" in capsys.readouterr().out
    )


def test_a_split_column_can_be_named_switched_off_and_folded(tmp_path, monkeypatch, capsys):
    where = ["Dev" if n % 4 else "Train" for n in range(40)]
    write_comp(tmp_path / "comp", {"Id": ids(40), "label": ["a", "b"] * 20, "split": PARTS, "where": where})
    off = decided(monkeypatch, "--data_dir", "comp", "--data_args.split_column", "none")
    assert off.data.sizes == {"train": 36, "val": 4, "test": 0} and off.cfg.data_args == {"split_column": "none"}
    named = decided(monkeypatch, "--data_dir", "comp", "--data_args.split_column", "where", "--name", "named").data
    assert named.rows["val"].tolist() == [n for n in range(40) if n % 4] and named.sizes["test"] == 0
    folded = decided(monkeypatch, "--data_dir", "comp", "--folds", "4", "--fold", "2", "--name", "folded").data
    assert folded.sizes == {"train": 24, "val": 8, "test": 8} and folded.train_ids == ids(40)[:32]
    assert "--folds 4 divides the rows of train and val anew" in capsys.readouterr().out
    assert pd.read_csv(folded.folds_file)["Id"].tolist() == ids(40)[:32]
    (tmp_path / "comp" / "test.csv").write_text("Id,label\na000,a\na001,b\n")
    both = decided(
        monkeypatch, "--data_dir", "comp", "--image", "train/{Id}.jpg", "--target", "label", "--name", "both"
    ).data
    assert both.splits["test"].ids.tolist() == ["a000", "a001"] and both.sizes["train"] == 24
    assert "its rows for test are left out, since test.csv has labels" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, cells, sizes",
    [
        ("Usage", ["Training"] * 20 + ["PublicTest"] * 10 + ["PrivateTest"] * 10, (20, 10, 10)),
        ("is_valid", ["False"] * 30 + ["True"] * 10, (30, 10, 0)),
        ("fold", ["TRAIN"] * 30 + ["test"] * 10, (27, 3, 10)),
        ("set", ["train"] * 30 + ["dev"] * 10, (30, 10, 0)),
        ("set", ["tea"] * 20 + ["chess"] * 20, (36, 4, 0)),
    ],
)
def test_the_usual_names_and_words_are_known(tmp_path, monkeypatch, name, cells, sizes):
    write_comp(tmp_path / "comp", {"Id": ids(40), "label": ["a", "b"] * 20, name: cells})
    data = decided(monkeypatch, "--data_dir", "comp", "--target", "label").data
    assert tuple(data.sizes.values()) == sizes


def test_rows_for_test_need_no_label_and_unknown_words_are_refused(tmp_path, monkeypatch, capsys):
    train = {"Id": ids(40), "label": ["a", "b"] * 16 + [""] * 8, "split": PARTS}
    write_comp(tmp_path / "comp", train)
    assert decided(monkeypatch, "--data_dir", "comp").data.sizes == {"train": 24, "val": 8, "test": 0}
    pd.DataFrame(train | {"label": ["a", "b"] * 20, "split": [*PARTS[:-1], "holdout"]}).to_csv(
        "comp/train.csv", index=False
    )
    assert run.main(["--data_dir", "comp", *TINY, "--name", "other"]) == 2
    assert (
        "column split: 'holdout' is none of train, val, test or their usual words: --data_args.split_column none"
        in capsys.readouterr().err
    )
    assert (
        run.main(["--data_dir", "comp", *TINY, "--folds", "2", "--fold", "0", "--data_args.fold_column", "split"]) == 2
    )
    assert "--data_args.split_column split takes a column of train, val and test" in capsys.readouterr().err


def test_rows_without_a_label_are_left_out_where_one_says_so(tmp_path, monkeypatch, capsys):
    labels = ["", "a", "b", "a", "", *["a", "b"] * 10]
    write_comp(
        tmp_path / "comp",
        {"Id": ids(25), "label": labels, "score": [f"{n / 3}" if n % 6 else "NaN" for n in range(25)]},
    )
    assert run.main(["--data_dir", "comp", "--target", "label", *TINY]) == 2
    assert (
        "column label: no label in rows 2 and 6 (--data_args.bad_rows skip leaves such rows out)"
        in capsys.readouterr().err
    )
    assert (
        run.main(["--data_dir", "comp", "--target", "label", "--data_args.bad_rows", "skip", *TINY, "--name", "one"])
        == 0
    )
    assert "table skipped 2 rows of train without a label, listed in skipped.csv: a000, a004" in capsys.readouterr().out
    assert (
        (tmp_path / "runs/one/skipped.csv").read_text()
        == "split,id,file,reason\ntrain,a000,train/a000.jpg,has no label\ntrain,a004,train/a004.jpg,has no label\n"
    )
    assert result_of(tmp_path / "runs/one")["skipped_images"] == 2 and not {"a000", "a004"} & {
        *pd.read_csv("runs/one/oof.csv")["Id"]
    }
    line = [
        "--data_dir",
        "comp",
        "--target",
        "score",
        "--data_args.bad_rows",
        "skip",
        "--folds",
        "2",
        "--fold",
        "0",
        "--name",
        "scores",
    ]
    scores = decided(monkeypatch, *line).data
    assert scores.task == "regression" and sum(scores.sizes.values()) == 20 == len(pd.read_csv(scores.folds_file))
    pd.DataFrame({"Id": ids(25), "label": ""}).to_csv("comp/train.csv", index=False)
    assert (
        run.main(
            ["--data_dir", "comp", "--task", "classification", "--data_args.bad_rows", "skip", *TINY, "--name", "none"]
        )
        == 2
    )
    assert "no row has a label" in capsys.readouterr().err


def test_classes_that_one_side_never_sees_are_named(tmp_path, monkeypatch, capsys):
    rows = [("p0", "rare")] * 8 + [(f"p{1 + n % 9}", "ab"[n % 2]) for n in range(40)]
    write_comp(
        tmp_path / "comp", {"Id": ids(48), "patient_id": [row[0] for row in rows], "label": [row[1] for row in rows]}
    )
    data = decided(monkeypatch, "--data_dir", "comp", "--folds", "3", "--fold", "0").data
    assert (
        f"is never learned by that fold, which gets all of them wrong; fold {data.fold_numbers[0]}: rare (8 rows)"
        in capsys.readouterr().out
    )
    patients = [f"p{n}" for n in range(30)] + [f"{'p' * (n > 1)}{n}" for n in range(10)]
    write_comp(
        tmp_path / "split",
        {"Id": ids(40), "label": ["a", "b"] * 12 + ["c"] * 8 + ["a", "b"] * 4, "patient_id": patients, "split": PARTS},
    )
    decided(monkeypatch, "--data_dir", "split", "--name", "split")
    said = capsys.readouterr().out
    assert "table val has classes that train has no row of, so they are never learned: c (8 rows)" in said
    assert (
        "table split by column split: 8 groups of patient_id lie on several sides, so scores are too good there: p2, "
        "p3," in said
    )
