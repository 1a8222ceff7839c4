"""The picture cache: what is in it, that training and evaluation from it are those from files, and that nothing can
leave half of it."""

import errno
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import result_of, weights_of, write_damaged
from PIL import Image
from small_runs import TINY
from test_datamodules import COMMON, photo
from timm.data import create_transform

import datamodules
from datamodules.cache import build
from datamodules.cache.build import default_side
from datamodules.cache.store import CachedFiles
from datamodules.loading.decode import PictureError
from datamodules.loading.images import keyed_rng
from datamodules.transforms import array_transforms
from datamodules.transforms.array_transforms import nearest, resize

SIZES = [
    (90, 70),
    (64, 100),
    (36, 36),
    (40, 36),
    (300, 50),
    (20, 30),
]  # width, height; the last is smaller than the cache
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def root(tmp_path):
    for number, size in enumerate(SIZES * 2):
        file = tmp_path / "data" / ("train/cat", "train/dog", "val/dog")[(number + number // 6) % 3] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        photo(number, *size).save(file)
    return tmp_path


def make(root: Path, cached: bool = True, **words):
    words = {
        **COMMON,
        "data_dir": str(root / "data"),
        "global_batch_size": 2,
        **({"cache_dir": str(root / "cache")} if cached else {}),
        **words,
    }
    return datamodules.create("folder", **words)


def spoil(root: Path) -> None:
    """Make every picture unreadable, with size and time as before."""
    for file in [file for file in root.rglob("*") if file.suffix in (".png", ".jpg")]:
        before = file.stat()
        file.write_bytes(bytes(before.st_size))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def batches(loader):
    return [{key: value.clone() for key, value in batch.items()} for batch in loader]


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a[key], b[key]) for a, b in zip(one, other) for key in a)


@pytest.fixture(params=[False, True], ids=["torch", "opencv"])
def filters(request, monkeypatch):
    """Each test with and without OpenCV, where it is installed."""
    if request.param:
        pytest.importorskip("cv2")
    else:
        monkeypatch.setattr(array_transforms, "opencv", lambda: None)


@pytest.mark.parametrize(
    "size, crop_pct, interpolation",
    [(32, 0.9, "bicubic"), (32, 0.875, "bilinear"), (48, 1.0, "bicubic"), (32, 0.9, "lanczos")],
)
def test_evaluation_from_the_cache_is_timms_to_the_pixel(root, size, crop_pct, interpolation):
    data = make(root, image_size=size, crop_pct=crop_pct, interpolation=interpolation)
    assert data.cache_side == data.cache.side == int(size / crop_pct)
    (root / "data/val").rename(root / "seen")
    (root / "data/val").symlink_to(root / "seen")
    data = make(root, image_size=size, crop_pct=crop_pct, interpolation=interpolation)
    data.cache.build()
    theirs = create_transform(
        size, interpolation=interpolation, crop_pct=crop_pct, mean=COMMON["mean"], use_prefetcher=True
    )
    expected = [
        torch.as_tensor(theirs(Image.open(root / "data" / name.decode()).convert("RGB")))
        for name in data.splits["val"].names
    ]
    spoil(root)
    images = torch.cat([batch["image"] for batch in data.val_dataloader()])
    assert images.dtype == torch.uint8 and torch.equal(images, torch.stack(expected))


def test_another_side_evaluates_nearly_the_same(root):
    close = make(root, cache_side=60)
    assert close.cache.folder != make(root).cache.folder
    one, other = (
        torch.cat([batch["image"] for batch in data.val_dataloader()]).float()
        for data in (close, make(root, cached=False))
    )
    assert 0 < (one - other).abs().mean() < 3


@pytest.mark.parametrize(
    "words, says",
    [
        ({}, []),
        ({"cache_side": 31}, ["less than the 32 pixels", "resizes a second time"]),
        ({"cache_side": 60}, ["second time"]),
        ({"crop_mode": "squash"}, ["second time"]),
        ({"image_size": (24, 32)}, ["second time"]),
        ({"train_size": 40}, ["second time"]),
    ],
)
def test_what_is_not_as_from_files_is_said(root, words, says):
    lines = make(root, **words).notes()
    assert (
        "picture cache" in lines[0]
        and len(lines) == 1 + len(says)
        and all(part in line for part, line in zip(says, lines[1:]))
    ), lines


def test_default_side():
    assert default_side((224, 224), 0.875, [(224, 224)]) == 256
    assert default_side((224, 192), 1.0, [(160, 160), (240, 200)]) == 240


def test_training_draws_what_it_draws_from_files(root, filters):
    """The same boxes and flips. Where the cache is as large as the files, pixels are nearer to those of files than
    Pillow's own bilinear and bicubic are to each other; without OpenCV by a factor of five."""
    words = dict(
        crop_scale=(0.3, 1.0), augment_args={"vflip": 0.5}, crop_pct=0.3
    )  # side 106: no picture is smaller in the cache
    one, other, bilinear = (
        make(root, **words),
        make(root, cached=False, **words),
        make(root, cached=False, interpolation="bilinear", **words),
    )
    loaders = [data.train_dataloader() for data in (other, one, bilinear)]
    theirs, ours, filtered = ([loader.dataset[key] for key in loader.sampler] for loader in loaders)
    assert [sample["index"] for sample in theirs] == [sample["index"] for sample in ours]
    for a, b, c in zip(theirs, ours, filtered):
        own, reference = grey_levels(a, b), grey_levels(a, c)
        assert own <= reference / (5 if array_transforms.opencv() is None else 1), (own, reference)
        assert (
            a["image"].flip(1).float() - b["image"].float()
        ).abs().mean() > 2 * reference  # the bound tells pictures apart


@pytest.mark.parametrize(
    "words", [{}, {"rand_augment": "rand-m9-n2-inc1"}, {"augment_args": {"color_jitter": 0.4, "vflip": 0.5}}], ids=str
)
def test_with_pillows_filter_training_from_the_cache_is_that_from_files(root, words):
    words = dict(words, crop_scale=(0.3, 1.0), crop_pct=0.3, interpolation="nearest", random_erasing=0.5)
    theirs, ours = (batches(make(root, cached=cached, **words).train_dataloader()) for cached in (False, True))
    assert same(theirs, ours)


def grey_levels(a: dict, b: dict) -> float:
    return (a["image"].float() - b["image"].float()).abs().mean().item()


def test_smaller_pictures_show_the_same_boxes(root, filters):
    words = dict(crop_scale=(0.3, 1.0), image_size=32)
    one, other = make(root, cache_side=34, **words), make(root, cached=False, **words)
    ours, theirs = (data.train_dataloader().dataset for data in (one, other))
    keys = [*other.train_dataloader().sampler]
    apart = np.mean([grey_levels(ours[key], theirs[key]) for key in keys])
    elsewhere = np.mean([grey_levels(ours[index, epoch + 1], theirs[index, epoch]) for index, epoch in keys])
    assert apart < elsewhere / 4, (
        apart,
        elsewhere,
    )  # noise of sigma 20 is smoothed twice; elsewhere is another box of the same picture


@pytest.mark.parametrize(
    "interpolation, other", [("bilinear", "bicubic"), ("bicubic", "bilinear"), ("lanczos", None), ("nearest", None)]
)
@pytest.mark.parametrize("box", [(60, 50), (32, 32), (36, 30), (20, 11), (70, 90)])
def test_resize_is_near_pillows(interpolation, other, box, filters):
    """Pillow's, to the pixel or for bilinear and bicubic nearer than the other of the two is; without OpenCV by a
    factor of five."""
    pixels = np.array(photo(3))[: box[0], : box[1]]
    out = torch.empty(32, 32, 3, dtype=torch.uint8).permute(2, 0, 1)
    resize(pixels, interpolation, [], out)
    theirs, filtered = (
        torch.from_numpy(np.array(Image.fromarray(pixels).resize((32, 32), getattr(Image, name.upper())))).float()
        for name in (interpolation, other or interpolation)
    )
    apart, reference = (out.permute(1, 2, 0).float() - theirs).abs(), (filtered - theirs).abs()
    fast = array_transforms.opencv() is not None and max(box) / 32 <= array_transforms.SHRINK
    assert apart.mean() <= reference.mean() / (1 if fast else 5) and apart.max() <= reference.max()
    flipped = torch.empty(32, 32, 3, dtype=torch.uint8).permute(2, 0, 1)
    resize(pixels, interpolation, [1, 0], flipped)
    assert torch.equal(flipped, out.flip([1, 2]))


def test_nearest_stays_inside():
    for whole, here in ((375, 256), (7, 7), (10_000, 3), (5, 5)):
        for start in {*range(min(whole, 40)), whole - 1}:
            for length in (1, whole - start):
                part = nearest(start, length, whole, here)
                assert 0 <= part.start < part.stop <= here
                assert whole != here or part == slice(start, start + length)


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"rand_augment": "rand-m9-n2-inc1"},
        {"random_erasing": 0.7, "repeated_augment": 2},
        {"train_size": "16-32", "epochs": 3},
    ],
)
def test_batches_do_not_depend_on_workers_and_need_no_file(root, words):
    data = make(root, **words)
    data.cache.build()
    spoil(root)
    here, there = batches(data.train_dataloader()), batches(make(root, workers=2, **words).train_dataloader())
    assert same(here, there) and here[0]["image"].dtype == torch.uint8 and here[0]["image"].shape[1] == 3
    singly = [data.train_dataloader().dataset[key]["image"] for key in data.train_dataloader().sampler]
    assert torch.equal(torch.cat([batch["image"] for batch in here]), torch.stack(singly))
    device = data.on_after_batch_transfer(data.on_before_batch_transfer(here[0], 0), 0)
    assert device["image"].is_contiguous() and device["image"].dtype == torch.float32


def test_the_key_follows_files_and_settings(root):
    first = make(root).cache.folder
    assert make(root, seed=5, val_fraction=0.3, hflip=0).cache.folder == first
    assert make(root, interpolation="bilinear").cache.folder != first != make(root, cache_side=20).cache.folder
    file = root / "data/train/cat/0.png"
    os.utime(file, ns=(1, 1))
    touched = make(root).cache.folder
    file.write_bytes(file.read_bytes() + b"x")
    os.utime(file, ns=(1, 1))
    grown = make(root).cache.folder
    file.rename(file.with_name("00.png"))
    assert len({first, touched, grown, make(root).cache.folder}) == 4
    file.with_name("00.png").rename(file)
    (root / "data/train/cat/more.png").symlink_to("0.png")
    assert make(root).cache.folder not in (first, touched)


@pytest.mark.parametrize("side", [None, 38])  # 38 lies between the sides of a picture
def test_what_is_stored(root, side):
    data = make(root, cache_side=side)
    served = data.cache.serve(data.splits["train"])
    folder = Path(data.cache.folder)
    assert json.loads((folder / "about.json").read_text())["pictures"] == len(SIZES) * 2
    assert {file.name for file in folder.iterdir()} == {"about.json", "index.npy", "names.npy", "pixels.bin"}
    assert [file.name for file in folder.parent.iterdir()] == [folder.name]
    for name in data.splits["train"].names:
        original = data.splits["train"].open(name)
        pixels, whole = served.open.pixels(name)
        assert whole == (original.height, original.width) and min(pixels.shape[:2]) == min(*whole, data.cache.side)
        assert np.array_equal(pixels, np.array(served.open(name)))
        if min(whole) <= data.cache.side:
            assert np.array_equal(pixels, np.array(original))
    again = pickle.dumps(served.open)
    assert len(again) < 2000 and np.array_equal(pickle.loads(again).pixels(name)[0], pixels)  # workers may be spawned
    with pytest.raises(KeyError, match="not in the picture cache"):
        served.open(b"train/cat/no.png")
    with pytest.raises(ValueError, match="read-only"):
        pixels[:] = 0


def test_a_cache_larger_than_memory_is_mapped(root, recwarn):
    """A sparse file. A private mapping of it is refused where the kernel looks at single requests (vm.overcommit_memory
    0 and 2)."""
    data = make(root)
    data.cache.build()
    folder = Path(data.cache.folder)
    index = np.load(folder / "index.npy")
    index[-1, 0] = 4 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    np.save(folder / "index.npy", index)
    os.truncate(folder / "pixels.bin", int(index[-1, 0] + index[-1, 1] * index[-1, 2] * 3))
    batch = batches(make(root).train_dataloader())
    assert len(batch) == 4 and not [each for each in recwarn if "writable" in str(each.message)]


def test_lack_of_memory_is_not_called_damage(pics, launch):
    """Of address space, which the command is given too little of for 64 GB of pixels."""
    assert launch(f"{TINY} --epochs 1 --cache_dir cache --name one").code == 0
    (folder,) = (pics / "cache").iterdir()
    index = np.load(folder / "index.npy")
    index[-1, 0] = 2**36
    np.save(folder / "index.npy", index)
    os.truncate(folder / "pixels.bin", int(index[-1, 0] + index[-1, 1] * index[-1, 2] * 3))
    ended = launch(f"{TINY} --epochs 1 --cache_dir cache --name two", before=little_address_space)
    assert ended.code == 1 and "cannot be read: Cannot allocate memory, which is no damage; ulimit -v" in ended.out, (
        ended.out
    )
    assert "delete it" not in ended.out and "Traceback" not in ended.out


def little_address_space() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2**35, 2**35))


def test_several_folders_with_the_same_names_do_not_mix(root):
    data = make(root)
    other = root / "other"
    (root / "data/train").rename(other)
    (root / "data").mkdir(exist_ok=True)
    from datamodules.cache.build import ImageCache
    from datamodules.folder import Files
    from datamodules.loading.images import Split

    names, targets = np.array([b"1.png"]), np.zeros(1, np.int64)
    photo(50, 30, 30).save(root / "1.png")
    one, two = Split(names, targets, Files(str(root))), Split(names, targets, Files(str(other / "dog")))
    shared = ImageCache(str(root / "cache"), data.cache.side, "bicubic", {"train": one, "test": two}, 0)
    for split in (one, two):
        assert shared.serve(split).open.pixels(b"1.png")[1] == split.open(b"1.png").size[::-1]
    assert isinstance(shared.serve(one).open, CachedFiles)


def test_a_damaged_cache_is_named(root):
    data = make(root)
    data.cache.build()
    file = Path(data.cache.folder) / "pixels.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged: delete it"):
        make(root).train_dataloader()


def test_a_bad_picture_is_named_and_leaves_no_cache(root):
    write_damaged(root / "data/train/dog/4.png")
    for workers in (0, 1):
        with pytest.raises(PictureError, match=r"^cannot read picture .*dog/4.png: OSError"):
            make(root, workers=workers).cache.build()
    assert not make(root).cache.ready
    photo(4).save(root / "data/train/dog/4.png")
    assert len(batches(make(root).train_dataloader())) == 4


def killed(data) -> None:
    """Build, and die by kill -9 in the middle of a write."""
    build.BATCH, build.COMMIT_BYTES = 2, 1
    calls = []
    concatenate = build._joined

    def joined(samples):
        calls.append(1)
        if len(calls) == 4:
            partial = build._partial(data.cache)
            with (
                open(os.path.join(partial, "pixels.bin"), "ab") as pixels,
                open(os.path.join(partial, "rows.bin"), "ab") as rows,
            ):
                pixels.write(b"half a picture")
                rows.write(b"half a row")
            os.kill(os.getpid(), signal.SIGKILL)
        return concatenate(samples)

    build._joined = joined
    data.cache.build()


@pytest.mark.fault
def test_a_killed_build_is_gone_on_with(root, capsys):
    child = FORK.Process(target=killed, args=(make(root),))
    child.start()
    child.join(60)
    data = make(root)
    assert child.exitcode == -signal.SIGKILL and not data.cache.ready and Path(build._partial(data.cache)).is_dir()
    data.cache.build()
    assert "6 done before" in capsys.readouterr().out
    whole = make(root, cache_dir=str(root / "second"))
    whole.cache.build()
    for name in ("pixels.bin", "index.npy", "names.npy"):
        assert (Path(data.cache.folder) / name).read_bytes() == (Path(whole.cache.folder) / name).read_bytes()
    assert [file.name for file in (root / "cache").iterdir()] == [Path(data.cache.folder).name]


@pytest.mark.fault
@pytest.mark.parametrize("locks", [True, False])
def test_three_at_once_make_one(root, locks, monkeypatch):
    if not locks:

        def refuse(*args):
            raise OSError(errno.ENOSYS, "no locks")

        monkeypatch.setattr(build.fcntl, "flock", refuse)
    children = [FORK.Process(target=make(root).cache.build) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    left = [file.name for file in (root / "cache").iterdir()]
    data = make(root)
    assert Path(data.cache.folder).name in left and (not locks or len(left) == 1), left
    spoil(root)
    assert len(batches(data.val_dataloader())) == 2


@pytest.mark.fault
def test_a_disk_too_small_or_full_or_shut_is_said(root, monkeypatch):
    data = make(root)
    monkeypatch.setattr(build.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 1000})())
    with pytest.raises(
        ValueError,
        match=r"12 pictures with a shorter side of 35 take about 0.\d MB more, and .* free: .*--data_args.cache_side",
    ):
        data.cache.build()
    monkeypatch.undo()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build.os, "fsync", full)
    with pytest.raises(ValueError, match=f"--cache_dir {root}/cache is full .* the same command goes on"):
        data.cache.build()
    monkeypatch.undo()
    (root / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        make(root, cache_dir=str(root / "file")).cache.build()
    data.cache.build()
    assert data.cache.ready


def test_forecast_is_what_it_takes(root):
    data = make(root)
    size, text = build.forecast(data.cache)
    assert "to be built" in data.notes()[-1] and "bicubic" in data.notes()[-1] and "free" in text
    data.cache.build()
    taken = os.path.getsize(os.path.join(data.cache.folder, "pixels.bin"))
    assert abs(size - taken) < 0.02 * taken and "ready" in data.notes()[-1]


def test_without_files_there_is_no_cache(tmp_path):
    data = datamodules.create("digits", cache_dir=str(tmp_path / "cache"))
    assert data.cache is None and data.cache_side is None and "cache_dir is not used" in data.notes()[-1]
    with pytest.raises(ValueError, match="--data_args.cache_side 64 .* --cache_dir"):
        datamodules.create("digits", cache_side=64)


def test_numpys_generator_is_left_alone_where_nothing_draws_from_it():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    with keyed_rng(0, 1, 2, numpy=False):
        drawn = random.random(), torch.rand(1)
        assert np.array_equal(np.random.get_state()[1], before)
    with keyed_rng(0, 1, 2):
        assert (random.random(), torch.rand(1)) == drawn


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_from_the_cache_reads_no_picture_and_is_exact_over_kills(pics, launch, ranks):
    line = (
        f"{TINY} --epochs 2 --save_every_steps 3 --devices {ranks} --accelerator cpu --cache_dir cache "
        f"--rand_augment rand-m9-n2-inc1"
    )
    whole = launch(f"{line} --name whole", ranks=ranks)
    assert whole.code == 0 and "to be built" in whole.out and "training crops by" in whole.out, whole.out
    spoil(pics / "pics")
    for step in (2, 4):
        assert launch(f"{line} --name killed", ranks=ranks, kill_at_step=step).code == -9
    ended = launch(f"{line} --name killed", ranks=ranks)
    assert ended.code == 0 and "resumed from" in ended.out and "ready" in ended.out, ended.out
    first, second = (weights_of(pics / "runs" / name / "checkpoints" / "last.ckpt") for name in ("whole", "killed"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert result_of(pics / "runs" / "whole")["test/loss"] == result_of(pics / "runs" / "killed")["test/loss"]


def test_with_and_without_a_cache_are_two_runs(pics, launch):
    line = f"{TINY} --epochs 1"
    assert launch(f"{line} --cache_dir cache").code == 0
    (folder,) = (pics / "runs").iterdir()
    assert (
        "cache_side: 16" in (folder / "config.yaml").read_text()
        and launch(f"{line} --dry_run").out.count(folder.name) == 0
    )
    refused = launch(f"{line} --name {folder.name}")
    assert refused.code == 2 and "cache_side 16 -> None" in refused.out, refused.out
    planned = launch(f"{line} --cache_dir other --dry_run")
    assert planned.code == 0 and "to be built" in planned.out and not (pics / "other").exists(), planned.out


def test_a_bad_picture_ends_a_run_in_one_line(pics, launch):
    write_damaged(pics / "pics/test/grey/3.jpg")
    ended = launch(f"{TINY} --epochs 1 --cache_dir cache")
    assert ended.code == 1 and "run.py: cannot read picture" in ended.out and "Traceback" not in ended.out, ended.out


def test_prepare_makes_the_cache_that_a_run_finds(pics, monkeypatch, capsys, launch):
    from experiments import prepare

    monkeypatch.chdir(pics)
    words = ["cache", "--cache_dir", "cache", *TINY.split()]
    assert prepare.main(words) == 0
    said = capsys.readouterr().out
    assert (
        "53 pictures" in said
        and "uses it with --cache_dir cache --data_args.cache_side 16 --data_args.interpolation bicubic" in said
    )
    assert prepare.main(words) == 0 and "ready" in capsys.readouterr().out
    spoil(pics / "pics")
    ended = launch(f"{TINY} --epochs 1 --cache_dir cache")
    assert ended.code == 0 and "ready" in ended.out, ended.out
    ended = launch(
        f"{TINY} --epochs 1 --cache_dir cache --image_size 16x12 --data_args.cache_side 16 "
        "--data_args.interpolation bicubic --name other --dry_run"
    )
    assert ended.code == 0 and "ready" in ended.out, ended.out  # another size, the flags of the hint
    assert prepare.main(["cache", "--cache_dir", "cache", "--data_dir", "pics"]) == 2
    said = capsys.readouterr().err
    assert "--model is missing: side and filter of the cached pictures" in said and len(said.splitlines()) == 1
    assert (
        prepare.main(["cache", "--cache_dir", "cache", "--recipe", "demo", "--data", "digits"]) == 2
        and "in memory" in capsys.readouterr().err
    )


def test_benchmark_names_filter_and_ratio(pics, capfd):
    from experiments import benchmark

    words = [
        "data",
        "--data_dir",
        str(pics / "pics"),
        "--image_size",
        "32",
        "--batch",
        "8",
        "--batches",
        "2",
        "--rounds",
        "2",
    ]
    assert benchmark.main(words) == 0
    out = capfd.readouterr().out
    assert "times timm's loader" in out and "bicubic" in out and "pictures/s a core" in out
    assert benchmark.main(["data", "--data_dir", "nowhere"]) == 2
    (pics / "pics/train").rename(pics / "pics/val")
    assert benchmark.main(words) == 2 and "has no train folder: training batches are measured" in capfd.readouterr().err
