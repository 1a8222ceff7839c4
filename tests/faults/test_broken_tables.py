"""Rows 23 to 26 of the fault table: broken tables and pictures. Each one is told before anything starts, with file,
column and rows."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from table_files import ids, table, write_comp, write_picture

pytestmark = pytest.mark.fault
CLASSES = ["cat", "dog"] * 6


@pytest.fixture
def root(tmp_path):
    """Twelve training rows of two classes, three test rows; the pictures are JPEGs, that of a003 a PNG."""
    place = write_comp(
        tmp_path / "comp",
        {"Id": ids(12), "label": CLASSES, "score": np.arange(12) / 4, "patient": list("aabbccddeeff")},
        {"Id": ids(3, "t")},
        {"Id": ids(3, "t"), "label": "cat"},
    )
    (place / "train" / "a003.jpg").unlink()
    write_picture(place / "train" / "a003.png")
    return place


def edit(root: Path, table: str = "train.csv", **cells: dict[int, str]):
    """Put cells into a column: edit(root, label={2: "x"}) with rows as a spreadsheet counts them."""
    frame = pd.read_csv(root / table, dtype=str, keep_default_na=False)
    for column, changes in cells.items():
        for row, value in changes.items():
            frame.loc[row - 2, column] = value
    frame.to_csv(root / table, index=False)


def text(root: Path, content: bytes | str, name: str = "train.csv"):
    (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(path: Path, keep: float):
    path.write_bytes(path.read_bytes()[: int(len(path.read_bytes()) * keep)])


def outside(root: Path) -> Path:
    write_picture(root.parent / "elsewhere" / "secret.jpg")
    return root.parent / "elsewhere"


def link_file(root):
    (root / "train/a001.jpg").unlink()
    (root / "train/a001.jpg").symlink_to(outside(root) / "secret.jpg")


def link_folder(root):
    (root / "train" / "deep").symlink_to(outside(root))
    edit(root, Id={3: "deep/secret"})


def broken_link(root):
    (root / "train/a001.jpg").unlink()
    (root / "train/a001.jpg").symlink_to(root / "train/nothing.jpg")


def folder_for_a_picture(root):
    (root / "train/a001.jpg").unlink()
    (root / "train/a001.jpg").mkdir()


def several(root):
    edit(root, Id={4: "a001"}, label={5: ""})
    (root / "train/a005.jpg").unlink()


IMAGE = {"image": "{split}/{Id}"}
SCORE = {**IMAGE, "target": "score", "task": "regression"}
BROKEN = {  # name: (what breaks, flags, what is said)
    "no train.csv": (lambda root: (root / "train.csv").unlink(), {}, r"there is no table train.csv"),
    "latin-1": (
        lambda root: text(root, "Id,label\na000,caf\u00e9\n".encode("latin-1")),
        {},
        r"train.csv: is not UTF-8: byte 0xe9 at offset 17, row 2",
    ),
    "utf-16": (lambda root: text(root, "Id,label\na000,cat\n".encode("utf-16")), {}, r"train.csv: is UTF-16"),
    "empty file": (lambda root: text(root, ""), {}, r"train.csv: the file is empty"),
    "header alone": (lambda root: text(root, "Id,label\n"), {}, r"train.csv: has a header and no row"),
    "NUL": (lambda root: text(root, "Id,label\na000,cat\na0\x0001,dog\n"), {}, r"train.csv: a NUL in row 3"),
    "open quote": (lambda root: text(root, 'Id,label\na000,"cat\na001,dog\n'), {}, r"train.csv: is no table: .*quote"),
    "shifted columns": (
        lambda root: text(root, "Id,label\na000,cat\na001,dog,1\na002,a, b\n"),
        {},
        r"train.csv: rows 3 and 4: 3 fields where the header has 2",
    ),
    "short row": (
        lambda root: text(root, "Id,label\na000,cat\na001\n"),
        {},
        r"train.csv: row 3: 1 fields where the header has 2",
    ),
    "column twice": (
        lambda root: text(root, "Id,label, Id\na,b,c\n"),
        {},
        r"train.csv: columns named more than once: Id",
    ),
    "no such target": (
        None,
        {"target": "Lable"},
        r"train.csv: --target 'Lable' is no column; did you mean 'label'\? \(there are Id, label, score",
    ),
    "no such id": (None, {"id_column": "id"}, r"--data_args.id_column 'id' is no column; did you mean 'Id'\?"),
    "no such group": (None, {"group": "patients"}, r"--group 'patients' is no column; did you mean 'patient'\?"),
    "no such column in the path": (
        None,
        {"image": "{split}/{ID}.jpg"},
        r"--image .* no column 'ID'; did you mean 'Id'\?",
    ),
    "no column in the path": (None, {"image": "{split}/a.jpg"}, r"names no column in braces"),
    "no id column in test.csv": (
        lambda root: text(root, "name\nt000\n", "test.csv"),
        IMAGE,
        r"test.csv: has no column 'Id'",
    ),
    "ids twice": (
        lambda root: edit(root, Id={4: "a001", 9: "a001"}),
        IMAGE,
        r"train.csv: column Id: 1 id more than once in rows 3, 4 and 9: 'a001'",
    ),
    "no id": (lambda root: edit(root, Id={4: " "}), IMAGE, r"train.csv: column Id: no id in row 4"),
    "no label": (
        lambda root: edit(root, label={4: "", 5: " "}),
        {},
        r"train.csv: column label: no label in rows 4 and 5",
    ),
    "missing picture": (
        lambda root: (root / "train/a005.jpg").unlink(),
        {},
        r"train.csv: 1 picture missing, row 7: train/a005 is missing",
    ),
    "another suffix": (
        None,
        {"image": "{split}/{Id}.jpg"},
        r"1 picture missing, row 5: train/a003.jpg is missing \(there is train/a003.png\)",
    ),
    "missing test picture": (
        lambda root: (root / "test/t001.jpg").unlink(),
        IMAGE,
        r"test.csv: 1 picture missing, row 3: test/t001",
    ),
    "empty picture": (
        lambda root: (root / "train/a001.jpg").write_bytes(b""),
        {},
        r"train.csv: 1 picture that cannot be read, row 3: train/a001.jpg is broken: the file is empty",
    ),
    "truncated jpeg": (
        lambda root: cut(root / "train/a001.jpg", 0.95),
        {},
        r"cannot be read, row 3: train/a001.jpg is broken: OSError: .*truncated",
    ),
    "truncated png": (lambda root: cut(root / "train/a003.png", 0.7), {}, r"cannot be read, row 5: train/a003.png .*"),
    "a page for a picture": (
        lambda root: (root / "train/a001.jpg").write_text("<html>404</html>"),
        {},
        r"cannot be read, row 3: train/a001.jpg is broken: it is not a picture Pillow knows",
    ),
    "a folder for a picture": (folder_for_a_picture, {}, r"missing, row 3: train/a001 is a folder"),
    "broken link": (broken_link, {}, r"missing, row 3: train/a001 is a broken link"),
    "climbs out": (
        lambda root: edit(root, Id={3: "../../elsewhere/secret"}),
        IMAGE,
        r"1 path outside of the data folder, row 3: train/../../elsewhere/secret leaves the data folder",
    ),
    "absolute": (
        lambda root: edit(root, Id={3: "/etc/passwd"}),
        {"image": "{Id}"},
        r"row 3: /etc/passwd is not relative to the data folder",
    ),
    "link to a file outside": (link_file, IMAGE, r"row 3: train/a001 is a link that leaves the data folder"),
    "link to a folder outside": (link_folder, IMAGE, r"row 3: train/deep/secret .*leaves the data folder"),
    "not a number": (
        lambda root: edit(root, score={3: "1,5", 4: "much"}),
        SCORE,
        r"column score: no numbers \(decimals need a point\) in rows 3 and 4: '1,5', 'much'",
    ),
    "nan target": (
        lambda root: edit(root, score={3: "", 6: "NaN"}),
        SCORE,
        r"column score: no number \(NaN\) in rows 3 and 6",
    ),
    "infinite target": (
        lambda root: edit(root, score={3: "-inf"}),
        SCORE,
        r"column score: infinite numbers in row 3: '-inf'",
    ),
    "outside of the range": (
        None,
        {**SCORE, "target_range": [0, 2]},
        r"column score: numbers outside of 0 to 2 in rows 11, 12 and 13: '2.25'",
    ),
    "range upside down": (None, {**SCORE, "target_range": [2, 0]}, r"target_range \[2, 0\]: \[low,high\]"),
    "constant target": (
        lambda root: edit(root, score=dict.fromkeys(range(2, 14), "7")),
        SCORE,
        r"column score: the constant 7",
    ),
    "single class": (
        lambda root: edit(root, label=dict.fromkeys(range(2, 14), "cat")),
        {},
        r"column label: the single class 'cat'",
    ),
    "class with one row": (
        lambda root: edit(root, label={3: "owl"}),
        {"group": "none"},
        r"train.csv: classes with one row each: owl \(row 3\); --val_fraction 0.1 needs two",
    ),
    "more classes than rows held out": (
        lambda root: edit(root, label={row: str(row % 6) for row in range(2, 14)}),
        {"group": "none"},
        r"--val_fraction 0.1 of 12 rows is 2, and each of 6 classes needs one: --val_fraction 0.5 or more",
    ),
    "labels only in test": (
        lambda root: text(root, "Id,label\nt000,cat\nt001,owl\nt002,dog\n", "test.csv"),
        {},
        r"test.csv: column label: labels that train.csv does not have in row 3: 'owl'",
    ),
    "two labels for a picture": (
        lambda root: edit(root, patient={2: "x", 3: "x"}),
        {"image": "train/a00{score[0]}", "group": "none"},
        r"rows with the picture of another row and another target, as rows 2 and 3: train/a000.jpg",
    ),
    "neither 0 nor 1": (
        lambda root: text(
            root, "Id,cat,dog\n" + "".join(f"{name},{n % 2},{n % 3}\n" for n, name in enumerate(ids(12)))
        ),
        {"target": "cat,dog", "task": "multilabel"},
        r"column dog: neither 0 nor 1 in rows 4, 7, 10 and 13: '2'",
    ),
    "not one-hot": (
        lambda root: text(
            root, "Id,cat,dog\n" + "".join(f"{name},{n % 2},{n % 2}\n" for n, name in enumerate(ids(12)))
        ),
        {"target": "cat,dog", "task": "classification"},
        r"cat, dog: not exactly one 1 .* in rows 2, 3, 4, 5, 6 and 7 more",
    ),
    "too many to skip": (
        lambda root: [(root / f"train/a{n:03}.jpg").unlink() for n in range(5, 12)],
        {"bad_images": "skip"},
        r"7 pictures missing, .*more than half: too many to skip",
    ),
    "fold column": (
        lambda root: edit(root, patient=dict.fromkeys(range(2, 14), "0") | {3: "5"}),
        {"folds": 2, "fold_column": "patient"},
        r"column patient: holds 0, 5; --folds 2 needs the numbers 0 to 1",
    ),
    "fold column without folds": (None, {"fold_column": "patient"}, r"--folds says how many"),
    "more folds than groups": (None, {"folds": 8, "group": "patient"}, r"--folds 8: there are 6 groups"),
    "group file without an id": (
        lambda root: text(root, "Id,group\na000,1\n", "groups.csv"),
        {"group": "groups.csv"},
        r"--group groups.csv: has no row for 11 ids, as 'a001'",
    ),
    "several at once": (
        several,
        IMAGE,
        r"4 problems .*\n.*id more than once.*\n.*no label.*\n.*picture missing.*\n.*another target",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_rows_23_to_26_are_told_before_the_start(root, name):
    breaks, knobs, said = BROKEN[name]
    table(root)  # whole before
    if breaks:
        breaks(root)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        table(root, **knobs)
    assert re.search(said, str(error.value)), error.value
