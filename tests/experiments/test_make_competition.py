"""The script that makes competitions of real pictures: all of one, or a line and nothing."""

import csv
import runpy
from pathlib import Path

import pytest
from conftest import write_pictures

MAIN = runpy.run_path(str(Path(__file__).parents[1] / "real" / "make_competition.py"))["main"]


def test_a_competition_of_class_folders(tmp_path, capsys):
    write_pictures(tmp_path / "train", {"cat": 8, "ship": 8})
    assert (
        MAIN(["multilabel", str(tmp_path / "train"), str(tmp_path / "comp")]) == 0
        and "13 training and 3 test" in capsys.readouterr().out
    )
    train = list(csv.DictReader((tmp_path / "comp" / "train.csv").open()))
    assert {row["labels"] for row in train} == {"animal", "vehicle"} and len(train) == len(
        list((tmp_path / "comp" / "train").iterdir())
    ) == 13
    assert sorted(file.name for file in tmp_path.iterdir()) == ["comp", "comp_solution.csv", "train"]
    assert (
        MAIN(["labels", str(tmp_path / "train"), str(tmp_path / "comp")]) == 2
        and "is there already" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "kind, source, words",
    [
        (
            "labels",
            "cifar10",
            "holds no pictures in test/; wanted is a folder of pictures for each class, as airplane/*.jpg: ",
        ),
        ("labels", "cifar10/train/cat", "holds 0 folders; wanted"),
        ("multilabel", "cifar10/train", "has a class yak; wanted are CIFAR-10's (airplane,"),
        ("compress", "cifar10/test", "holds 4 JPEGs; wanted are ten"),
        ("labels", "nowhere", "nowhere is no folder"),
    ],
)
def test_a_folder_without_what_is_wanted_is_told_and_nothing_is_left(tmp_path, capsys, kind, source, words):
    write_pictures(tmp_path / "cifar10" / "train", {"cat": 4, "yak": 4})
    write_pictures(tmp_path / "cifar10" / "test", {"cat": 2, "yak": 2})
    assert MAIN([kind, str(tmp_path / source), str(tmp_path / "comp")]) == 2
    assert words in capsys.readouterr().err and [file.name for file in tmp_path.iterdir()] == ["cifar10"]
