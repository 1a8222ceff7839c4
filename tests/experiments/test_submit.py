"""submit.py: what it writes is held against a strict reading by the csv module alone; what it refuses, and why."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import write_pictures
from test_predict import write_run

from experiments import predict, submit

IDS = ["003", "001", "0002", "x 4", "é,5"]


def write(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def accept(sample: Path, file: Path) -> list[dict]:
    """As strict a judge as there is, and none of our code: header, ids, row count, dialect, empty cells."""
    content = file.read_bytes()
    assert (
        not content.startswith(b"\xef\xbb\xbf")
        and b"\r" not in content
        and content.endswith(b"\n")
        and not content.endswith(b"\n\n")
    )
    with open(sample, newline="", encoding="utf-8") as first, open(file, newline="", encoding="utf-8") as second:
        theirs, ours = list(csv.reader(first)), list(csv.reader(second, strict=True))
    assert ours[0] == theirs[0] and len(ours) == len(theirs)
    assert [row[0] for row in ours[1:]] == [row[0] for row in theirs[1:]] and len({row[0] for row in ours[1:]}) == len(
        ours
    ) - 1
    for row in ours[1:]:
        assert len(row) == len(ours[0]) and all(
            cell.strip() and cell.lower() not in ("nan", "inf", "-inf", "none") for cell in row
        )
    return [dict(zip(ours[0], row)) for row in ours[1:]]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_of(folder, header, rows, **spec):
    """A directory as predict.py leaves it, its rows in another order than the sample's."""
    (folder / "run").mkdir(exist_ok=True)
    write(folder / "run" / "predictions.csv", header, rows)
    if spec:
        (folder / "run" / "config.yaml").write_text(
            json.dumps({"verb": "predict", "spec": {"id_column": "Id", **spec}})
        )


CLASSES = {"task": "classification", "class_names": ["cat", "dog", "owl"]}
THREE = [(0.7, 0.2, 0.1), (0.1, 0.1, 0.8), (0.25, 0.5, 0.25), (0.3, 0.3, 0.4), (0.05, 0.9, 0.05)]
BINARY = {"task": "classification", "class_names": ["0", "1"]}
TWO = [(0.75, 0.25), (0.5, 0.5), (0.1, 0.9), (1, 0), (0, 1)]
LABELS = {"task": "multilabel", "class_names": ["scab", "rust", "rot"]}
MANY = [(0.7, 0.6, 0.1), (0.1, 0.2, 0.05), (0.5, 0.4, 0.9), (0.49, 0.01, 0.2), (0.9, 0.9, 0.9)]
POINTS = {"task": "regression", "class_names": None, "target_names": ["Pawpularity"], "target_range": [[1, 100]]}


def submitted(folder, capsys, spec, values, columns, cells, *words, outputs=None):
    """{id: row} of an accepted submission; `cells` are the sample's."""
    names = outputs or spec["class_names"]
    header = ["Id", *([f"prediction_{name}" for name in names] if names else ["prediction"])]
    run_of(
        folder,
        header,
        [
            [name, *each]
            for name, each in zip(IDS[::-1], [value if isinstance(value, tuple) else (value,) for value in values])
        ],
        **(spec if "task" in spec else {}),
    )
    write(folder / "sample.csv", ["Id", *columns], [[name, *cells] for name in IDS])
    assert submit.main(["run", "--sample", "sample.csv", *words]) == 0, capsys.readouterr().err
    return {row["Id"]: row for row in accept(folder / "sample.csv", folder / "submission.csv")}, capsys.readouterr()


def of(values, name):
    return dict(zip(IDS[::-1], values))[name]


def test_columns_named_as_classes_take_probabilities(folder, capsys):
    found, said = submitted(folder, capsys, CLASSES, THREE, ["owl", "cat", "dog"], ["0.3"] * 3)
    for name in IDS:
        assert [float(found[name][column]) for column in ("cat", "dog", "owl")] == list(of(THREE, name))
    assert "5 rows -> submission.csv" in said.out and "5 rows only" in said.err
    found, _ = submitted(folder, capsys, CLASSES, THREE, ["dog"], ["0"])  # some of them
    assert float(found["003"]["dog"]) == of(THREE, "003")[1]


def test_a_column_of_class_names_takes_the_likeliest(folder, capsys):
    found, _ = submitted(folder, capsys, CLASSES, THREE, ["label"], ["cat"])
    assert [found[name]["label"] for name in IDS[::-1]] == ["cat", "owl", "dog", "owl", "dog"]
    grades = {"task": "classification", "class_names": ["0", "1", "2"]}
    found, _ = submitted(folder, capsys, grades, THREE, ["label"], ["0"])
    assert [found[name]["label"] for name in IDS[::-1]] == ["0", "2", "1", "2", "1"]
    found, _ = submitted(
        folder, capsys, {"task": "classification", "class_names": ["yes", "no"]}, TWO, ["label"], ["yes"]
    )
    assert [found[name]["label"] for name in IDS[::-1]] == ["yes", "yes", "no", "yes", "no"]


@pytest.mark.parametrize(
    "spec, cell",
    [(BINARY, "0"), (BINARY, "0.5"), ({"task": "classification", "class_names": ["benign", "malign"]}, "0.5")],
)
def test_a_numeric_column_of_two_classes_takes_the_second(folder, capsys, spec, cell):
    found, said = submitted(folder, capsys, spec, TWO, ["target"], [cell])
    assert all(float(found[name]["target"]) == of(TWO, name)[1] for name in IDS)
    assert f"probability of {spec['class_names'][1]!r}" in said.out
    found, _ = submitted(folder, capsys, spec, TWO, ["target"], [cell], "--as", "label")
    assert found["003"]["target"] == spec["class_names"][1] and found["é,5"]["target"] == spec["class_names"][0]


@pytest.mark.parametrize(
    "table, cell, words, expected",
    [
        ({"separator": " "}, "scab", [], ["scab rust", "rust", "scab rot", "scab", "scab rust rot"]),
        ({}, "scab|rust", [], ["scab|rust", "rust", "scab|rot", "scab", "scab|rust|rot"]),
        ({}, "rot", ["--threshold", "0.7", "--separator", ";"], ["scab", "rust", "rot", "scab", "scab;rust;rot"]),
    ],
)
def test_labels_are_joined_and_never_none(folder, capsys, table, cell, words, expected):
    found, _ = submitted(folder, capsys, {**LABELS, "table": table}, MANY, ["labels"], [cell], *words)
    assert [found[name]["labels"] for name in IDS[::-1]] == expected


def test_labels_with_a_column_each_take_probabilities(folder, capsys):
    found, _ = submitted(folder, capsys, LABELS, MANY, ["rot", "rust", "scab"], ["0"] * 3)  # they need not sum to 1
    assert [float(found["003"][name]) for name in LABELS["class_names"]] == list(of(MANY, "003"))


def test_numbers(folder, capsys):
    values = [12.5, 99.75, 1, 38.25, 60.5]
    found, said = submitted(folder, capsys, POINTS, values, ["Pawpularity"], ["50.0"])
    assert all(float(found[name]["Pawpularity"]) == of(values, name) for name in IDS)
    assert "mean 42.4" in said.out and "the sample's mean is 50" in said.out and "1 to 99.75" in said.out
    found, _ = submitted(folder, capsys, POINTS, values, ["Pawpularity"], ["50"], "--as", "whole")
    assert [found[name]["Pawpularity"] for name in IDS[::-1]] == ["12", "100", "1", "38", "60"]
    two = {"task": "regression", "class_names": None, "target_names": ["t", "u"], "target_range": [[0, 1], [5, 9]]}
    found, _ = submitted(folder, capsys, two, [(0.5, 6)] * 5, ["u", "t"], ["0", "0"], outputs=["t", "u"])
    assert found["001"] == {"Id": "001", "u": "6.0", "t": "0.5"}


def test_beyond_the_range(folder, capsys):
    values = [-3, 99.75, 1, 104, 60.5]
    run_of(folder, ["Id", "prediction"], zip(IDS, values), **POINTS)
    write(folder / "sample.csv", ["Id", "Pawpularity"], [[name, 1] for name in IDS])
    assert submit.main(["run", "--sample", "sample.csv"]) == 1
    said = capsys.readouterr().err
    assert (
        "2 values are outside of 1 to 100 (of the training targets)" in said
        and "003" in said
        and "x 4" in said
        and "--clip" in said
    )
    found, said = submitted(folder, capsys, POINTS, values, ["Pawpularity"], ["1"], "--clip")
    assert [float(found[name]["Pawpularity"]) for name in IDS[::-1]] == [
        1,
        99.75,
        1,
        100,
        60.5,
    ] and "2 values cut" in said.out
    found, _ = submitted(folder, capsys, POINTS, values, ["Pawpularity"], ["1"], "--limits", "-10", "200")
    assert float(found["é,5"]["Pawpularity"]) == -3


def test_without_a_run_the_columns_tell(folder, capsys):
    """A table of another's making: rows that sum to 1 are a classification's, numbers between 0 and 1 labels."""
    found, _ = submitted(folder, capsys, {}, THREE, ["label"], ["cat"], outputs=["cat", "dog", "owl"])
    assert found["003"]["label"] == "dog"
    found, _ = submitted(folder, capsys, {}, MANY, ["label"], ["scab"], outputs=["scab", "rust", "rot"])
    assert found["é,5"]["label"] == "scab rust"
    write(folder / "own.csv", ["Id", "prediction"], zip(IDS, [400, 1, 2, 3, -5.5]))
    write(folder / "sample.csv", ["Id", "size"], [[name, 1] for name in IDS])
    assert submit.main(["--predictions", "own.csv", "--sample", "sample.csv", "--out", "sub/here.csv"]) == 0
    assert [float(row["size"]) for row in accept(folder / "sample.csv", folder / "sub" / "here.csv")] == [
        400,
        1,
        2,
        3,
        -5.5,
    ]
    write(
        folder / "own.csv",
        ["Id", "prediction", "probability"],
        zip(IDS, ["cat", "dog", "cat", "owl", "owl"], [0.9] * 5),
    )
    write(folder / "sample.csv", ["Id", "label"], [[name, "cat"] for name in IDS])
    assert submit.main(["--predictions", "own.csv", "--sample", "sample.csv"]) == 0
    assert [row["label"] for row in accept(folder / "sample.csv", folder / "submission.csv")] == [
        "cat",
        "dog",
        "cat",
        "owl",
        "owl",
    ]


def test_the_specification_of_a_training_run_is_in_its_checkpoint(folder, capsys):
    run_of(folder, ["Id", "prediction"], zip(IDS, [400, 1, 2, 3, 5]))
    (folder / "run" / "config.yaml").write_text("model: vit_nano4\n")
    (folder / "run" / "fold0" / "checkpoints").mkdir(parents=True)
    torch.save(
        {"state_dict": {}, "config": {}, "spec": {"id_column": "Id", **POINTS}},
        folder / "run" / "fold0" / "checkpoints" / "best.ckpt",
    )
    write(folder / "sample.csv", ["Id", "Pawpularity"], [[name, 1] for name in IDS])
    assert (
        submit.main(["run", "--sample", "sample.csv"]) == 1
        and "1 values are outside of 1 to 100" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "ids, words",
    [
        (IDS[:-1], ["1 of 5 ids of the sample have no prediction: é,5"]),
        ([*IDS, "006"], ["1 of 6 predicted ids are not in the sample: 006"]),
        ([*IDS, "003"], ["the predictions: ids more than once: 003"]),
        ([*IDS[:-1], "5"], ["have no prediction: é,5", "not in the sample: 5"]),
        ([f"test/{name}.jpg" for name in IDS], ["5 of 5 ids", "without folder and suffix they would be the same"]),
        (
            ["3", "3.0", "1", "0002", "x 4", "é,5"],
            ["1 of 5 ids of the sample have no prediction: 003", "not in the sample: 3, 3.0"],
        ),
    ],
)
def test_ids_that_differ_are_refused(folder, capsys, ids, words):
    run_of(folder, ["Id", "prediction"], [[name, 50] for name in ids], **POINTS)
    write(folder / "sample.csv", ["Id", "Pawpularity"], [[name, 1] for name in IDS])
    assert submit.main(["run", "--sample", "sample.csv"]) == 1 and not (folder / "submission.csv").exists()
    said = capsys.readouterr().err
    assert all(word in said for word in words) and "nothing is written" in said


@pytest.mark.parametrize(
    "spec, header, values, columns, cells, words",
    [
        (
            POINTS,
            ["prediction"],
            [(50,), ("nan",), ("inf",), (3,), ("",)],
            ["P"],
            ["1"],
            ["3 cells are no finite number ('nan', 'inf', '')", "of the ids 001, 0002, é,5"],
        ),
        (
            POINTS,
            ["prediction"],
            [(50,), ("5O",), (4,), (3,), (2,)],
            ["P"],
            ["1"],
            ["1 cells are no finite number ('5O')"],
        ),
        (POINTS, ["other"], [(50,)] * 5, ["P"], ["1"], ["no column prediction or prediction_<name>"]),
        (POINTS, ["prediction"], [(50,)] * 5, ["P", "Q"], ["1", "1"], ["the sample has the columns P, Q"]),
        (CLASSES, None, [(0.7, 0.2, 0.2)] * 5, ["cat", "dog", "owl"], ["0"] * 3, ["5 rows do not sum to 1", "1.1"]),
        (
            CLASSES,
            None,
            [(1.2, -0.2, 0)] * 5,
            ["cat", "dog", "owl"],
            ["0"] * 3,
            ["cat: 5 values are outside of 0 to 1", "dog: 5 values"],
        ),
        (CLASSES, None, THREE, ["cat", "dog", "fox"], ["0"] * 3, ["'fox' was not predicted"]),
        (CLASSES, None, THREE, ["Cat", "dog", "owl"], ["0"] * 3, ["'Cat' was not predicted; did you mean 'cat'?"]),
        (CLASSES, None, THREE, ["a", "b", "c"], ["0"] * 3, ["cannot be brought together by name"]),
        (CLASSES, None, THREE, ["label"], ["0"], ["holds numbers (0), the classes are cat, dog, owl", "--as label"]),
        (CLASSES, None, THREE, [], [], ["nothing to fill in"]),
        (
            {**LABELS, "class_names": ["a b", "c", "d"]},
            None,
            MANY,
            ["labels"],
            ["c"],
            ["joined by ' ', which is in their names (a b)"],
        ),
        (
            {**POINTS, "target_names": ["t", "u"]},
            ["prediction_t", "prediction_u"],
            [(1, 2)] * 5,
            ["z"],
            ["0"],
            ["predicted are t, u"],
        ),
    ],
)
def test_what_cannot_be_submitted_is_told(folder, capsys, spec, header, values, columns, cells, words):
    run_of(
        folder,
        ["Id", *(header or [f"prediction_{name}" for name in spec["class_names"]])],
        [[name, *each] for name, each in zip(IDS, values)],
        **spec,
    )
    write(folder / "sample.csv", ["Id", *columns], [[name, *cells] for name in IDS])
    assert submit.main(["run", "--sample", "sample.csv"]) == 1 and not (folder / "submission.csv").exists()
    said = capsys.readouterr().err
    assert all(word in said for word in words), said


def test_constant_predictions_are_warned_of(folder, capsys):
    _, said = submitted(folder, capsys, POINTS, [38.04] * 5, ["Pawpularity"], ["1"])
    assert "Pawpularity is constant: 38.04" in said.err
    _, said = submitted(folder, capsys, CLASSES, [(0.7, 0.2, 0.1)] * 5, ["label"], ["cat"])
    assert "label is constant: 'cat'" in said.err
    _, said = submitted(folder, capsys, POINTS, [38.04, 38.05, 38, 38, 38], ["Pawpularity"], ["1"])
    assert "constant" not in said.err


def test_what_was_not_predicted_has_its_command(folder, capsys):
    run_of(folder, ["Id", "prediction"], [[name, 50] for name in IDS[1:]])
    (folder / "comp").mkdir()
    write(folder / "comp" / "sample.csv", ["Id", "P"], [[name, 1] for name in IDS])
    assert submit.main(["run", "--sample", "comp/sample.csv"]) == 1
    assert "python experiments/predict.py run --data_dir comp --bad_images fill, and submit" in capsys.readouterr().err
    about = {"verb": "predict", "runs": [str(folder / "runs" / "a"), str(folder / "runs" / "b c")], "spec": POINTS}
    (folder / "run" / "config.yaml").write_text(json.dumps(about))
    write(folder / "comp" / "sample.csv", ["Id", "P"], [[f"new{name}", 1] for name in IDS])
    assert submit.main(["run", "--sample", "comp/sample.csv"]) == 1
    assert (
        "to predict every row: python experiments/predict.py runs/a 'runs/b c' --data_dir comp, and submit"
        in capsys.readouterr().err
    )
    write(folder / "comp" / "sample.csv", ["Id", "P"], [[f"a/{name}.jpg", 1] for name in IDS[1:]])
    assert submit.main(["run", "--sample", "comp/sample.csv"]) == 1
    assert "predict.py runs/a 'runs/b c' --csv comp/sample.csv, and" in capsys.readouterr().err
    write(folder / "comp" / "sample.csv", ["Id", "P"], [[name.lstrip("0"), 1] for name in IDS])
    assert submit.main(["run", "--sample", "comp/sample.csv"]) == 1
    assert "1 of 5 ids of the sample have no prediction: 3\n" in capsys.readouterr().err
    assert submit.main(["--predictions", "run/predictions.csv", "--sample", "comp/sample.csv"]) == 1
    assert "predict.py" not in capsys.readouterr().err


def test_ids_that_are_the_same_whole_numbers_are_joined(folder, capsys):
    run_of(folder, ["Id", "prediction"], [[f"{n}.0", n + 1] for n in (3, 1, 2)], **POINTS)
    write(folder / "sample.csv", ["Id", "P"], [[name, 1] for name in ("001", "002", "003")])
    assert submit.main(["run", "--sample", "sample.csv"]) == 0
    said = capsys.readouterr().err
    assert (
        "3 ids are the same whole numbers in other spellings, and joined: '001' of the sample is '1.0' of the "
        "predictions" in said
    )
    assert [(row["Id"], float(row["P"])) for row in accept(folder / "sample.csv", folder / "submission.csv")] == [
        ("001", 2),
        ("002", 3),
        ("003", 4),
    ]
    write(folder / "sample.csv", ["Id", "P"], [[name, 1] for name in ("5.0", "6.0", "7.0")])
    assert submit.main(["run", "--sample", "sample.csv"]) == 1 and "folder and suffix" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "names, sample, written, words",
    [
        (["0.0", "1.0", "2.0"], "0", ["0", "2", "1", "2", "1"], "label: 0.0 is written as 0"),
        (["0", "1", "2"], "0.0", ["0.0", "2.0", "1.0", "2.0", "1.0"], "label: 0 is written as 0.0"),
        (["0.0", "1.0", "2.0"], "1.0", ["0.0", "2.0", "1.0", "2.0", "1.0"], "label: the likeliest class"),
        (["0", "1", "2"], "00", ["0", "2", "1", "2", "1"], "warning: label: the sample spells numbers as 00"),
    ],
)
def test_labels_are_spelled_as_the_sample_has_them(folder, capsys, names, sample, written, words):
    rows, said = submitted(folder, capsys, {**CLASSES, "class_names": names}, THREE, ["label"], [sample])
    assert [rows[name]["label"] for name in IDS[::-1]] == written and words in said.out + said.err
    rows, _ = submitted(
        folder, capsys, {**CLASSES, "class_names": names}, THREE, ["0", "1", "2"], ["0"] * 3
    )  # a column for each
    assert float(rows[IDS[-1]]["0"]) == 0.7


def test_ids_and_cells_stay_as_the_sample_has_them(folder, capsys):
    run_of(folder, ["image", "prediction"], [[name, 50.125] for name in IDS[::-1]], **{**POINTS, "id_column": "image"})
    (folder / "sample.csv").write_text("﻿Id,Pawpularity\n" + "".join(f'" {name}",1\n' for name in IDS), encoding="utf-8")
    assert submit.main(["run", "--sample", "sample.csv"]) == 0
    assert "the sample's ids are in 'Id', those of the predictions in 'image'" in capsys.readouterr().err
    with open("submission.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["Id", "Pawpularity"], *([f" {name}", "50.125"] for name in IDS)]


def test_the_line_that_hands_it_in(folder, capsys):
    values = [1.5, 2, 3, 4, 5]
    _, said = submitted(folder, capsys, POINTS, values, ["P"], ["1"])
    assert (
        "kaggle competitions submit COMPETITION -f submission.csv -m run\n" in said.out
        and "-k USER/NOTEBOOK -v VERSION" in said.out
    )
    _, said = submitted(
        folder,
        capsys,
        POINTS,
        values,
        ["P"],
        ["1"],
        "--competition",
        "petfinder-pawpularity-score",
        "--message",
        "swin, 5 folds",
    )
    assert "kaggle competitions submit petfinder-pawpularity-score -f submission.csv -m 'swin, 5 folds'\n" in said.out
    _, said = submitted(
        folder, capsys, POINTS, values, ["P"], ["1"], "--competition", "c", "--kernel", "me/book", "--version", "3"
    )
    assert said.out.endswith("kaggle competitions submit c -f submission.csv -k me/book -v 3 -m run\n")


@pytest.mark.parametrize(
    "words, line",
    [
        ("nowhere --sample sample.csv", "there is no run directory nowhere"),
        ("empty --sample sample.csv", "experiments/predict.py empty --data_dir"),
        ("--sample sample.csv", "give a run"),
        ("run", "--sample is missing"),
        ("run --predictions p.csv --sample sample.csv", "give a run"),
        ("run --sample none.csv", "none.csv"),
        ("run --sample latin.csv", "not UTF-8"),
        ("run --sample sample.csv --predictions run/predictions.csv", "not both"),
        ("run --sample none.csv", "none.csv: there is no such file"),
        ("run --sample sample.csv --threshold 7", "between 0 and 1"),
        ("run --sample sample.csv --limits 60 50", "LOW must be below HIGH"),
        ("run --sample sample.csv --out empty", "--out empty: is a folder"),
        ("run --sample sample.csv --out ./sample.csv", "written over"),
        ("run --sample sample.csv --as prob", "submit.py: --as: invalid choice prob: one of"),
        ("run --sampel sample.csv", "did you mean --sample"),
        ("run --sample sample.csv --out latin.csv/x.csv", "cannot be written: "),
    ],
)
def test_mistakes_exit_2_in_a_line(folder, capsys, words, line):
    run_of(folder, ["Id", "prediction"], [[name, 50] for name in IDS])
    write(folder / "sample.csv", ["Id", "P"], [[name, 1] for name in IDS])
    (folder / "empty").mkdir()
    (folder / "latin.csv").write_bytes("Id,P\né,1\n".encode("latin-1"))
    try:
        code = submit.main(words.split())
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and not (folder / "submission.csv").exists()
    said = [each for each in capsys.readouterr().err.splitlines() if "warning" not in each]
    assert len(said) == 1 and line in said[0]


def test_from_pictures_to_a_submission(folder, capsys):
    write_pictures(folder / "comp" / "test", {"": 25})
    write(folder / "comp" / "test.csv", ["Id"], [[n] for n in range(24, -1, -1)])
    write(folder / "comp" / "sample_submission.csv", ["Id", "Pawpularity"], [[n, 38.0] for n in range(25)])
    write_run(folder / "runs" / "cats", num_outputs=1, encoding="sigmoid", **POINTS)
    assert predict.main(["runs/cats", "--data_dir", "comp", "--workers", "0"]) == 0
    assert submit.main(["runs/cats-predict"]) == 0  # the sample is in the folder of the data
    rows = accept(folder / "comp" / "sample_submission.csv", folder / "submission.csv")
    with open("runs/cats-predict/predictions.csv", newline="") as file:
        predicted = {row["Id"]: float(row["prediction"]) for row in csv.DictReader(file)}
    assert len(rows) == 25 and all(
        math.isclose(float(row["Pawpularity"]), predicted[row["Id"]], rel_tol=1e-7) for row in rows
    )
    assert "rows only" not in capsys.readouterr().err
