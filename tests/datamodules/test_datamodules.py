"""Data sets: what they find, what they refuse, and that pictures come out as timm makes them."""

import gc
import os
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from timm.data.loader import PrefetchLoader

import datamodules
from datamodules.loading.decode import PictureError, open_picture
from experiments.cli.errors import UsageError
from experiments.config import Config

COMMON = dict(
    image_size=32,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    interpolation="bicubic",
    crop_pct=0.9,
    workers=0,
)
WNIDS = ImageNetInfo().label_names()


def photo(seed: int, width: int = 90, height: int = 70) -> Image.Image:
    """Slopes and grain, different in each channel and corner."""
    y, x = np.mgrid[0:height, 0:width]
    slopes = np.stack([2 * x + y, 255 - 3 * y, x * y / 25], axis=-1)
    return Image.fromarray(
        (slopes + np.random.RandomState(seed).normal(0, 20, slopes.shape)).clip(0, 255).astype(np.uint8)
    )


@pytest.fixture
def tree(tmp_path):
    """tree({"train/cat": 3}) writes pictures and returns the root."""

    def write(counts: dict[str, int]):
        for number, (folder, count) in enumerate(counts.items()):
            (tmp_path / folder).mkdir(parents=True)
            for i in range(count):
                photo(100 * number + i).save(tmp_path / folder / f"{i}.jpg", quality=95)
        return tmp_path

    return write


def folder(root, **kwargs):
    return datamodules.create("folder", **{**COMMON, "data_dir": str(root), "global_batch_size": 2, **kwargs})


def test_names_need_no_torch():
    code = (
        "import datamodules, sys; print(*datamodules.names()); assert 'torch' not in sys.modules and 'timm' not in "
        "sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert (
        found == sorted(found)
        and {"digits", "folder", "imagenet"} <= set(found)
        and not {"base", "transforms"} & set(found)
    )


def test_create_needs_nothing_but_a_name():
    assert datamodules.create("digits").spec["image_size"] == [32, 32]


def test_create_refuses_and_names_the_closest():
    with pytest.raises(ValueError, match=r"'digit'; did you mean digits\? \(there are .*folder, imagenet"):
        datamodules.create("digit")
    with pytest.raises(ValueError, match="no keyword 'per_clas'; did you mean per_class"):
        datamodules.create("folder", per_clas=3)
    with pytest.raises(ValueError, match="no keyword 'per_class'"):
        datamodules.create("digits", **COMMON, per_class=3)
    with pytest.raises(ValueError, match="val_fraction 1.5: .* below 1"):
        datamodules.create("digits", **COMMON, val_fraction=1.5)


def test_classes_by_the_names_that_a_user_of_lightning_looks_for():
    for name, alias in {"csv": "KaggleCSV", "imagenet": "ImageNet", "pawpularity": "Pawpularity"}.items():
        assert getattr(datamodules, alias) is datamodules.data_class(name)
    assert datamodules.Folder.__qualname__ == "DataModule"  # under which Lightning keeps the state in checkpoints
    with pytest.raises(AttributeError, match="no attribute 'Imagenette'"):
        datamodules.Imagenette  # noqa: B018


def test_detect(tree):
    root = tree({"train/cat": 1, "train/dog": 1})
    assert datamodules.detect(str(root)) == "folder"
    (root / "train.csv").write_text("Id\n")
    assert datamodules.detect(str(root)) == "csv"
    (root / "ids" / "val" / WNIDS[3]).mkdir(parents=True)
    assert datamodules.detect(str(root / "ids")) == "imagenet"
    (root / "ids" / "val" / "n00000000").mkdir()
    assert datamodules.detect(str(root / "ids")) == "folder"
    with pytest.raises(ValueError, match="looked for train.csv, train/<class>/"):
        datamodules.detect(str(root / "train"))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        datamodules.detect(str(root / "nowhere"))


@pytest.mark.parametrize(
    "size, crop_pct, crop_mode, interpolation",
    [
        (32, 0.875, "center", "bicubic"),
        (48, 1.0, "center", "bilinear"),
        ((24, 40), 0.9, "center", "bicubic"),
        (32, 0.9, "squash", "bicubic"),
    ],
)
def test_evaluation_is_timms(tree, size, crop_pct, crop_mode, interpolation):
    root = tree({"val/cat": 2, "val/dog": 1})
    data = folder(root, image_size=size, crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation)
    batch = next(iter(data.val_dataloader()))
    ours = data.on_after_batch_transfer(batch, 0)["image"]
    whole = size if isinstance(size, tuple) else (size, size)
    words = dict(
        interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode, mean=COMMON["mean"], std=COMMON["std"]
    )
    pictures = [Image.open(root / "val/cat" / name).convert("RGB") for name in ("0.jpg", "1.jpg")]
    plain, raw = create_transform((3, *whole), **words), create_transform((3, *whole), **words, use_prefetcher=True)
    assert batch["image"].dtype == torch.uint8 and ours.shape == (2, 3, *whole)
    torch.testing.assert_close(ours, torch.stack([plain(picture) for picture in pictures]), atol=1e-5, rtol=0)
    loader = [(torch.stack([raw(picture) for picture in pictures]), torch.zeros(2))]
    prefetched, _ = next(iter(PrefetchLoader(loader, COMMON["mean"], COMMON["std"], device=torch.device("cpu"))))
    assert torch.equal(ours, prefetched)


def test_training_transform_is_timms(tree):
    data = folder(tree({"train/cat": 2, "train/dog": 2}), val_fraction=0, crop_scale=(0.3, 0.8), hflip=0.7)
    words = dict(
        is_training=True, scale=(0.3, 0.8), hflip=0.7, color_jitter=None, interpolation="bicubic", use_prefetcher=True
    )
    theirs, ours, picture = create_transform(32, **words), data.train_transform(), photo(1)
    drawn = []
    for transform in (theirs, ours):
        random.seed(5), torch.default_generator.manual_seed(5)
        drawn.append(torch.stack([transform(picture) for _ in range(6)]))
    assert torch.equal(*drawn) and not torch.equal(drawn[0][0], drawn[0][1])


def test_digits():
    data = datamodules.create("digits", **COMMON, hflip=1.0, global_batch_size=100)
    assert (
        data.sizes == {"train": 1293, "val": 144, "test": 360}
        and data.steps_per_epoch == 12
        and data.spec["num_outputs"] == 10
    )
    rows = [set(split.names.tolist()) for split in data.splits.values()]
    assert len(set.union(*rows)) == 1797 == sum(map(len, rows))
    assert np.bincount(data.splits["test"].targets).min() >= 34
    other = datamodules.create("digits", **COMMON, split_seed=1, seed=9)
    assert set(other.splits["test"].names) == set(data.splits["test"].names) != set(other.splits["val"].names)
    assert set(other.splits["val"].names) != set(data.splits["val"].names) and other.fingerprint != data.fingerprint
    batch = next(iter(data.train_dataloader()))
    still = data.eval_transform()
    moved = 0
    for image, index in zip(batch["image"], batch["index"]):
        plain = torch.nn.functional.pad(
            still(data.splits["train"].open(data.splits["train"].names[index])), (4, 4, 4, 4)
        )
        shifts = [
            (dy, dx) for dy in range(9) for dx in range(9) if torch.equal(image, plain[:, dy : dy + 32, dx : dx + 32])
        ]
        assert shifts, "not a shift by up to 4 pixels: flipped or cropped"
        moved += shifts[0] != (4, 4)
    assert moved > 80


def test_folder_splits(tree):
    root = tree({"train/cat": 10, "train/dog": 20, "test/dog": 2})
    (root / "train/cat/.hidden.jpg").write_text("")
    (root / "train/cat/notes.txt").write_text("")
    (root / "train/.cache").mkdir()
    data = folder(root)
    assert data.sizes == {"train": 27, "val": 3, "test": 2} and data.spec["class_names"] == ["cat", "dog"]
    assert data.splits["train"].names.dtype.kind == "S" and data.splits["test"].targets.tolist() == [1, 1]
    assert set(data.splits["val"].targets.tolist()) == {0, 1}
    assert folder(root, seed=7).fingerprint == data.fingerprint != folder(root, split_seed=7).fingerprint
    few, more = folder(root, per_class=3).splits, folder(root, per_class=5).splits
    assert np.bincount(few["train"].targets).tolist() == [3, 3] and set(few["train"].names) < set(more["train"].names)
    assert few["val"].names.tolist() == data.splits["val"].names.tolist()
    assert folder(root, class_names=["dog", "cat"]).splits["test"].targets.tolist() == [0, 0]
    assert len(pickle.loads(pickle.dumps(data.splits["train"]))) == 27  # workers may be spawned


def test_folder_refuses(tree):
    root = tree({"train/cat": 4, "train/dog": 4, "val/dog": 1})
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder; it must hold train/<class>/"):
        folder(root / "nowhere")
    with pytest.raises(ValueError, match="no class folders; looked for train/<class>/"):
        folder(root / "train" / "cat")
    with pytest.raises(ValueError, match="global_batch_size 9 is larger .* fits is 8"):
        folder(root, global_batch_size=9)
    assert folder(root, global_batch_size=9, eval_only=True).sizes["val"] == 1
    with pytest.raises(ValueError, match="train/ has class folders that are not in the given class names: cat"):
        folder(root, class_names=["dog"])
    (root / "val/cow").mkdir()
    with pytest.raises(ValueError, match="val/ has class folders that are not in train: cow"):
        folder(root)
    (root / "val/cow").rename(root / "train/cow")
    with pytest.raises(ValueError, match="train/cow holds no picture"):
        folder(root)


def test_evaluation_without_train(tree):
    root = tree({"val/cat": 1, "val/dog": 1})
    data = folder(root, class_names=["bee", "dog", "cat"])
    assert data.sizes == {"train": 0, "val": 2, "test": 0} and next(iter(data.val_dataloader()))["target"].tolist() == [
        2,
        1,
    ]
    with pytest.raises(ValueError, match="no train folder"):
        data.train_dataloader()
    with pytest.raises(ValueError, match="no test split"):
        data.test_dataloader()
    (root / "train").mkdir()
    with pytest.raises(ValueError, match="train has no class folders"):
        folder(root)


def test_links(tree):
    root = tree({"data/train/cat": 4, "data/train/dog": 4, "outside": 1})
    (root / "link").symlink_to(root / "data")
    (root / "data/train/cat/again.jpg").symlink_to(root / "data/train/cat/0.jpg")
    assert folder(root / "link", val_fraction=0).sizes["train"] == 9
    stray = root / "data/train/dog/stray.jpg"
    stray.symlink_to("../../../outside/0.jpg")
    with pytest.raises(ValueError, match="stray.jpg is a link that leaves the data folder"):
        folder(root / "link")
    stray.unlink()
    stray.symlink_to(root / "gone.jpg")
    with pytest.raises(ValueError, match="stray.jpg is a broken link"):
        folder(root / "data")
    stray.unlink()
    (root / "data/train/owl").symlink_to(root / "outside")
    with pytest.raises(ValueError, match="owl is a link that leaves"):
        folder(root / "data")


def test_imagenet(tree, monkeypatch):
    root = tree({f"val/{WNIDS[7]}": 1, f"val/{WNIDS[999]}": 1, "empty": 0})
    data = datamodules.create("imagenet", **COMMON, data_dir=str(root))
    assert data.splits["val"].targets.tolist() == [7, 999] and data.spec["num_outputs"] == 1000
    assert data.spec["class_names"][7] == "cock" and len(set(data.spec["class_names"])) == 1000
    monkeypatch.setenv("IMAGENET_DIR", str(root))
    assert datamodules.create("imagenet", **COMMON, class_names=data.class_names).fingerprint == data.fingerprint
    monkeypatch.chdir(root / "empty")
    monkeypatch.delenv("IMAGENET_DIR")
    with pytest.raises(FileNotFoundError) as error:
        datamodules.create("imagenet", **COMMON)
    for word in ("$IMAGENET_DIR: not set", str(root / "empty/data/imagenet"), "--data digits", "n01440764"):
        assert word in str(error.value)
    (root / "val" / "cat").mkdir()
    with pytest.raises(ValueError, match="not ImageNet ids: cat"):
        datamodules.create("imagenet", **COMMON, data_dir=str(root))


def test_spec_is_plain(tree, tmp_path):
    spec = folder(tree({"train/cat": 9, "train/dog": 9}), image_size=[24, 40], val_fraction=0.2).spec
    torch.save(spec, tmp_path / "spec.pt")
    assert torch.load(tmp_path / "spec.pt", weights_only=True) == spec
    assert spec["image_size"] == [24, 40] and spec["task"] == "classification"


def test_decode(tmp_path):
    ramp = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    assert np.abs(np.asarray(open_picture(tmp_path / "deep.png"))[..., 0] - ramp / 257.0).max() <= 1
    Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    assert np.asarray(open_picture(tmp_path / "clear.png")).min() == 255
    for mode in ("L", "CMYK", "P", "1"):
        Image.new(mode, (4, 4)).save(tmp_path / f"{mode}.tif")
        assert open_picture(tmp_path / f"{mode}.tif").mode == "RGB"
    turned = Image.Exif()
    turned[0x0112] = 6
    photo(1).save(tmp_path / "turned.jpg", exif=turned)
    assert open_picture(tmp_path / "turned.jpg").size == (90, 70)
    Image.fromarray(np.random.default_rng(0).random((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(
        PictureError, match="float.tif: floating-point pixels have no known white"
    ):  # Pillow makes them black
        open_picture(tmp_path / "float.tif")


@pytest.mark.parametrize(
    "fault, cause, workers",
    [
        ("truncated", "truncated", 0),
        ("truncated", "truncated", 2),
        ("empty", "is empty", 0),
        ("html", "not a picture", 0),
        ("missing", "no such file", 0),
    ],
)
def test_unreadable_picture_is_named(tree, monkeypatch, fault, cause, workers):
    monkeypatch.setattr(
        torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1
    )  # torch waits so long for each worker after an error
    root = tree({"val/cat": 3})
    data = folder(root, workers=workers)
    bad = root / "val/cat/1.jpg"
    content = {"truncated": bad.read_bytes()[:900], "empty": b"", "html": b"<html></html>", "missing": None}[fault]
    os.unlink(bad) if content is None else bad.write_bytes(content)
    with pytest.raises(PictureError, match=rf"(?s)cannot read picture {bad}: .*{cause}") as caught:
        list(data.val_dataloader())
    del caught
    gc.collect()


def test_one_range_for_flags_and_data_modules():
    """And what networks bring with them is in it: the preparation of the pictures of all weights that timm
    publishes."""
    prepared = (
        resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict()) for name in timm.list_pretrained()
    )
    keys = ("mean", "std", "crop_pct", "interpolation", "crop_mode")
    for values in {tuple(each[key] for key in keys) for each in prepared}:
        Config().filled(**dict(zip(keys, values)))
    with pytest.raises(ValueError, match="hflip 2: must lie between 0 and 1"):
        datamodules.create("digits", hflip=2)
    with pytest.raises(UsageError, match="--hflip 2: must lie between 0 and 1"):
        Config(hflip=2)
