"""Augmentation is timm's, draw for draw, and a function of (seed, epoch, index) alone; erasing and training size
included."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import PILToTensor

import datamodules
from datamodules.loading.images import keyed_rng
from datamodules.transforms.crop_sizes import training_sizes
from datamodules.transforms.erasing import Boxes, fill
from datamodules.transforms.image_transforms import shift_transform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEIT = "rand-m9-mstd0.5-inc1"


def photo(seed: int, width: int = 50, height: int = 40) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    slopes = np.stack([4 * x + y, 255 - 5 * y, x * y / 9], axis=-1)
    return Image.fromarray(
        (slopes + np.random.RandomState(seed).normal(0, 20, slopes.shape)).clip(0, 255).astype(np.uint8)
    )


@pytest.fixture
def photos(tmp_path):
    """photos(**keywords) -> data of 12 pictures of two classes."""
    for i in range(12):
        folder = tmp_path / "train" / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        photo(i).save(folder / f"{i:02d}.png")

    def create(**kwargs):
        words = dict(
            data_dir=str(tmp_path),
            image_size=32,
            mean=MEAN,
            std=STD,
            val_fraction=0,
            global_batch_size=4,
            seed=7,
            workers=0,
        )
        return datamodules.create("folder", **{**words, **kwargs})

    return create


def epoch_of(data, epoch: int) -> list[dict]:
    """The batches of an epoch as a model gets them."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0) for batch in loader]


def by_index(batches: list[dict]) -> dict[int, torch.Tensor]:
    return {int(index): image for batch in batches for index, image in zip(batch["index"], batch["image"])}


def opened(data, index: int) -> Image.Image:
    return data.splits["train"].open(data.splits["train"].names[index])


LIKE_TIMM = {
    "deit": (
        dict(rand_augment=DEIT, random_erasing=0.25, augment_args=dict(color_jitter=0.3)),
        dict(auto_augment=DEIT, color_jitter=0.3, re_prob=0.25),
    ),
    "deit3": (dict(augment_args=dict(auto_augment="3a", color_jitter=0.3)), dict(auto_augment="3a", color_jitter=0.3)),
    "jitter": (dict(augment_args=dict(color_jitter=0.4, vflip=0.5)), dict(color_jitter=0.4, vflip=0.5)),
    "original": (
        dict(augment_args=dict(auto_augment="original-mstd0.5"), interpolation="bilinear"),
        dict(auto_augment="original-mstd0.5", color_jitter=None, interpolation="bilinear"),
    ),
    "augmix": (
        dict(augment_args=dict(auto_augment="augmix-m5-w4-d2")),
        dict(auto_augment="augmix-m5-w4-d2", color_jitter=None),
    ),
    "crops": (
        dict(
            crop_scale=(0.2, 0.5),
            hflip=0.0,
            random_erasing=0.6,
            augment_args=dict(crop_ratio=[0.5, 2.0], erasing_count=3),
        ),
        dict(scale=(0.2, 0.5), ratio=(0.5, 2.0), hflip=0.0, color_jitter=None, re_prob=0.6, re_count=3),
    ),
    "weighted": (
        dict(rand_augment="rand-m11-n6-p0.9-mmax20-t3aw", image_size=(24, 40), augment_args=dict(color_jitter=0.3)),
        dict(auto_augment="rand-m11-n6-p0.9-mmax20-t3aw", color_jitter=0.3),
    ),
}


@pytest.fixture
def old_pillow(monkeypatch):
    """Pillow's posterize before 13, which the published runs had: timm asks for 0 bits, and 13 raises."""
    monkeypatch.setattr(
        ImageOps, "posterize", lambda picture, bits: picture.point([i & ~(2 ** (8 - bits) - 1) for i in range(256)] * 3)
    )


@pytest.mark.parametrize("name", LIKE_TIMM)
def test_a_training_picture_is_timms(photos, old_pillow, name):
    ours, theirs = LIKE_TIMM[name]
    args = (
        {"erasing_mode": "const", **ours.get("augment_args", {})}
        if "random_erasing" in ours
        else ours.get("augment_args", {})
    )
    data = photos(**{**ours, "augment_args": args})
    words = dict(is_training=True, mean=MEAN, std=STD, re_mode="const")
    transform = create_transform((3, *data.image_size), **words, **{"interpolation": "bicubic", **theirs})
    for epoch in range(3):
        for index, image in by_index(epoch_of(data, epoch)).items():
            with keyed_rng(7, epoch, index):
                torch.testing.assert_close(image, transform(opened(data, index)), atol=1e-5, rtol=0)


def test_rand_augment_pixels_over_200_draws(photos, old_pillow):
    policy, hparams = (
        "rand-m9-n2-p0.5-mstd0.5-inc1",
        dict(translate_const=14, img_mean=(124, 116, 104), interpolation=Image.BICUBIC),
    )
    theirs, to_tensor = rand_augment_transform(policy, dict(hparams)), PILToTensor()
    crop = RandomResizedCropAndInterpolation(32, scale=(0.3, 0.9), ratio=(3 / 4, 4 / 3), interpolation="bicubic")
    cropped = photos(rand_augment=policy, crop_scale=(0.3, 0.9), hflip=0.0).train_transform()
    moved = shift_transform((32, 32), interpolation="bicubic", shift=0.0, mean=MEAN, rand_augment=policy)
    picture, square = photo(1), photo(2, 32, 32)
    changed = 0
    for draw in range(200):
        drawn = []
        for transform in (cropped, lambda p: to_tensor(theirs(crop(p)))):
            random.seed(draw), np.random.seed(draw)
            drawn.append(transform(picture))
        assert torch.equal(*drawn)
        drawn = []
        for transform in (moved, lambda p: to_tensor(theirs(p))):
            random.seed(draw), np.random.seed(draw)
            drawn.append(transform(square))
        assert torch.equal(*drawn)
        changed += not torch.equal(drawn[0], to_tensor(square))
    assert 120 < changed < 190  # two operations with p 1/2: a quarter stays as it is


@pytest.mark.parametrize(
    "policy",
    [
        dict(rand_augment="rand-m10-n15-p1.0-inc1"),
        dict(rand_augment="rand-m20-n9-p1.0-mmax20-inc1"),
        dict(augment_args=dict(auto_augment="augmix-m10-w9-mstd0")),
        dict(augment_args=dict(auto_augment="v0-mstd9")),
    ],
)
def test_the_strongest_policies_run(photos, policy):
    transform, picture = photos(**policy).train_transform(), photo(3)
    for draw in range(40):
        with keyed_rng(0, draw):
            assert transform(picture).shape == (3, 32, 32)


@pytest.mark.parametrize(
    "text, said",
    [
        ("rnd-m9", "'rnd' is no policy; there are: rand; for example rand-m9-n2-p0.5-mstd0.5-inc1"),
        ("rand-m9-q2", "cannot read 'q2'"),
        ("rand-m9-mstdhalf", "'mstdhalf'"),
        ("rand-m9.5", "'m9.5'"),
        ("rand-m9-n0", "'n0'"),
        ("rand-m9-p1.5", "'p1.5'"),
        ("rand-m9-tfoo", "'tfoo'"),
        ("rand-m9-", "cannot read ''"),
        ("rand-n20-tweights", "n20 of 15 weighted"),
        ("", "'' is no policy"),
    ],
)
def test_a_mistyped_policy_is_seen_at_once(photos, text, said):
    with pytest.raises(ValueError, match=f"--rand_augment '{text}'.*{said}"):
        photos(rand_augment=text)


@pytest.mark.parametrize(
    "args, said",
    [
        (
            dict(auto_augment="orignal"),
            "--augment_args.auto_augment 'orignal'.*there are: augmix, original, originalr, v0, v0r, 3a",
        ),
        (dict(auto_augment="v0-m9"), "cannot read 'm9' of v0; for example v0-mstd0.5"),
        (dict(erasing_mode="noise"), "--augment_args.erasing_mode 'noise'"),
        (dict(auto_augment=DEIT), "'rand' is no policy"),
        (dict(crop_ratio=(2, 1)), "--augment_args.crop_ratio"),
        (dict(vflip=2), "--augment_args.vflip 2"),
        (dict(mix_mode="row"), "batch, pair, elem or roll"),
        (dict(cutmix_minmax=(0.2, 0.8)), "cutmix_minmax needs --cutmix"),
        (dict(jitter=1), "no 'jitter'"),
        (dict(erasing_count=0), "erasing_count 0"),
        (dict(color_jitter=-1), "color_jitter -1"),
    ],
)
def test_mistakes_in_augment_args_name_the_flag(photos, args, said):
    with pytest.raises(ValueError, match=said):
        photos(augment_args=args)


def test_one_policy_only(photos):
    with pytest.raises(ValueError, match="--rand_augment and --augment_args.auto_augment are two policies"):
        photos(rand_augment=DEIT, augment_args=dict(auto_augment="v0"))
    assert photos(rand_augment="rand-m9-n6-mstd0.5-inc1").notes() == []


def test_what_changes_nothing_is_said(photos):
    line = "augment_args.color_jitter 0.3 is inactive: rand_augment switches it off (timm's rule)"
    assert photos(rand_augment=DEIT, augment_args=dict(color_jitter=0.3)).notes() == [line]
    assert "auto_augment switches it off" in photos(augment_args=dict(auto_augment="v0", color_jitter=0.3)).notes()[0]
    for args in (dict(color_jitter=0.3), dict(auto_augment="3a", color_jitter=0.3)):
        assert photos(augment_args=args).notes() == []
    given = dict(erasing_mode="rand", mix_mode="elem")
    assert photos(augment_args=given).notes() == [
        "augment_args.erasing_mode rand is inactive: random_erasing is 0",
        "augment_args.mix_mode elem is inactive: mixup and cutmix are 0",
    ]
    assert photos(augment_args=given, random_erasing=0.1, mixup=0.1).notes() == []


@pytest.mark.parametrize("count", [1, 3])
def test_boxes_are_timms(count):
    theirs, ours = RandomErasing(0.7, mode="const", max_count=count, device="cpu"), Boxes(0.7, count)
    image, erased = torch.zeros(3, 40, 24), 0
    for draw in range(300):
        random.seed(draw)
        mask = theirs(torch.ones(3, 40, 24))
        random.seed(draw)
        rows, filled = ours(image), torch.ones(1, 3, 40, 24)
        fill(filled, [rows.tolist()], "const", torch.Generator())
        assert rows.shape == (count, 5) and torch.equal(filled[0], mask)
        erased += bool((mask == 0).any())
    assert 180 < erased < 240


@pytest.mark.parametrize("mode", ["pixel", "rand"])
def test_noise_is_normal(mode):
    random.seed(0)
    drawn, patches, areas, ratios = Boxes(0.25, 1), [], [], []
    for _ in range(4000):
        rows = drawn(torch.empty(3, 64, 64)).tolist()
        (top, bottom, left, right, _seed), image = rows[0], torch.full((1, 3, 64, 64), 9.0)
        if not bottom:
            continue
        fill(image, [rows], mode, torch.Generator())
        inside = image[0, :, top:bottom, left:right]
        assert (image == 9).sum() == image.numel() - inside.numel()
        patches.append(inside)
        areas.append(inside[0].numel() / 4096)
        ratios.append((bottom - top) / (right - left))
    assert (
        abs(len(patches) / 4000 - 0.25) < 0.025
        and min(areas) > 0.017
        and max(areas) < 0.35
        and min(ratios) > 0.25
        and max(ratios) < 4
    )
    assert abs(np.mean(areas) - (0.02 + 1 / 3) / 2) < 0.02
    values = torch.cat([(patch if mode == "pixel" else patch[:, 0, 0]).flatten() for patch in patches])
    assert abs(values.mean()) < 4 / math.sqrt(len(values)) and abs(values.std() - 1) < 4 / math.sqrt(len(values))
    for patch in patches:
        assert (
            (patch.numel() < 20 or patch.unique().numel() > 9)
            if mode == "pixel"
            else torch.equal(patch, patch[:, :1, :1].expand_as(patch))
        )


def test_erased_pixels_are_the_same_for_any_ranks_and_workers(photos):
    words = dict(random_erasing=0.8, rand_augment=DEIT)
    alone, workers, plain = (
        by_index(epoch_of(photos(**each), 1)) for each in (words, {**words, "workers": 2}, dict(rand_augment=DEIT))
    )
    ranks = {}
    for rank in range(2):
        data = photos(**words)
        data.trainer = type("Rank", (), dict(global_rank=rank, world_size=2, num_devices=2, current_epoch=1))()
        ranks |= by_index(epoch_of(data, 1))
    assert alone.keys() == workers.keys() == ranks.keys() and len(alone) == 12
    for index, image in alone.items():
        assert torch.equal(image, workers[index]) and torch.equal(image, ranks[index])
    outside = [image == plain[index] for index, image in alone.items()]
    assert 6 < sum(not bool(same.all()) for same in outside) <= 12 and all(
        same.float().mean() > 0.6 for same in outside
    )  # nothing else moved


def test_without_erasing_there_is_nothing_of_it(photos):
    data = photos()
    assert (
        set(next(iter(data.train_dataloader())))
        == {"image", "target", "index"}
        == set(epoch_of(photos(random_erasing=1.0), 0)[0])
    )


def test_digits_take_colours_and_erasing():
    words = dict(image_size=32, interpolation="bilinear", global_batch_size=64, workers=0)
    plain, coloured = (
        datamodules.create("digits", **words, **more) for more in ({}, dict(rand_augment="rand-m9-n1-p1.0"))
    )
    one, other = (by_index(epoch_of(data, 0)[:2]) for data in (plain, coloured))
    assert sum(not torch.equal(image, other[index]) for index, image in one.items()) > 90
    erased = by_index(epoch_of(datamodules.create("digits", **words, random_erasing=1.0), 0)[:2])
    assert all(not torch.equal(image, erased[index]) for index, image in one.items())


def test_training_sizes():
    square, wide = (224, 224), (512, 1024)
    assert training_sizes(None, wide, 5) == [wide] and training_sizes("160", square, 5) == training_sizes(
        160, square, 5
    ) == [(160, 160)]
    rising = [side for side, _ in training_sizes("128-224", square, 7)]
    assert rising == [128, 160, 160, 192, 192, 224, 224]  # of 128, 144, 160, 176, 192, 208, 224
    assert training_sizes("100-230", square, 3) == [(100, 100), (160, 160), (230, 230)]
    assert training_sizes("128-224", square, 1) == [(224, 224)]
    assert training_sizes("256-512", wide, 3) == [(256, 512), (384, 768), (512, 1024)]
    assert training_sizes("224", (384, 512), 3) == [(224, 288)] and training_sizes("12", (24, 40), 1) == [(12, 20)]
    for text in ("224-128", "0", "128-", "160x160", "a"):
        with pytest.raises(ValueError, match=f"--augment_args.train_size {text}: .*128-224"):
            training_sizes(text, square, 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_grows_and_evaluation_stays(photos, workers):
    data = photos(
        train_size="32-96", epochs=3, image_size=(96, 192), workers=workers, val_fraction=0.2, random_erasing=0.5
    )
    loader, words = (
        data.train_dataloader(),
        dict(is_training=True, interpolation="bicubic", color_jitter=None, use_prefetcher=True),
    )
    for epoch, size in enumerate([(32, 64), (64, 128), (96, 192), (96, 192)]):
        loader.sampler.set_epoch(epoch)
        timms = create_transform((3, *size), **words)
        for batch in loader:
            assert batch["image"].shape == (4, 3, *size)
            assert (batch["erase"][..., 1] <= size[0]).all() and (batch["erase"][..., 3] <= size[1]).all()
            with keyed_rng(7, epoch, int(batch["index"][0])):
                assert torch.equal(batch["image"][0], timms(opened(data, int(batch["index"][0]))))
    assert next(iter(data.val_dataloader()))["image"].shape[2:] == (96, 192)
