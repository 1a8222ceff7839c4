"""Who is held out follows from the ids, not from the order of a table's rows."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from table_files import table, write_comp
from verb import decided

RNG = np.random.default_rng(3)
N = 48
SHUFFLED = RNG.permutation(N)
COLUMNS = {
    "classes": {"label": ["a", "b", "b", "c"] * 12},
    "values": {"score": RNG.exponential(5, N).round(2)},
    "labels": {"tags": [" ".join(sorted({*RNG.choice(["x", "y", "z", "w"], 2)})) for _ in range(N)]},
    "groups": {"label": ["a", "b", "b", "c"] * 12, "patient_id": [f"p{n}" for n in RNG.integers(0, 20, N)]},
    "groups of labels": {"tags": ["x", "y", "x y", "z"] * 12, "patient_id": [f"p{n}" for n in RNG.integers(0, 20, N)]},
    "groups and pictures": {
        "label": ["a", "b", "b", "c"] * 12,
        "patient_id": [f"p{n}" for n in RNG.integers(0, 40, N)],
        "file": [n - n % 8 // 7 for n in range(N)],
    },
}
COLUMNS["groups and pictures"]["label"] = [
    COLUMNS["groups and pictures"]["label"][n] for n in COLUMNS["groups and pictures"]["file"]
]


@pytest.fixture
def orders(tmp_path, monkeypatch):
    """orders(columns, ids) -> the folders of the same table with its rows in three orders; the working folder is
    new."""

    def write(columns: dict, ids: list[str]) -> list[Path]:
        frame = pd.DataFrame({"Id": ids, **columns})
        folders = [tmp_path / name / "comp" for name in ("sorted", "reversed", "shuffled")]
        for folder, rows in zip(folders, (np.arange(N), np.arange(N)[::-1], SHUFFLED)):
            folder.parent.mkdir()
            write_comp(
                folder,
                frame.iloc[rows].to_dict("list"),
                pictures="train/{file}.png" if "file" in columns else "{split}/{Id}.png",
            )
        return folders

    monkeypatch.chdir(tmp_path)
    return write


def by_id(ids: list[str], values: np.ndarray) -> dict[str, int]:
    return dict(zip(ids, values.tolist()))


@pytest.mark.parametrize("name", COLUMNS)
def test_the_order_of_the_rows_moves_nothing(orders, monkeypatch, name):
    ids, found, held = [f"{n}" for n in range(N)], [], []
    for folder in orders(COLUMNS[name], ids):
        image = ["--image", "train/{file}.png"] if "file" in COLUMNS[name] else []
        data = decided(
            monkeypatch,
            "--data_dir",
            str(folder),
            *image,
            "--folds",
            "3",
            "--fold",
            "1",
            "--runs_dir",
            str(folder.parent / "runs"),
        ).data
        found.append((by_id(data.train_ids, data.fold_numbers), Path(data.folds_file).name))
        held.append({*table(folder, val_fraction=0.2, **({"image": image[1]} if image else {})).splits["val"].ids})
    assert found[0] == found[1] == found[2] and held[0] == held[1] == held[2]
    if (
        "label" in COLUMNS[name] and "file" not in COLUMNS[name]
    ):  # scikit-learn's on the table in the order of its ids, 2 before 10
        kind = np.array(COLUMNS[name]["label"])
        splitter, groups = (
            (StratifiedGroupKFold, COLUMNS[name]["patient_id"])
            if "patient_id" in COLUMNS[name]
            else (StratifiedKFold, None)
        )
        theirs = np.empty(N, int)
        for number, (_, rows) in enumerate(splitter(3, shuffle=True, random_state=0).split(kind, kind, groups)):
            theirs[rows] = number
        assert found[0][0] == by_id(ids, theirs)


def test_a_file_of_folds_is_kept_and_read_by_id(orders, monkeypatch):
    """Files written before the rows were sorted are named by the rows as they stand."""
    ids = [f"q{n}" for n in range(N)]
    folders = orders(COLUMNS["classes"], ids)
    old = decided(monkeypatch, "--data_dir", str(folders[2]), "--folds", "3", "--fold", "0", "--name", "one").data
    from datamodules.tables import folds

    named = folds.file_name("comp", old.train_ids, old.all_targets, "classification", 3, 0)
    assert Path(old.folds_file).name != named
    Path(old.folds_file).unlink()
    other = (np.arange(N) % 3)[::-1].copy()
    folds.write(Path("runs/folds") / named, old.train_ids, other, "Id")
    again = decided(monkeypatch, "--data_dir", str(folders[2]), "--folds", "3", "--fold", "0", "--name", "two").data
    assert Path(again.folds_file).name == named and np.array_equal(again.fold_numbers, other)
    pd.DataFrame({"Id": old.train_ids[::-1], "fold": other[::-1]}).to_csv("mine.csv", index=False)
    own = ["--data_args.folds_at", "mine.csv", "--name", "three"]
    mine = decided(monkeypatch, "--data_dir", str(folders[0]), "--folds", "3", "--fold", "0", *own).data
    assert by_id(mine.train_ids, mine.fold_numbers) == by_id(old.train_ids, other)
