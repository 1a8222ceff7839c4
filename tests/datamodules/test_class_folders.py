"""Class folders as people have them: broken pictures, folders within folders, other suffixes, spellings; from the
command line."""

import os
import shutil
import unicodedata

import numpy as np
import pytest
from conftest import result_of, weights_of, write_damaged, write_pictures
from PIL import Image

from experiments import run

TINY = (
    "--model vit_nano4 --model_args.embed_dim 32 --model_args.depth 1 --image_size 16 --recipe none --epochs 2 "
    "--global_batch_size 8 --workers 0 --logger csv --micro_batch_size 8 --accelerator cpu --data_dir pics"
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with 40 training and 6 validation pictures of two classes in `pics`."""
    write_pictures(tmp_path / "pics" / "train", {"dark": 20, "light": 20}, seed=1)
    write_pictures(tmp_path / "pics" / "val", {"dark": 3, "light": 3}, seed=2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ended(line: str, capsys) -> tuple[int, str]:
    """(exit code, what was printed) of run.py."""
    try:
        code = run.main(f"{TINY} {line}".split())
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    return code, said.out + said.err


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def test_a_broken_picture_is_found_before_the_first_step_and_can_be_left_out(here, capsys):
    cut(here / "pics/train/dark/3.jpg")
    code, said = ended("--name one", capsys)
    assert (
        code == 2
        and "1 picture that cannot be read: train/dark/3.jpg is broken: OSError" in said
        and "--bad_images skip" in said
    ), said
    assert "Traceback" not in said and not (here / "runs").exists()
    code, said = ended("--name one --bad_images skip", capsys)
    assert code == 0 and "data skipped 1 picture of train, listed in skipped.csv: train/dark/3.jpg is broken" in said, (
        said
    )
    assert result_of(here / "runs/one")["skipped_images"] == 1 and result_of(here / "runs/one")["steps"] == 8
    assert (
        (here / "runs/one/skipped.csv")
        .read_text()
        .startswith("split,id,file,reason\ntrain,train/dark/3.jpg,train/dark/3.jpg,is broken: OSError")
    )
    for number in range(11):
        cut(here / f"pics/train/light/{number}.jpg")
        cut(here / f"pics/train/dark/{number}.jpg")
    code, said = ended("--name two --bad_images skip", capsys)
    assert code == 2 and "22 of 40 pictures of train cannot be read (more than half: too many to skip)" in said, said
    code, said = ended("--data digits --bad_images skip --data_dir null", capsys)
    assert code == 2 and "--bad_images skip is for picture files; --data digits has none" in said, said


def test_a_picture_that_breaks_later_is_left_out_by_the_resume(here, launch, ranks=2):
    write_pictures(here / "more", {"dark": 2})
    for number in range(2):
        shutil.copy(
            here / "more/dark" / f"{number}.jpg", here / "pics/train/dark" / f"{20 + number}.jpg"
        )  # 42 pictures, 5 steps with 41 too
    line = f"{TINY} --save_every_steps 2 --devices {ranks} --name one"
    assert launch(line, ranks=ranks, kill_at_step=7).code == -9
    cut(here / "pics/train/dark/3.jpg")
    refused = launch(line, ranks=ranks)
    assert refused.code == 2 and "train/dark/3.jpg is broken" in refused.out, refused.out
    whole = launch(f"{line} --bad_images skip", ranks=ranks)
    assert whole.code == 0 and "resumed from" in whole.out and "Traceback" not in whole.out, whole.out
    assert (
        "other pictures than before cannot be read (train: 42 samples -> 41): going on at the same step, in another "
        "order" in whole.out
    )
    result = result_of(here / "runs/one")
    assert result["steps"] == 10 and result["skipped_images"] == 1 and result["finished"]


def test_a_picture_that_decoding_finds_broken_ends_the_run_with_a_way_on(here, capsys):
    write_damaged(here / "pics/train/dark/3.jpg")
    code, said = ended("--name one --save_every_steps 1", capsys)
    assert (
        code == 1
        and "cannot read picture pics/train/dark/3.jpg" in said
        and "an empty file too" in said
        and "Traceback" not in said
    ), said
    (here / "pics/train/dark/3.jpg").write_bytes(b"")
    code, said = ended("--name one --bad_images skip", capsys)
    assert code == 2 and "train: 40 samples -> 39" in said, said  # an epoch of one step less: another run
    assert ended("--name one --bad_images skip --overwrite", capsys)[0] == 0


def test_a_picture_that_is_gone_is_named_with_a_way_on(here, launch):
    os.rename(here / "pics/train/dark/0.jpg", here / "kept.jpg")  # 39: 4 steps
    assert launch(f"{TINY} --save_every_steps 2 --name one", kill_at_step=5).code == -9
    (here / "pics/train/light/4.jpg").unlink()
    refused = launch(f"{TINY} --name one")
    assert (
        refused.code == 2
        and "train/light: 20 pictures -> 19" in refused.out
        and "an empty file in the place of" in refused.out
    ), refused.out
    (here / "pics/train/light/4.jpg").write_bytes(b"")
    assert launch(f"{TINY} --name one --bad_images skip").code == 0


def test_only_as_many_are_looked_at_as_a_start_has_time_for(here, capsys, monkeypatch):
    from datamodules import folder

    monkeypatch.setattr(folder, "SECONDS", -1)
    code, said = ended("--name one --dry_run", capsys)
    assert (
        code == 0
        and "data looked at 0 of 46 pictures in -1 seconds" in said
        and "--bad_images skip looks at all" in said
    ), said


def test_pictures_below_a_class_folder_and_of_other_suffixes_are_used_and_the_rest_is_counted(here, capsys):
    deep = here / "pics/train/dark/session 1/left"
    deep.mkdir(parents=True)
    for name in ("a.jfif", "b.JPE", "c.avif", "d.qoi", "e.tga"):
        Image.new("RGB", (20, 20), "black").save(deep / name, format={"a.jfif": "JPEG", "b.JPE": "JPEG"}.get(name))
    for name in ("f.heic", "g.heic", "notes.txt", ".hidden.heic", "README"):
        (deep / name).write_text("")
    (deep.parent / ".thumbs").mkdir()
    Image.new("RGB", (20, 20)).save(deep.parent / ".thumbs" / "x.png")
    Image.new("RGB", (20, 20)).save(here / "pics/train/stray.png")
    (deep / "loop").symlink_to(here / "pics/train/dark")
    (here / "pics/test").mkdir()
    Image.new("RGB", (20, 20)).save(here / "pics/test/x.png")
    code, said = ended("--dry_run", capsys)
    assert code == 0 and "train 45, val 6" in said, said
    assert (
        "data left out 4 files whose suffix is of no picture that Pillow reads: 2 .heic, 1 without a suffix, 1 .txt "
        "(pip" in said
    )
    assert "data left out 1 picture directly in train/" in said and "1 picture directly in test/" in said


def test_the_order_of_flat_folders_stays(here):
    import datamodules

    data = datamodules.create("folder", data_dir="pics", image_size=16, global_batch_size=8)
    names = [f"train/{name}/{n}.jpg".encode() for name in ("dark", "light") for n in range(20)]
    assert data.splits["train"].names.tolist() == sorted(names)
    assert data.fingerprint.startswith("ea5c82995a687f39")  # written down: another would end the resume of old runs


def test_one_class_in_two_spellings_of_unicode_is_one(here, capsys):
    spelled = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    for split, name in zip(("train", "val"), spelled):
        (here / "pics" / split / "light").rename(here / "pics" / split / name)
    code, said = ended("--dry_run", capsys)
    assert code == 0 and "train 40, val 6, test 0, 2 classes" in said, said
    shutil.copytree(here / "pics/train" / spelled[0], here / "pics/train" / spelled[1])
    code, said = ended("--dry_run", capsys)
    assert code == 2 and "one name in two spellings of Unicode: café; join them" in said, said


def test_large_pictures_have_a_flag(here, capsys):
    Image.new("L", (20000, 9000)).save(here / "pics/train/dark/huge.png")
    code, said = ended("--dry_run", capsys)
    assert (
        code == 2
        and "train/dark/huge.png is broken: Image size (180000000 pixels) is above the limit of 178,956,970" in said
    ), said
    assert "--data_args.max_pixels allows more" in said
    assert ended("--dry_run --data_args.max_pixels 200000000", capsys)[0] == 0
    code, said = ended("--dry_run --data_args.max_pixels 100", capsys)
    assert code == 2 and "16 x 16 pixels are above the limit of 100" in said, said


def test_deep_pixels_have_one_scale(here, capsys):
    from datamodules.loading.decode import Decoding, open_picture

    for mode, values in (("I", (255, 256, 65535)), ("F", (0.5, 1.0, 2.0))):
        for value in values:
            Image.new(mode, (20, 20), value).save(here / "pics/train/dark" / f"{mode}{value}.tif")
    code, said = ended("--dry_run", capsys)
    assert code == 2 and "3 pictures that cannot be read" in said and "--data_args.white 1.0 says it" in said, said
    assert ended("--dry_run --data_args.white 1.0", capsys)[0] == 0
    grey = {
        name: np.asarray(open_picture(f"pics/train/dark/{name}.tif", Decoding(white=1.0 if name[0] == "F" else None)))[
            0, 0, 0
        ]
        for name in ("I255", "I256", "I65535", "F0.5", "F1.0", "F2.0")
    }
    assert grey == {"I255": 0, "I256": 0, "I65535": 255, "F0.5": 127, "F1.0": 255, "F2.0": 255}
    assert np.asarray(open_picture("pics/train/dark/I256.tif", Decoding(white=1024)))[0, 0, 0] == 63


def test_a_run_that_skips_nothing_is_the_run_without_the_flag(here, capsys):
    assert ended("--name plain", capsys)[0] == ended("--name plain2 --bad_images skip", capsys)[0] == 0
    one, other = (weights_of(here / "runs" / name / "checkpoints/last.ckpt") for name in ("plain", "plain2"))
    assert all(np.array_equal(one[key], other[key]) for key in one)
    assert "already finished" in ended("--name plain --bad_images skip", capsys)[1]
