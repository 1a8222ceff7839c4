"""`prepare.py teacher`: the training pictures of a run, replayed through its teacher alone."""

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import timm
import torch

import models
from datamodules.base import PictureData
from datamodules.loading.decode import PictureError
from datamodules.loading.files import write_text
from experiments.cli.errors import UsageError
from experiments.config import Command
from experiments.folds import directories
from experiments.running import build, forecast, objects, teacher_score
from lightning_modules.callbacks.signals import notice
from lightning_modules.teachers import cached_teacher
from lightning_modules.teachers.cached_teacher import CachedTeacher
from lightning_modules.teachers.recording import Checker, Recorder
from models import pretrained

TOLERANCE = 0.01  # of a probability: float16 takes up to 0.0002, other kernels of a GPU more, another picture most of 1


def main(command: Command, out: str, *, topk: int, fixed: bool, check: int | None) -> int:
    """Write the cache, or check it. Returns the exit code."""
    try:
        run, about = _resolved(command, Path(out), topk, fixed)
        if check:
            cache = CachedTeacher(out)
            cache.check(about["identity"])
            if cache.about["teachers"] != about["teachers"]:
                raise UsageError(f"{out} was made by another teacher: {_teachers(cache.about)} -> {_teachers(about)}")
        else:
            _check_own(Path(out), about)
    except (ValueError, FileNotFoundError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    notice.together = False  # no step here is worth a last save: a signal ends each process at once
    try:
        return _check(run, cache, check) if check else _write(run, about, Path(out))
    except PictureError as error:
        line = [line for line in str(error).splitlines() if "cannot read picture" in line][
            -1
        ]  # after a worker's own traceback
        print(f"prepare.py: {line[line.find('cannot read picture') :]}", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
    return 1


def _resolved(command: Command, out: Path, topk: int, fixed: bool) -> tuple[build.Run, dict[str, Any]]:
    """The run with its teacher, and what their cache will say of itself. Raises ValueError or FileNotFoundError."""
    cfg = command.config
    if not cfg.teacher:
        raise UsageError("--teacher is missing: a run directory, a file, or a model's name")
    if cached_teacher.is_cache(cfg.teacher):
        raise UsageError(f"--teacher {cfg.teacher} is a cache already; give the teacher itself")
    if cfg.eval_only:
        raise UsageError("--eval_only trains nothing, so there is nothing to prepare")
    if cfg.micro_batch_size is None and cached_teacher.is_cache(out):  # what fits the memory may be another size today
        passed = cached_teacher.read_about(out)["identity"]["pass_size"]
        command = command.again(micro_batch_size=passed)
    run = build.resolve(command)
    data, spec = run.data, run.data.spec
    if fixed and data.mixing:
        raise UsageError(
            "--view fixed: the teacher would not see what --mixup and --cutmix make of the pictures; leave it out"
        )
    view = "evaluation" if fixed else "still" if still(data) else "replayed"
    every = spec["task"] != "classification" or topk >= spec["num_outputs"]
    about = {
        "format": cached_teacher.FORMAT,
        "view": view,
        "topk": spec["num_outputs"] if every else topk,
        "copies": data.repeated_augment if view == "replayed" else 1,
        "rows": data.steps_per_epoch * data.global_batch_size if view == "replayed" else data.sizes["train"],
        "teachers": _named(run),
        "identity": objects.seen_by_teacher(run.cfg, run.data),
    }
    if spec["task"] == "regression":
        about["units"] = "own"
    return run, json.loads(json.dumps(about))


def still(data: PictureData) -> bool:
    """Whether training shows a picture in one way only, so that one answer of the teacher holds for all epochs."""
    augment, chances = data.augment, (data.hflip, data.augment.vflip, data.augment.color_jitter, data.random_erasing)
    whole = (
        data.crop_scale == (1, 1) and augment.crop_ratio[0] == augment.crop_ratio[1] and len({*data.train_sizes}) == 1
    )
    ours = (
        type(data).train_transform is PictureData.train_transform and not data.own_augment
    )  # a data set's own transform may do anything
    return ours and whole and not any((*chances, data.rand_augment, augment.auto_augment, data.mixing))


def _named(run: build.Run) -> list[dict[str, Any]]:
    """Which weights the teachers have and how they see: plain values."""
    cfg, found = run.cfg, []
    for name, each in zip(cfg.teacher.split(","), getattr(run.teacher, "teachers", [run.teacher])):
        source = directories.own(name.strip(), cfg, "--teacher")
        weights = source if Path(source).exists() else cfg.teacher_init
        if weights in (None, "pretrained"):
            arch = source.removeprefix("timm/") if source.startswith("timm/") else models.REGISTRY[source].timm
            named = {"source": source, "weights": f"{arch.split('.')[0]}.{timm.get_pretrained_cfg(arch).tag}"}
        else:
            file = pretrained.checkpoint_in(weights).absolute()
            named = {"source": source, "file": str(file), "sha256": cached_teacher.sha256_of(file)}
        found.append({**named, "precision": each.precision, "image_size": each.image_size})
    return found


def _teachers(about: dict[str, Any]) -> str:
    return ", ".join(
        f"{each.get('weights') or each['source']}"
        + f" (sha256 {each['sha256'][:12]})" * ("sha256" in each)
        + f" at {each['image_size']}, {each['precision']}"
        for each in about["teachers"]
    )


def _check_own(out: Path, about: dict[str, Any]) -> None:
    """Raises UsageError unless `out` is free, or a cache of the same values to go on with."""
    if not cached_teacher.is_cache(out):
        strangers = (
            [file for file in out.iterdir() if file.name != cached_teacher.ABOUT and not file.name.endswith(".partial")]
            if out.is_dir()
            else []
        )
        if strangers or out.is_file():
            raise UsageError(
                f"--out {out} exists and is no teacher cache (no {cached_teacher.ABOUT}): name another folder"
            )
        return
    before = cached_teacher.read_about(out)
    if before == about:
        return
    apart = [f"{key} {before[key]} -> {about[key]}" for key in ("view", "topk") if before[key] != about[key]]
    apart += [f"teacher {_teachers(before)} -> {_teachers(about)}"] * (before["teachers"] != about["teachers"])
    there, here = before["identity"], about["identity"]
    apart += [
        f"{key} {cached_teacher.short(there.get(key))} -> {cached_teacher.short(here[key])}"
        for key in here
        if there.get(key) != here[key]
    ]
    raise UsageError(
        f"--out {out} holds a cache of other values:\n  "
        + "\n  ".join(apart)
        + "\nName another folder, or delete that one"
    )


def _trainer(run: build.Run, limit: int | None = None) -> L.Trainer:
    """The ranks of the run; the passes go through Lightning's validation, which takes no step."""
    return L.Trainer(
        **forecast.placement(replace(run.cfg, strategy="auto", precision="32-true")),
        logger=False,
        enable_checkpointing=False,
        accumulate_grad_batches=run.data.accumulation(forecast.world_size(run.cfg)),
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
        limit_val_batches=limit,
    )


def _show(data: PictureData, view: str, part: np.ndarray | None = None) -> None:
    """Let the data's validation be what the teacher shall see: `part` are rows of a fixed view."""
    if view == "replayed":
        data.val_dataloader = data.train_dataloader
        return
    train = data.splits["train"]
    data.splits = {"val": train if part is None else train.take(part)}
    if view == "still":
        data.eval_transform = data.train_transform


def _pass(trainer: L.Trainer, module: L.LightningModule, data: PictureData, epoch: int) -> None:
    progress = trainer.fit_loop.epoch_progress.current
    progress.completed = progress.processed = epoch  # what order, augmentation and mixing follow, as while training
    trainer.validate(module, datamodule=data, verbose=False)


def _write(run: build.Run, about: dict[str, Any], out: Path) -> int:
    trainer, view = _trainer(run), about["view"]
    if trainer.is_global_zero and not cached_teacher.is_cache(out):
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / cached_teacher.ABOUT, json.dumps(about, indent=1) + "\n")
    epochs = range(run.cfg.epochs if view == "replayed" else 1)
    world = range(forecast.world_size(run.cfg))
    left = [
        epoch
        for epoch in epochs  # the same on all ranks: none has written before all meet in the first pass
        if not all(cached_teacher.shard_file(out, about, epoch, rank).is_file() for rank in world)
    ]
    said = print if trainer.is_global_zero else lambda *words, **how: None
    said(
        f"teacher {_teachers(about)}, view {view}: {len(epochs)} epochs x {about['rows']:,} pictures, "
        f"{len(epochs) - len(left)} there already"
    )
    if left and trainer.is_global_zero:
        teacher_score.tell(run.teacher, run.cfg.teacher, run.data, trainer.strategy.root_device)
    recorder, start = Recorder(run.teacher, out, about), time.monotonic()
    _show(run.data, view)
    for epoch in left:
        _pass(trainer, recorder, run.data, epoch)
        said(f"epoch {epoch + 1} of {len(epochs)}, {time.monotonic() - start:.0f} s", flush=True)
    megabytes = sum(file.stat().st_size for file in out.glob("*.safetensors")) / 2**20
    said(f"{out}: {megabytes:.1f} MB; --teacher {out} trains with it, --check_cache 1000 checks it")
    return 0


def _check(run: build.Run, cache: CachedTeacher, pictures: int) -> int:
    view, rows, epochs, limit = cache.about["view"], None, [0], None
    if view == "replayed":
        passes = math.ceil(pictures / run.cfg.global_batch_size * run.data.accumulation(forecast.world_size(run.cfg)))
        epochs = np.unique(np.linspace(0, run.cfg.epochs - 1, min(passes, run.cfg.epochs)).round().astype(int)).tolist()
        limit = min(
            math.ceil(passes / len(epochs)),
            run.data.steps_per_epoch * run.data.accumulation(forecast.world_size(run.cfg)),
        )
    else:
        rows = np.unique(
            np.linspace(0, cache.about["rows"] - 1, min(pictures, cache.about["rows"])).round().astype(int)
        )
    trainer, checker = (
        _trainer(run, limit),
        Checker(run.teacher, cache, None if rows is None else torch.from_numpy(rows)),
    )
    _show(run.data, view, rows)
    for epoch in epochs:
        _pass(trainer, checker, run.data, epoch)
    close = checker.error <= TOLERANCE
    if trainer.is_global_zero:
        print(
            f"{checker.pictures} pictures of epochs {', '.join(str(epoch + 1) for epoch in epochs)}: largest "
            f"difference {checker.error:.2g} "
            f"({'at most' if close else 'MORE THAN'} {TOLERANCE}), same likeliest class "
            f"{checker.equal / checker.pictures:.2%}"
        )
    return 0 if close else 1
