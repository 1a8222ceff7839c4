"""Builders of the data set, the network and the teacher of a config."""

import sys
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

import datamodules
import models
from datamodules.base import PictureData
from datamodules.knobs import ImageFiles, Table
from datamodules.loading.decode import PictureError
from experiments.cli.errors import UsageError
from experiments.cli.knobs import flag
from experiments.config import Config, plain
from experiments.folds import directories
from experiments.running import forecast
from lightning_modules.callbacks.signals import notice
from lightning_modules.objectives import targets
from lightning_modules.optimization.freeze import freeze
from lightning_modules.teachers import cached_teacher
from lightning_modules.teachers.cached_teacher import CachedTeacher
from lightning_modules.teachers.teacher import Teacher, Teachers, check_spec
from models import cost, pretrained


def saved(cfg: Config) -> dict[str, Any]:
    """Config and spec of the checkpoint that an evaluation scores; {} where there is none."""
    if not cfg.eval_only or not Path(cfg.init).exists():
        return {}
    return pretrained.read_about(directories.own(cfg.init, cfg, "--init"))


def datamodule(cfg: Config, unreadable: list[str] | None = None, make: Callable[..., Any] | None = None) -> PictureData:
    """Build the data module, which lists its folder. An evaluation of a checkpoint keeps its order of classes and its
    range of targets.

    Args:
        unreadable: names of unreadable images found by the launching process; None searches for them.
        make: builder in place of `datamodules.create`.
    """
    checkpoint = saved(cfg)
    names = {"class_names": checkpoint["spec"].get("class_names")} if checkpoint else {}
    known = {*datamodules.accepted(cfg.data)}
    _check_for_files(cfg, known)
    given = {key: getattr(cfg, key) for key in known & {*vars(cfg)} if getattr(cfg, key) is not None}
    if "unreadable" in known:
        given["unreadable"] = unreadable
    if cfg.folds and cfg.fold is None:
        given["fold"] = 0  # over all folds: the first stands for the rest
    if cfg.folds and "folds_at" in known and "folds_at" not in cfg.data_args:
        over = Path(cfg.runs_dir) / "folds.csv"
        given["folds_at"] = str(over if cfg.name == f"fold{cfg.fold}" and over.is_file() else over.with_suffix(""))
    encoding, outputs = targets.encoding_of(cfg.loss, cfg.loss_args.get("bins", targets.BINS))
    data = (make or partial(datamodules.create, cfg.data))(
        **given, own_augment=cfg.augment, encoding=encoding, outputs_per_target=outputs, **names, **cfg.data_args
    )
    if checkpoint and data.target_range:
        data.target_range = checkpoint["spec"].get("target_range") or data.target_range
    if checkpoint and "columns" in checkpoint["spec"] | data.spec:
        if not hasattr(data, "standardise"):
            columns = ", ".join(checkpoint["spec"]["columns"]["names"])
            raise UsageError(f"--init {cfg.init} takes columns of a table ({columns}); --data {cfg.data} has none")
        data.standardise(checkpoint["spec"].get("columns") or {})
    return data


def _check_for_files(cfg: Config, known: set[str]) -> None:
    """Refuse knobs of tables or image files that the data set does not take. Raises UsageError."""
    for group, text in ((Table, "tables (a folder with train.csv)"), (ImageFiles, "picture files")):
        for knob in fields(group):
            value = getattr(cfg, knob.name)
            if value != knob.default and knob.name not in {*known, "metric"}:
                said = f" {value}" * (group is ImageFiles)
                raise UsageError(f"{flag(knob)}{said} is for {text}; --data {cfg.data} has none")


def model(cfg: Config, data: PictureData) -> tuple[nn.Module, str]:
    """The network with its initial weights, and a line on their source ('' from scratch)."""
    L.seed_everything(cfg.seed, verbose=False)
    network = models.create(
        cfg.model, data.spec["num_outputs"], cfg.size, columns=pretrained.columns_of(data.spec), **cfg.model_args
    )
    use_ema = cfg.use_ema if cfg.eval_only or cfg.ema_decay is None else None
    line = (
        pretrained.initialise(
            network,
            directories.own(cfg.init, cfg, "--init"),
            name=cfg.model,
            spec=data.spec,
            reset_head=cfg.init_head == "reset",
            partial=cfg.init_partial,
            whole=cfg.eval_only,
            use_ema=use_ema,
        )
        if cfg.init
        else ""
    )
    if cfg.train_size is not None and hasattr(network, "set_any_size"):
        network.set_any_size()
    if cfg.freeze and not cfg.eval_only:
        names, count = freeze(network, cfg.freeze), cost.parameters(network)
        fixed = sum(parameter.numel() for name, parameter in network.named_parameters() if name in {*names})
        line += f"{'; ' * bool(line)}freeze {cfg.freeze}: {fixed:,} of {count:,} parameters stay as they are"
    return network, line


def teacher(cfg: Config, data: PictureData) -> Teacher | Teachers | CachedTeacher | None:
    """The teacher of a run: one network, several, or cached answers; None without one. Raises ValueError or
    FileNotFoundError for an untrained or unfit one."""
    if not cfg.teacher or cfg.eval_only:
        return None
    if cached_teacher.is_cache(cfg.teacher):
        return CachedTeacher(cfg.teacher)
    first, *others = (
        range(cfg.folds) if cfg.folds and cfg.fold is None else [cfg.fold]
    )  # over all: none is refused after another was trained
    sources = [source.strip() for source in cfg.teacher.split(",")]
    for fold, source in product(others, filter(directories.is_over_folds, sources)):
        place = directories.own(source, replace(cfg, fold=fold), "--teacher")
        check_spec(place, pretrained.read_about(place)["spec"], data.spec)
    found = [
        Teacher.load(
            directories.own(source, replace(cfg, fold=first), "--teacher"),
            cfg.teacher_init,
            student=data.spec,
            precision=cfg.precision,
        )
        for source in sources
    ]
    return found[0] if len(found) == 1 else Teachers(found, data.spec["task"])


def gmacs(cfg: Config, spec: dict[str, Any]) -> float:
    """Billions of multiply-accumulates of the forward pass of one image."""
    with torch.device("meta"):
        meta = models.create(cfg.model, spec["num_outputs"], cfg.size, **cfg.model_args)
    return cost.gmacs(meta, cfg.size)


def seen_by_teacher(cfg: Config, data: PictureData) -> dict[str, Any]:
    """Values that determine which images the teacher of a run sees (`cached_teacher.identity`)."""
    world = forecast.world_size(cfg)
    return cached_teacher.identity(
        plain(cfg),
        data.identity,
        data.spec,
        world_size=world,
        pass_size=cfg.global_batch_size // world // data.accumulation(world),
        device="cuda" if forecast.on_gpu(cfg) else "cpu",
    )


def cache_pictures(data: PictureData, prog: str = "run.py") -> None:
    """Build the image cache. One process of a machine builds, the others wait; a signal ends it at once and keeps what
    is done.

    Exits with 1 and a line, headed by `prog`, for an unreadable image or a full disk.
    """
    if data.cache is None:
        return
    before, notice.together = notice.together, False
    try:
        data.cache.build()
        data.cache.store.maps  # noqa: B018  what is damaged is said here
    except (PictureError, ValueError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    finally:
        notice.together = before
