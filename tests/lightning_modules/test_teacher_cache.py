"""A cached teacher answers as the live one on the very batches of training, and is refused for any other run."""

import json
import os
import shutil
import signal
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_damaged
from timm.data import create_transform

from datamodules.loading.decode import open_picture
from experiments.config import read
from experiments.running import build, decide, objects
from lightning_modules.teachers import cached_teacher
from lightning_modules.teachers.cached_teacher import CachedTeacher, compress, restore
from lightning_modules.teachers.teacher import Teacher

TINY = (
    "--data_dir pics --image_size 16 --model vit_nano4 --model_args.embed_dim 16 --model_args.depth 1 --recipe none "
    "--global_batch_size 8 "
    "--workers 0 --logger csv --micro_batch_size 2 --accelerator cpu"
)
HARD = "--rand_augment rand-m9-n2-p0.5-mstd0.5-inc1 --random_erasing 0.6 --augment_args.repeated_augment 2"
MIXED = f"{HARD} --mixup 0.8 --cutmix 1.0"
STILL = "--crop_scale [1,1] --augment_args.crop_ratio [1,1] --hflip 0 --crop_pct 0.7"
SPEC = {"num_outputs": 3, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # as TINY prepares its pictures
HALF = 2.0**-11  # largest relative rounding error of float16


def prepare() -> None:
    """In a launched process: the command line is prepare.py's."""
    import experiments.prepare
    import experiments.run

    experiments.run.main = experiments.prepare.main


def spy() -> None:
    """In a launched process: keep what each training pass sees."""
    from lightning_modules.task import Task

    original = Task.training_step

    def training_step(self, batch, batch_idx):
        seen = {key: batch[key] for key in ("image", "index", "copy") if key in batch} | {"epoch": self.current_epoch}
        torch.save(seen, f"seen-{self.current_epoch}-{self.global_rank}-{batch_idx}.pt")
        return original(self, batch, batch_idx)

    Task.training_step = training_step


def die_in_the_second_shard() -> None:
    """In a launched process: killed with half a shard on the disk."""
    prepare()
    flush, flushed = os.fsync, []

    def fsync(descriptor):
        if flushed:
            os.kill(os.getpid(), signal.SIGKILL)
        flushed.append(descriptor)
        flush(descriptor)

    os.fsync = fsync


@pytest.fixture
def taught(pics, launch):
    """`pics` with a trained run in runs/teacher: wide answers, so that a wrong picture is seen."""
    ended = launch(f"{TINY} --epochs 3 --lr 2e-2 --crop_scale [0.5,1] --model_args.depth 2 --name teacher")
    assert ended.code == 0, ended.out
    return pics


def cached(folder: Path, launch, line: str, ranks: int = 1, **how) -> Path:
    ended = launch(
        f"teacher --out cache {TINY} --devices {ranks} --teacher runs/teacher {line}",
        ranks=ranks,
        before=prepare,
        **how,
    )
    assert ended.code == 0, "\n".join(ended.outs)
    return folder / "cache"


def batches(folder: Path, launch, line: str, ranks: int = 1) -> list:
    """What a training run sees, pass by pass and rank by rank."""
    ended = launch(f"{TINY} --devices {ranks} --name student {line}", ranks=ranks, before=spy)
    assert ended.code == 0, "\n".join(ended.outs)
    return [torch.load(file, weights_only=True) for file in sorted(folder.glob("seen-*.pt"))]


def live(folder: Path) -> Teacher:
    return Teacher.load(str(folder / "runs" / "teacher"), student=SPEC)


def reconstruction(logits: torch.Tensor, k: int) -> np.ndarray:
    """TinyViT's (microsoft/Cream TinyViT/main.py:320-330): the k largest probabilities, the others share the rest."""
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    kept = np.argsort(-p, 1)[:, :k]
    stored = np.take_along_axis(p, kept, 1)
    out = np.repeat((1 - stored.sum(1, keepdims=True)) / (p.shape[1] - k), p.shape[1], 1)
    np.put_along_axis(out, kept, stored, 1)
    return out


@pytest.mark.parametrize(
    "line, writers, readers, topk",
    [(MIXED, 1, 1, 10), (MIXED, 2, 2, 10), (MIXED, 1, 1, 1), (HARD, 2, 1, 10), (STILL, 1, 2, 2)],
)
def test_cached_is_live_on_the_batches_of_training(taught, launch, line, writers, readers, topk):
    cache, teacher = CachedTeacher(cached(taught, launch, f"{line} --epochs 2 --topk {topk}", writers)), live(taught)
    seen, spread = batches(taught, launch, f"{line} --epochs 2", readers), []
    assert len(seen) == 2 * 4 * 4  # epochs, steps, passes of 2 pictures over the ranks
    assert len(list(cache.folder.glob("*.safetensors"))) == (1 if line == STILL else 2 * writers)
    for batch in seen:
        expected, found = teacher(batch["image"]), cache(batch["index"], batch["epoch"], batch.get("copy"))
        spread.append(expected.softmax(-1))
        if topk < 3:
            np.testing.assert_allclose(
                found.exp(), reconstruction(expected, topk), atol=0.4 * HALF, rtol=0
            )  # p |log p| is at most 1/e
        else:
            torch.testing.assert_close(found, expected.log_softmax(-1), atol=1e-5, rtol=HALF)
    assert torch.cat(spread).std(0).max() > 0.05  # else any picture would do


@pytest.mark.parametrize("classes, k", [(1000, 10), (40000, 5), (10, 9), (7, 7), (7, 100)])
def test_the_rest_is_spread_evenly(classes, k):
    logits = torch.randn(64, classes, generator=torch.Generator().manual_seed(0)) * 4
    stored = compress(logits, k, "classification")
    assert stored["value"].dtype == torch.float16 and stored["value"].shape == (64, k + 1 if k < classes else classes)
    assert ("index" in stored) == (k < classes) and (
        k >= classes or stored["index"].dtype == (torch.int32 if classes > 32768 else torch.int16)
    )
    found = restore(stored["value"], stored.get("index"), classes)
    expected = reconstruction(logits, k) if k < classes else logits.double().softmax(1).numpy()
    np.testing.assert_allclose(found, np.log(expected), rtol=2 * HALF, atol=1e-4)
    np.testing.assert_allclose(found.exp().sum(1), 1, atol=3e-3)


def test_a_certain_teacher_stays_finite_and_other_tasks_keep_their_outputs():
    sure = torch.tensor([[2e5, 0.0, -9.0, 3.0]])
    for k in (2, 4):
        stored = compress(sure, k, "classification")
        assert restore(stored["value"], stored.get("index"), 4).isfinite().all()
    outputs = torch.tensor([[37.123456], [1e6]])
    assert torch.equal(restore(compress(outputs, 10, "regression")["value"], None, 1), outputs)


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_while_writing(taught, launch, ranks):
    line = f"{MIXED} --epochs 3"
    whole = cached(taught, launch, line, ranks).rename(taught / "whole")
    words = f"teacher --out cache {TINY} --devices {ranks} --teacher runs/teacher {line}"
    ended = launch(words, ranks=ranks, before=die_in_the_second_shard)
    assert ended.code != 0
    first = taught / "cache" / "epoch0000-rank0.safetensors"
    assert first.is_file() and not (taught / "cache" / "epoch0001-rank0.safetensors").exists()
    before = first.stat().st_mtime_ns
    folder = cached(taught, launch, line, ranks)
    assert first.stat().st_mtime_ns == before
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        file.name: file.read_bytes() for file in whole.iterdir()
    }


def decided(line: str) -> build.Run:
    return decide.decide(read(f"{TINY} {line} --dry_run".split()))


def seen(run: build.Run) -> dict:
    return objects.seen_by_teacher(run.cfg, run.data)


def hand_made(folder: Path, line: str, view: str = "replayed") -> CachedTeacher:
    """A cache as of `prepare.py teacher`, of made-up answers."""
    run = decided(line)
    replayed = view == "replayed"
    rows = run.data.steps_per_epoch * 8 if replayed else run.data.sizes["train"]
    about = {
        "format": 1,
        "view": view,
        "topk": 3,
        "copies": run.data.repeated_augment if replayed else 1,
        "rows": rows,
        "teachers": [],
        "identity": seen(run),
    }
    folder.mkdir()
    (folder / "cache.json").write_text(json.dumps(about))
    for epoch in range(run.cfg.epochs if replayed else 1):
        tensors = {"row": torch.randperm(run.data.sizes["train"])[:rows].int(), "value": torch.randn(rows, 3).half()}
        cached_teacher.write_shard(
            cached_teacher.shard_file(folder, about, epoch, 0), tensors, cached_teacher.digest_of(about)
        )
    return CachedTeacher(folder)


def apart(cache: CachedTeacher, line: str, **changes) -> list[str]:
    """What the cache says against a run, line by line."""
    try:
        cache.check(seen(decided(line)) | changes)
    except ValueError as error:
        assert "was made for another run" in str(error)
        return str(error).split("\n")[1:-1]
    return []


OTHERS = [
    ("--seed 1", "seed 0 -> 1"),
    ("--global_batch_size 16", "global_batch_size 8 -> 16"),
    ("--hflip 0.1", "hflip 0.5 -> 0.1"),
    ("--crop_scale [0.5,1]", "crop_scale [0.08, 1.0] -> [0.5, 1.0]"),
    ("--rand_augment rand-m5", "rand_augment None -> rand-m5"),
    ("--random_erasing 0.1", "random_erasing 0.0 -> 0.1"),
    ("--augment_args.vflip 0.5", "augment_args {} -> {'vflip': 0.5}"),
    ("--augment_args.train_size 8", "train_size None -> 8"),
    ("--mixup 0.2", "mixup 0.0 -> 0.2"),
    ("--cutmix 1", "cutmix 0.0 -> 1.0"),
    ("--augment_args.repeated_augment 2", "repeated_augment 1 -> 2"),
    ("--image_size 20", "image_size [16, 16] -> [20, 20]"),
    ("--data_args.mean [0.4,0.5,0.5]", "mean"),
    ("--data_args.std [0.4,0.5,0.5]", "std"),
    ("--data_args.interpolation bilinear", "interpolation bicubic -> bilinear"),
    ("--val_fraction 0.3", "val_fraction 0.1 -> 0.3"),
    ("--split_seed 1", "split_seed 0 -> 1"),
    ("--epochs 3", "2 are stored, 3 asked for"),
    ("--data digits --data_dir null", "fingerprint"),
]


def test_every_other_run_is_refused_by_name(pics, monkeypatch):
    monkeypatch.chdir(pics)
    cache = hand_made(pics / "cache", "--epochs 2")
    for line in (
        "--epochs 2",
        "--epochs 1 --lr 0.1 --label_smoothing 0 --crop_pct 0.5",
        "--epochs 2 --devices 2 --micro_batch_size 4",
    ):
        cache.check(seen(decided(line)))
    for line, words in OTHERS:
        assert any(words in difference for difference in apart(cache, f"--epochs 2 {line}")), line
    (pics / "pics" / "train" / "dark" / "0.jpg").unlink()
    with pytest.raises(ValueError, match="fingerprint"):
        cache.check(seen(decided("--epochs 2")))


def test_what_matters_to_some_views_only(pics, monkeypatch):
    monkeypatch.chdir(pics)
    mixed = hand_made(pics / "mixed", "--mixup 0.8")
    erased = hand_made(pics / "erased", "--random_erasing 0.5 --epochs 2")
    still, viewed = (
        hand_made(pics / "still", f"{STILL} --epochs 2", "still"),
        hand_made(pics / "seen", "--epochs 2", "evaluation"),
    )

    assert apart(mixed, "--mixup 0.8 --epochs 1 --micro_batch_size 4") == ["  pass_size 2 -> 4"]
    assert apart(mixed, "--mixup 0.8 --epochs 1 --devices 2") == ["  world_size 1 -> 2"]
    assert apart(erased, "--random_erasing 0.5 --epochs 2", device="cuda") == ["  device cpu -> cuda"]
    assert apart(mixed, "--mixup 0.8 --epochs 1", device="cuda") == []
    assert (
        apart(
            still,
            f"{STILL} --epochs 9 --seed 4 --global_batch_size 16 --augment_args.repeated_augment 3 --crop_pct 0.5",
        )
        == []
    )
    assert apart(still, f"{STILL} --epochs 9 --hflip 0.5") == ["  hflip 0.0 -> 0.5"]
    assert apart(viewed, "--epochs 9 --seed 4 --hflip 0 --rand_augment rand-m5") == []
    assert apart(viewed, "--epochs 9 --crop_pct 0.5") == ["  crop_pct 1.0 -> 0.5"]
    assert "unmixed" in apart(viewed, "--epochs 9 --mixup 0.1")[0]
    rising = hand_made(pics / "rising", "--augment_args.train_size 8-16 --epochs 4")
    assert apart(rising, "--augment_args.train_size 8-16 --epochs 3") == ["  epochs 4 -> 3"]


def test_files_that_are_missing_or_damaged(pics, monkeypatch):
    monkeypatch.chdir(pics)
    cache = hand_made(pics / "cache", "--epochs 2")
    here, index = seen(decided("--epochs 2")), torch.arange(36)
    assert deepcopy(cache) is cache
    rows = cache(index, 1)
    assert (
        rows.isnan().any(1).sum() == 4 and rows.isfinite().all(1).sum() == 32
    )  # the incomplete last batch of the epoch is dropped
    second = cache.folder / "epoch0001-rank0.safetensors"
    whole = second.read_bytes()
    for content, words in (
        (whole[:-1] + bytes([whole[-1] ^ 1]), "is damaged"),
        (whole[:-7], "cannot be read"),
        (b"", "cannot be read"),
        ((cache.folder / "epoch0000-rank0.safetensors").read_bytes(), "another epoch"),
    ):
        second.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            CachedTeacher(cache.folder)(index, 1)
    second.unlink()
    with pytest.raises(ValueError, match="is not there"):
        CachedTeacher(cache.folder)(index, 1)
    with pytest.raises(ValueError, match="1 shards are missing, the first is epoch0001-rank0.safetensors"):
        cache.check(here)
    cache.check({**here, "epochs": 1})
    assert cache(index, 0).isfinite().any()
    (cache.folder / "cache.json").write_text("{}")
    with pytest.raises(ValueError, match="no description of a teacher cache"):
        CachedTeacher(cache.folder)


def test_fixed_view_is_the_teacher_on_the_evaluation_view(taught, launch):
    cache, teacher, data = CachedTeacher(cached(taught, launch, "--view fixed --epochs 5", 2)), live(taught), None
    here = torch.arange(36)
    transform = create_transform((3, 16, 16), interpolation="bicubic", crop_pct=1.0, mean=SPEC["mean"], std=SPEC["std"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(taught)
        data = decided("").data
        names = [os.fsdecode(name) for name in data.splits["train"].names]
    images = torch.stack([transform(open_picture(str(taught / "pics" / name))) for name in names])
    for epoch in (0, 7):
        torch.testing.assert_close(cache(here, epoch), teacher(images).log_softmax(-1), atol=1e-4, rtol=2 * HALF)
    ended = launch(f"teacher --out other {TINY} --teacher runs/teacher --view fixed --mixup 0.5", before=prepare)
    assert ended.code == 2 and "--mixup" in ended.out and not (taught / "other").exists()


def test_checking_a_cache_and_changing_its_teacher(taught, launch):
    words = f"teacher --out cache {TINY} --teacher runs/teacher --epochs 3"
    folder = cached(taught, launch, "--epochs 3")
    for line in ("", " --check_cache 20", " --view fixed --out fixed", " --view fixed --out fixed --check_cache 7"):
        ended = launch(words + line, before=prepare)
        assert ended.code == 0, ended.out
    assert ended.out.count("7 pictures of epochs 1: largest difference") == 1
    other = launch(f"{words} --seed 5", before=prepare)
    assert other.code == 2 and "seed 0 -> 5" in other.out and "another folder" in other.out

    cache = CachedTeacher(folder)
    for epoch in range(3):
        file = folder / f"epoch{epoch:04d}-rank0.safetensors"
        tensors = cached_teacher.read_shard(file, cache.digest)
        cached_teacher.write_shard(file, {**tensors, "value": tensors["value"].roll(1, 0)}, cache.digest)
    wrong = launch(f"{words} --check_cache 20", before=prepare)
    assert wrong.code == 1 and "MORE THAN" in wrong.out and "24 pictures of epochs 1, 2, 3" in wrong.out

    shutil.copy(taught / "runs/teacher/checkpoints/last-1.ckpt", taught / "runs/teacher/checkpoints/best.ckpt")
    for line in ("", " --check_cache 20"):
        ended = launch(words + line, before=prepare)
        assert ended.code == 2 and "runs/teacher" in ended.out and "sha256" in ended.out + "sha256" * bool(line), (
            ended.out
        )
    with pytest.raises(ValueError, match="best.ckpt has changed since"):
        cache.check(cache.about["identity"])


@pytest.mark.parametrize(
    "line, words",
    [
        ("teacher --out x", "--teacher is missing"),
        ("teacher --out pics --teacher runs/teacher", "is no teacher cache"),
        ("teacher --out x --teacher runs/nothing", "runs/nothing"),
        ("teach", "did you mean teacher"),
        ("teacher --out x --teacher runs/teacher --topk 0", "--topk"),
        ("teacher --teacher runs/teacher", "--out"),
        ("teacher --out x --teacher runs/teacher --gpus 1", "--gpus"),
    ],
)
def test_mistakes_are_one_line(taught, launch, line, words):
    ended = launch(f"{line} {TINY}", before=prepare)
    assert ended.code == 2 and words in ended.out and "Traceback" not in ended.out and not (taught / "x").exists(), (
        ended.out
    )


def test_a_picture_that_cannot_be_read(taught, launch):
    folder = cached(taught, launch, "--epochs 1 --view fixed").rename(taught / "before")
    write_damaged(taught / "pics" / "train" / "dark" / "1.jpg")
    ended = launch(f"teacher --out cache {TINY} --teacher runs/teacher --epochs 1 --val_fraction 0", before=prepare)
    assert (
        ended.code == 1 and "cannot read picture" in ended.out and "1.jpg" in ended.out and "Traceback" not in ended.out
    ), ended.out
    assert folder.is_dir() and not list((taught / "cache").glob("*.safetensors"))


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from experiments.prepare import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    )
    for words in (["--help"], ["teacher", "--help"], ["teacher", "--topk", "x"]):
        subprocess.run(
            [sys.executable, "-c", code, *words], check=True, capture_output=True, cwd=Path(__file__).parents[2]
        )
