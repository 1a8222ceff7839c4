"""Pictures that are nearly the same: hashes, groups, the verb."""

import io

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageEnhance
from scipy.fft import dct

import datamodules
from datamodules.loading import perceptual_hash
from experiments import prepare
from models import create

SIDE = 96


def photo(seed, side=SIDE):
    """Noise as photographs have it: power falls with the square of the frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side))) + 1 / side
    pixels = np.stack(
        [np.real(np.fft.ifft2(np.fft.fft2(rng.normal(size=(side, side))) / frequency**1.5)) for _ in range(3)], -1
    )
    low, high = np.percentile(pixels, [1, 99])
    return Image.fromarray(((pixels - low) / (high - low) * 255).clip(0, 255).astype(np.uint8))


def again(picture, quality):
    held = io.BytesIO()
    picture.save(held, "JPEG", quality=quality)
    return Image.open(io.BytesIO(held.getvalue()))


ALTERED = {
    "smaller": lambda picture: picture.resize((48, 48)),
    "squeezed": lambda picture: picture.resize((SIDE, 64)),
    "compressed": lambda picture: again(picture, 30),
    "cropped a little": lambda picture: picture.crop((1, 2, SIDE - 2, SIDE - 1)),
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.1),
    "without colour": lambda picture: picture.convert("L"),
    "mirrored": lambda picture: picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def test_the_hash_is_the_sum_of_its_parts():
    picture = photo(0)
    bits, grey = perceptual_hash.picture_hash(picture), picture.convert("L")
    assert bits.shape == (256,) and bits.dtype == bool
    waves = dct(dct(np.asarray(grey.resize((32, 32), Image.Resampling.LANCZOS), float), axis=0), axis=1)[
        :8, :8
    ]  # imagehash.phash
    assert (bits[:64].reshape(8, 8) == (waves > np.median(waves))).all()
    across = np.asarray(grey.resize((9, 8), Image.Resampling.LANCZOS), int)
    assert (bits[64:128].reshape(8, 8) == (np.diff(across, axis=1) > 0)).all()
    mean = np.asarray(grey.resize((8, 8), Image.Resampling.LANCZOS), int)
    assert (bits[192:].reshape(8, 8) == (mean > mean.mean())).all()


@pytest.mark.parametrize("name", ALTERED)
def test_altered_copies_are_found_and_others_are_not(name):
    pictures = [photo(seed) for seed in range(40)]
    originals = np.stack([perceptual_hash.picture_hash(picture) for picture in pictures])
    copies = [ALTERED[name](picture) for picture in pictures]
    both = [each for each in perceptual_hash.hashes([*range(40)], lambda n: copies[n].convert("RGB"), 2)]
    first, second = perceptual_hash.units(originals), [perceptual_hash.units(np.stack(each)) for each in zip(*both)]
    found = {
        pair
        for against in second
        for pair in zip(*(side.tolist() for side in perceptual_hash.alike(first, against, 0.8 - 1e-6)[:2]))
    }
    assert sum((n, n) in found for n in range(40)) >= 39 and all(one == other for one, other in found)


def test_pairs_of_blocks_are_those_of_counting_bits(monkeypatch):
    rng = np.random.default_rng(0)
    bits = rng.random((70, 256)) < 0.5
    bits[40:] = bits[:30] ^ (rng.random((30, 256)) < np.linspace(0, 0.2, 30)[:, None])
    monkeypatch.setattr(perceptual_hash, "BLOCK", 16)
    one, other, product = perceptual_hash.alike(perceptual_hash.units(bits), perceptual_hash.units(bits), 0.8)
    equal = (bits[:, None] == bits[None]).sum(2)
    assert set(zip(one, other)) == set(zip(*np.nonzero(equal >= 0.9 * 256)))
    assert np.array_equal((1 + product) / 2 * 256, equal[one, other])
    monkeypatch.setattr(perceptual_hash, "MOST_PAIRS", 100)
    with pytest.raises(ValueError, match="a higher --threshold"):
        perceptual_hash.alike(perceptual_hash.units(bits), perceptual_hash.units(bits), -1.0)


def test_groups_join_through_others():
    numbers = perceptual_hash.groups(6, np.array([0, 1, 4]), np.array([1, 3, 5]))
    assert numbers[0] == numbers[1] == numbers[3] and numbers[4] == numbers[5] and len(set(numbers)) == 3
    assert len(set(perceptual_hash.groups(3, np.array([], int), np.array([], int)))) == 3


@pytest.fixture
def comp(tmp_path, monkeypatch):
    """24 photos, altered copies of the first seven, one copy among the pictures to predict; a patient for each pair of
    ids."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        (tmp_path / "comp" / split).mkdir(parents=True)
    rows = []
    for n in range(24):
        photo(n).save(tmp_path / "comp" / "train" / f"p{n:02}.png")
        rows.append((f"p{n:02}", n + 0.5, f"patient{n // 2}"))
    for n, alter in enumerate(ALTERED.values()):
        alter(photo(n)).convert("RGB").save(tmp_path / "comp" / "train" / f"q{n:02}.png")
        rows.append((f"q{n:02}", n + (0.5 if n else 9.5), f"other{n}"))
    again(photo(3), 50).save(tmp_path / "comp" / "test" / "t0.png")
    photo(99).save(tmp_path / "comp" / "test" / "t1.png")
    pd.DataFrame(rows, columns=["Id", "Score", "Who"]).sample(frac=1, random_state=0).to_csv(
        tmp_path / "comp" / "train.csv", index=False
    )
    pd.DataFrame({"Id": ["t0", "t1"]}).to_csv(tmp_path / "comp" / "test.csv", index=False)
    return tmp_path / "comp"


def test_the_verb_writes_groups_that_no_fold_parts(comp, capsys):
    assert prepare.main(["duplicates", "--data_dir", "comp"]) == 0
    out = capsys.readouterr().out
    assert "31 pictures of train: 7 pairs alike" in out and "7 groups, the largest of 2" in out
    assert "1 pictures to predict are like one of train" in out
    assert "1 of the pairs have different targets" in out and "--group groups.csv" in out
    groups = pd.read_csv("groups.csv").set_index("Id")["group"]
    table = pd.read_csv(comp / "train.csv")
    assert groups.index.tolist() == table["Id"].tolist() and groups.nunique() == 24
    assert all(groups[f"p{n:02}"] == groups[f"q{n:02}"] for n in range(7))
    common = dict(data_dir="comp", image_size=16, global_batch_size=4, workers=0)
    data = datamodules.create("csv", **common, folds=4, fold=0, group="groups.csv")
    fold = dict(zip(data.train_ids, data.fold_numbers))
    assert all(fold[f"p{n:02}"] == fold[f"q{n:02}"] for n in range(7)) and np.bincount(data.fold_numbers).min() > 4

    assert prepare.main(["duplicates", "--data_dir", "comp", "--group", "Who", "--out", "deep/both.csv"]) == 0
    assert "united with those of Who" in capsys.readouterr().out
    groups = pd.read_csv("deep/both.csv").set_index("Id")["group"]
    assert (
        groups["p00"] == groups["p01"] == groups["q00"] == groups["q01"]
        and groups["p22"] == groups["p23"] != groups["p00"]
    )


def test_the_verb_can_ask_a_network(comp, capsys, tmp_path):
    torch.manual_seed(0)
    network = create("vit_nano4", 3, (32, 32))
    spec = {
        "task": "classification",
        "num_outputs": 3,
        "class_names": ["a", "b", "c"],
        "target_names": None,
        "target_range": None,
        "encoding": None,
        "image_size": [32, 32],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "id_column": None,
    }
    torch.save(
        {
            "state_dict": {f"model.{key}": value for key, value in network.state_dict().items()},
            "spec": spec,
            "config": {"model": "vit_nano4", "model_args": {}},
        },
        tmp_path / "seen.ckpt",
    )
    line = ["duplicates", "--data_dir", "comp", "--model", "seen.ckpt", "--workers", "0"]
    assert prepare.main([*line, "--threshold", "0.999999"]) == 0
    assert "cosine of seen.ckpt's features" in (out := capsys.readouterr().out)
    groups = pd.read_csv("groups.csv").set_index("Id")["group"]
    assert groups["p06"] == groups["q06"] and "the largest of 2" in out  # the mirror image, pixel by pixel


@pytest.mark.parametrize(
    "line, words",
    [
        ("--threshold 1.5", "above 0 and up to 1"),
        ("--data_dir nowhere", "nowhere"),
        ("--threshold 0.9", "--data_dir is missing"),
        ("--data_dir comp --image other/{Id}.png", "other/"),
        ("--data_dir comp --model runs/none", "runs/none"),
    ],
)
def test_what_is_wrong_is_said(comp, capsys, line, words):
    try:
        code = prepare.main(["duplicates", *line.split()])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and words in capsys.readouterr().err


def test_a_picture_that_cannot_be_read_is_in_no_group(comp, capsys):
    for name in ("p10", "p11"):
        (comp / "train" / f"{name}.png").write_bytes(b"nothing")
    assert prepare.main(["duplicates", "--data_dir", "comp", "--bad_images", "skip"]) == 0
    groups = pd.read_csv("groups.csv").set_index("Id")["group"]
    assert len(groups) == 31 and groups["p10"] != groups["p11"]
