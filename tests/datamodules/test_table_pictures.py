"""Pictures that a table names otherwise than the disk: by numbers, in another Unicode spelling, with Windows' or
another machine's paths."""

import unicodedata

import pandas as pd
import pytest
from conftest import write_pictures

from experiments import run

TINY = (
    "--model vit_nano4 --model_args.embed_dim 32 --model_args.depth 1 --image_size 16 --epochs 1 --global_batch_size "
    "4 --workers 0 "
    "--logger csv --accelerator cpu --data_dir comp --dry_run"
)
NAMES = [f"p{number}" for number in range(20)]


@pytest.fixture
def comp(tmp_path, monkeypatch):
    """comp(ids, files): a table of 20 rows whose pictures lie in the files, relative to the data folder."""

    def make(ids: list[str], files: list[str]) -> None:
        write_pictures(tmp_path, {"made": len(files)})
        for number, name in enumerate(files):
            file = tmp_path / "comp" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "made" / f"{number}.jpg").rename(file)
        pd.DataFrame({"Id": ids, "label": ["cat", "dog"] * (len(ids) // 2)}).to_csv(
            tmp_path / "comp/train.csv", index=False
        )

    monkeypatch.chdir(tmp_path)
    return make


def said(capsys, flags: str = "") -> str:
    code = run.main([*TINY.split(), *flags.split()])
    text = "".join(capsys.readouterr())
    assert code == 0 and "train 18, val 2" in text, text
    return text


def test_ids_are_the_numbers_of_files(comp, capsys):
    comp([f"{number}" for number in range(20)], [f"train/{number:05d}.png" for number in range(20)])
    assert "table 20 ids are the numbers of files that are written otherwise, as train/00000.png for train/0" in said(
        capsys
    )


def test_ids_with_a_decimal_are_the_numbers_of_files(comp, capsys):
    comp([f"{number}.0" for number in range(20)], [f"train/{number}.png" for number in range(20)])
    assert "table 20 ids are the numbers of files" in said(capsys)


def test_ids_of_two_files_are_told(comp, capsys):
    comp(NAMES, [f"train/{name}.jpg" for name in NAMES] + ["train/p0.png", "train/p3.png"])
    assert (
        "table 2 ids have several pictures, and the first by name is taken (--image with a suffix chooses), as "
        "train/p0.jpg" in said(capsys)
    )
    assert "have several pictures" not in said(capsys, "--image {split}/{Id}.jpg")


@pytest.mark.parametrize("disk", ["NFD", "NFC"])
def test_names_in_another_spelling_of_unicode(comp, capsys, disk):
    names = [f"café{number}" for number in range(20)]
    table = "NFC" if disk == "NFD" else "NFD"
    comp(
        [unicodedata.normalize(table, name) for name in names],
        [unicodedata.normalize(disk, f"été/{name}.jpg") for name in names],
    )
    assert "table 20 names are spelled otherwise in Unicode on the disk" in said(capsys)
    text = said(capsys, "--image " + unicodedata.normalize(table, "été/{Id}.jpg"))
    assert "spelled otherwise" in text, text


def test_windows_paths(comp, capsys):
    comp([f"train\\a\\{name}.png" for name in NAMES], [f"train/a/{name}.png" for name in NAMES])
    assert "table 20 paths have Windows' backslashes, as train/a/p0.png for train\\a\\p0.png" in said(capsys)


@pytest.mark.parametrize("place", ["/kaggle/input/set/", "C:\\data\\set\\"])
def test_absolute_paths_of_another_machine(comp, capsys, place):
    comp([f"{place}train/{name}.png" for name in NAMES], [f"train/{name}.png" for name in NAMES])
    assert (
        "table 20 paths are absolute, of another place, and are looked for in the data folder, as train/p0.png for "
        in said(capsys)
    )


def test_a_comma_in_the_name_of_a_folder(comp, capsys):
    comp(NAMES, [f"pics, small/{name}.png" for name in NAMES])
    assert "table image pics, small/{Id}.png" in said(capsys)
