"""One number, two spellings: 1 and 1.0, 01 and 1, as programs write the same column before and after it had a hole."""

import numpy as np
import pandas as pd
import pytest
from table_files import ids, table, write_comp
from verb import TINY, decided

from datamodules.tables.table import paired, plainly, whole
from experiments import predict, run, submit


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VITLAB_DECISION", raising=False)


def mixed(values, count):
    """The first half as whole numbers, the second as pandas writes a column with a hole."""
    return [f"{values[n % len(values)]}{'.0' * (n >= count // 2)}" for n in range(count)]


def test_a_whole_number_has_one_spelling():
    assert [whole(text) for text in ("5", "5.0", "05", "+5", "5.", "-5.00", "-0", "0", "00", "10")] == [
        "5",
        "5",
        "5",
        "5",
        "5",
        "-5",
        "0",
        "0",
        "0",
        "10",
    ]
    assert [whole(text) for text in ("5.5", "1.10", "5e0", "a5", "", "1.2.0", "0x5")] == [
        "5.5",
        "1.10",
        "5e0",
        "a5",
        "",
        "1.2.0",
        "0x5",
    ]
    assert plainly(["01", "2", "3.0", "x"]) == {} and plainly(["01", "1", "2.0", "x"]) == {
        "01": "1",
        "1": "1",
        "2.0": "2",
    }
    assert paired(["5.0", "7", "x"], ["5", "07", "x"]) == {"5.0": "5", "7": "07", "x": "x"}
    assert paired(["1", "01"], ["1"]) == {"1": "1"} and paired(["1"], ["01", "1.0"]) == {}


def test_labels_that_are_one_number_are_one_class_to_the_submission(tmp_path, capsys):
    labels = mixed([0, 1], 40)
    write_comp(
        tmp_path / "comp", {"Id": ids(40), "label": labels}, {"Id": ids(4, "t")}, {"Id": ids(4, "t"), "label": 0}
    )
    assert run.main(["--data_dir", "comp", *TINY, "--name", "one"]) == 0
    assert (
        "table labels: 0 and 0.0, 1 and 1.0 are the same numbers, and taken for one class each, as 0, 1"
        in capsys.readouterr().out
    )
    oof = pd.read_csv("runs/one/oof.csv", dtype=str)
    assert [*oof] == ["Id", "fold", "target", "prediction_0", "prediction_1"]
    assert oof["target"].tolist() == [labels[int(each[1:])][0] for each in oof["Id"]]
    assert (
        predict.main(["runs/one", "--accelerator", "cpu", "--workers", "0"]) == 0
        and submit.main(["runs/one-predict", "--as", "label"]) == 0
    )
    assert set(pd.read_csv("submission.csv", dtype=str)["label"]) <= {"0", "1"}


@pytest.mark.parametrize(
    "labels, names",
    [
        (["01", "1", "2", "2"] * 5, ["1", "2"]),
        (["a", "1", "1.0", "b"] * 5, ["1", "a", "b"]),
        (["1.0", "0.0"] * 10, ["0.0", "1.0"]),
        (["01", "02"] * 10, ["01", "02"]),
        (["1.1", "1.10"] * 10, ["1.1", "1.10"]),
        (["1", "0", "NaN", ""] * 5, None),
    ],
)
def test_only_whole_numbers_are_merged_and_clean_labels_stay(tmp_path, capsys, monkeypatch, labels, names):
    write_comp(tmp_path / "comp", {"Id": ids(20), "label": labels})
    if names is None:  # NaN among numbers is a hole, not a class
        assert run.main(["--data_dir", "comp", *TINY]) == 2
        assert (
            "column label: no label in rows 4, 5, 8, 9, 12 and 5 more (--data_args.bad_rows skip"
            in capsys.readouterr().err
        )
    else:
        data = decided(monkeypatch, "--data_dir", "comp", "--task", "classification", "--val_fraction", "0.3").data
        assert data.class_names == names and ("are the same numbers" in capsys.readouterr().out) == (
            len(set(labels)) > len(names)
        )


def test_joined_labels_and_a_labelled_test_table_are_read_by_number(tmp_path, monkeypatch):
    write_comp(tmp_path / "joined", {"Id": ids(24), "tags": ["1 2", "01", "2", "3 1.0", "3", "2 3"] * 4})
    data = decided(monkeypatch, "--data_dir", "joined").data
    assert data.class_names == ["1", "2", "3"] and data.all_targets[[0, 1, 3]].tolist() == [
        [1, 1, 0],
        [1, 0, 0],
        [1, 0, 1],
    ]
    write_comp(
        tmp_path / "tested",
        {"Id": ids(20), "label": ["0", "1"] * 10},
        {"Id": ids(4, "t"), "label": ["1.0", "0.0", "", "1.0"]},
    )
    data = decided(monkeypatch, "--data_dir", "tested", "--data_args.bad_rows", "skip").data
    assert data.splits["test"].targets.tolist() == [1, 0, 1] and data.splits["test"].ids.tolist() == [
        "t000",
        "t001",
        "t003",
    ]


def test_groups_that_are_one_number_stay_on_one_side(tmp_path, monkeypatch, capsys):
    patient = mixed(range(12), 48)
    write_comp(tmp_path / "comp", {"Id": range(48), "patient_id": patient, "label": ["a", "b", "c"] * 16})
    data = decided(monkeypatch, "--data_dir", "comp", "--folds", "3", "--fold", "1").data
    assert "table group patient_id: 0 and 0.0, 1 and 1.0" in capsys.readouterr().out
    assert all(
        len({*data.fold_numbers[[row for row in range(48) if float(patient[row]) == each]]}) == 1 for each in range(12)
    )
    # a file of groups, its ids written as floats
    pd.DataFrame({"Id": [f"{n}.0" for n in range(48)], "group": mixed(range(12), 48)}).to_csv("groups.csv", index=False)
    of_file = decided(monkeypatch, "--data_dir", "comp", "--group", "groups.csv", "--folds", "3", "--fold", "1").data
    assert np.array_equal(of_file.fold_numbers, data.fold_numbers)


def test_ids_that_two_pictures_have_are_not_merged(tmp_path, monkeypatch):
    write_comp(tmp_path / "comp", {"Id": ["1", "01", *ids(18)], "label": ["a", "b"] * 10}, pictures="train/{Id}.png")
    data = decided(monkeypatch, "--data_dir", "comp", "--val_fraction", "0").data
    assert data.splits["train"].names[:2].tolist() == [b"train/1.png", b"train/01.png"]
    pd.DataFrame({"Id": ["1.0", *ids(18)], "group": 1}).to_csv("comp/groups.csv", index=False)
    with pytest.raises(ValueError, match="has no row for 2 ids, as '1'"):
        table(tmp_path / "comp", group="groups.csv")


def test_fold_columns_count_as_numbers(tmp_path, monkeypatch):
    write_comp(tmp_path / "comp", {"Id": ids(20), "label": ["a", "a", "b", "b"] * 5, "fold": mixed([0, 1], 20)})
    data = decided(
        monkeypatch, "--data_dir", "comp", "--folds", "2", "--fold", "1", "--data_args.fold_column", "fold"
    ).data
    assert data.rows["val"].tolist() == list(range(1, 20, 2))
