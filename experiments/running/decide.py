"""The decision about a run, in a straight list of steps from the data set to the name. Nothing is written, but for the
temporary directory of --fast_dev_run."""

import atexit
import os
import shutil
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import datamodules
import models
from datamodules import imagenet
from datamodules.base import PictureData
from datamodules.knobs import Table
from experiments.cli import early
from experiments.cli.errors import NOTES_PRINTED, UsageError
from experiments.cli.recipes import recipe_data
from experiments.config import Command, Config
from experiments.folds import directories
from experiments.running import forecast, held_out, memory, objects, preflight, run_directory
from experiments.running.extension import extended
from lightning_modules.objectives import distill_losses
from lightning_modules.teachers import cached_teacher
from lightning_modules.teachers.cached_teacher import CachedTeacher
from lightning_modules.teachers.teacher import Teacher, Teachers
from models import pretrained

TRIED_PICTURES = 16  # of val and of test, in --fast_dev_run
PREPARATION = ("image_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


@dataclass
class Run:
    """A run that may start.

    Args:
        cfg: resolved. folder: the run directory. resume: checkpoint to resume from. asked: `early.asked`.
        assumed: lines on what a plan takes for granted.
    """

    cfg: Config
    folder: Path
    resume: str | None
    finished: bool
    data: PictureData
    model: nn.Module
    teacher: Teacher | Teachers | CachedTeacher | None = None
    asked: str | None = None  # `early.asked`
    assumed: tuple[str, ...] = ()  # what a plan takes for granted

    @property
    def identity(self) -> dict[str, Any]:
        """Values that must be equal for a resume (`PictureData.identity`, digest of a cached teacher)."""
        digest = {"teacher_digest": self.teacher.digest} if isinstance(self.teacher, CachedTeacher) else {}
        return self.data.identity | digest


@dataclass
class Draft:
    """A run that is being decided: its config, the values of its recipe alone (for the name), and the lines to
    print."""

    cfg: Config
    alone: Config
    notes: list[str]


def decide(command: Command, *, assume: bool = False) -> Run:
    """Check names, read the folder, fill what was left out, look into the run directory.

    assume: for a plan alone, go on without the GPUs asked for and without ImageNet's files, which `Run.assumed` lists.

    Raises ValueError or FileNotFoundError for what must be mended.
    """
    typed, command = command.config, adopt_checkpoint(choose_data(command))
    draft = Draft(_tried(command.config), command.recipe_alone, [*command.notes])
    preflight.check_names(draft.cfg)
    assumed = [_assumed_gpus(draft.cfg)] if assume and forecast.lacks_gpus(draft.cfg) else []
    away = bool(assumed)
    fill_preprocessing(draft, assumed=away)
    data = read_data(draft, assumed if assume else None)
    seen = [] if assumed else held_out.check(draft.cfg, data, objects.datamodule)
    meta = fit_to_size(draft, data, command)
    fill_name(draft, data)
    take_extension(draft, data, command)
    network, line = objects.model(draft.cfg, data)
    teacher = objects.teacher(draft.cfg, data)
    fit_to_memory(draft, data, meta, teacher, assumed=away)
    if isinstance(teacher, CachedTeacher):
        teacher.check(objects.seen_by_teacher(draft.cfg, data))
    draft.notes += [*filter(None, [line]), *_pictures_line(draft.cfg), *seen, *getattr(teacher, "notes", ())]
    draft.notes += preflight.advice(draft.cfg, data, meta)
    for note in () if NOTES_PRINTED in os.environ else draft.notes:
        print(note)
    cfg = run_directory.placed(draft.cfg)
    folder = cfg.folder
    run = Run(cfg, folder, None, False, data, network, teacher, early.asked(typed, folder), tuple(assumed))
    run.finished = run_directory.look(cfg, run.identity)
    return run


def listed(command: Command) -> PictureData:
    """The data set of a run alone, prepared as its model wants it. Raises ValueError or FileNotFoundError."""
    cfg = adopt_checkpoint(choose_data(command)).config
    preflight.check_names(cfg)
    return objects.datamodule(cfg.filled(**_left_out(cfg)))


def choose_data(command: Command) -> Command:
    """Choose the data set: the given one, else what the folder looks like, else imagenet. The recipe may follow from
    it.

    A folder with tables is the competition that the recipe is for, if there is one. The checkpoint of an evaluation
    brings its own data set (`adopt_checkpoint`).
    """
    cfg = command.config
    saved = objects.saved(cfg)
    if cfg.model is None and not saved:
        raise UsageError("--model is missing: --list models prints the names; --recipe demo is a small one to try")
    if cfg.data or saved and not cfg.data_dir:
        return command
    found, meant = datamodules.detect(cfg.data_dir) if cfg.data_dir else "imagenet", recipe_data(cfg.recipe)
    if found == "csv" and meant and issubclass(datamodules.data_class(meant), datamodules.data_class("csv")):
        found = meant
    return command.again(data=found)


def adopt_checkpoint(command: Command) -> Command:
    """Take network, data set and split of an evaluation from the config of its checkpoint, where no flag sets them."""
    cfg = command.config
    saved = objects.saved(cfg).get("config", {})
    keys = [*("model", "model_args")] if cfg.model is None else []
    if not (cfg.data or cfg.data_dir):
        keys += ["data", "data_dir", "data_args", "bad_images", *(knob.name for knob in fields(Table))]
    keys += [key for key in ("val_fraction", "split_seed") if key not in command.chosen]
    keys += ["loss", "loss_args"] if cfg.loss is None else []  # they say what the outputs mean
    taken = {key: saved[key] for key in keys if key in saved}
    return replace(command, config=replace(cfg, **taken), recipe_alone=replace(command.recipe_alone, **taken))


def fill_preprocessing(draft: Draft, *, assumed: bool) -> None:
    """Fill preprocessing (as of --init, else of the model) and precision."""
    left_out = _left_out(draft.cfg)

    def filled(cfg: Config) -> Config:
        precision = forecast.precision(cfg, assumed=assumed) if cfg.precision == "auto" else cfg.precision
        return replace(cfg.filled(**left_out), precision=precision)

    draft.cfg, draft.alone = filled(draft.cfg), filled(draft.alone)


def read_data(draft: Draft, assumed: list[str] | None) -> PictureData:
    """Read the data folder and fill what follows from it.

    assumed: of a plan, extended where ImageNet is not there; None without a plan. Raises UsageError with all problems
    of data, loss, optimizer and devices.
    """
    problems, data = [None if assumed else forecast.device_problem(draft.cfg)], None
    try:
        data = objects.datamodule(draft.cfg) if assumed is None else _published(draft.cfg, assumed)
        fill_guesses(draft, data)
        if not problems[0]:
            data.accumulation(forecast.world_size(draft.cfg))
    except (ValueError, FileNotFoundError) as error:
        problems.append(str(error))
    problems += preflight.unfit(draft.cfg, data) if data else []
    problems += preflight.unlearnable(draft.cfg, data.spec) if data and not draft.cfg.eval_only else []
    if data is None or any(problems):
        raise UsageError("\n".join(filter(None, problems)))
    return data


def fill_guesses(draft: Draft, data: PictureData) -> None:
    """Fill the guesses of the data module about its tables, and the defaults of the task."""
    cfg = draft.cfg
    args: dict[str, Any] = getattr(data, "resolved_args", dict)()
    guessed = {key: value for key, value in getattr(data, "resolved", dict)().items() if getattr(cfg, key) is None}

    def filled(cfg: Config) -> Config:
        cfg = cfg.filled(**guessed)
        return preflight.for_task(replace(cfg, data_args={**args, **cfg.data_args}), data)

    draft.cfg, draft.alone = filled(cfg), filled(draft.alone)
    if cfg.teacher:
        draft.cfg = draft.cfg.filled(distill=distill_losses.default(data.task))


def fit_to_size(draft: Draft, data: PictureData, command: Command) -> nn.Module:
    """Check the network, and fit the recipe's warm-up and layer decay to its depth and the number of steps. Returns the
    network on no device."""
    cfg = draft.cfg
    with torch.device("meta"):
        meta = models.create(str(cfg.model), data.spec["num_outputs"], cfg.size, **cfg.model_args)
    preflight.check_network(meta, cfg, data)
    cfg, alone, notes = preflight.with_warmup(cfg, draft.alone, cfg.epochs * data.steps_per_epoch)
    cfg, alone, more = preflight.with_layer_decay(cfg, alone, meta, "layer_decay" in command.chosen)
    draft.cfg, draft.alone, draft.notes = cfg, alone, [*draft.notes, *notes, *more]
    return meta


def fill_name(draft: Draft, data: PictureData) -> None:
    """Fill the name of the run and the folder in which the data were found."""
    cfg = replace(draft.cfg, cache_side=data.cache_side)
    alone = replace(draft.alone, data=cfg.data, model=cfg.model)
    data_dir = data.data_dir and str(data.data_dir)
    draft.cfg = replace(cfg, name=cfg.name or run_directory.run_name(cfg, alone), data_dir=data_dir)


def take_extension(draft: Draft, data: PictureData, command: Command) -> None:
    """Fill the start of --extend."""
    draft.cfg, notes = extended(draft.cfg, data.steps_per_epoch, command.chosen)
    draft.notes += notes


def fit_to_memory(draft: Draft, data: PictureData, meta: nn.Module, teacher: Any, *, assumed: bool) -> None:
    """Fill the largest micro batch that fits the memory."""
    cfg = draft.cfg.filled(micro_batch_size=_micro_batch_size(draft.cfg, data, meta, teacher, assumed=assumed))
    data.micro_batch_size = cfg.micro_batch_size
    preflight.check_pass(meta, cfg, data)
    draft.cfg = cfg


def _tried(cfg: Config) -> Config:
    """Reduce a run with --fast_dev_run: few images to score, no tracker, a directory that is deleted at exit."""
    if not cfg.fast_dev_run or cfg.dry_run:
        return cfg
    folder = tempfile.mkdtemp(prefix="vitlab-fast-dev-run-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    few = min(cfg.limit_val or TRIED_PICTURES, TRIED_PICTURES)
    return replace(cfg, limit_val=few, runs_dir=folder, logger="csv", tags=None, notes=None, logger_args={})


def _micro_batch_size(cfg: Config, data: PictureData, meta: nn.Module, teacher: Any, *, assumed: bool) -> int:
    """The micro batch size: the given one, the one an interrupted run has, that of a cached teacher, or what fits."""
    if cfg.micro_batch_size is not None:
        return cfg.micro_batch_size
    before = {} if cfg.overwrite else run_directory.stored(cfg.folder)
    if all(before.get(key) == getattr(cfg, key) for key in ("devices", "num_nodes")):
        return before["micro_batch_size"]
    if cfg.teacher and data.mixing and cached_teacher.is_cache(cfg.teacher):
        return cached_teacher.read_about(cfg.teacher)["identity"]["pass_size"]
    return memory.micro_batch_size(meta, cfg, teacher, assumed=assumed)


def _left_out(cfg: Config) -> dict[str, Any]:
    """Preprocessing without flags: that of the weights in --init, where known, else that of the model."""
    found = models.preprocessing(str(cfg.model)) | _preparation(cfg)
    return found | {"image_size": "x".join(map(str, found["image_size"]))}


def _preparation(cfg: Config) -> dict[str, Any]:
    """Preprocessing of the run whose weights --init takes; {} where it is not known."""
    spec = (
        pretrained.about(directories.own(cfg.init, cfg, "--init"), str(cfg.model)).get("spec", {}) if cfg.init else {}
    )
    return {key: tuple(spec[key]) if isinstance(spec[key], list) else spec[key] for key in PREPARATION if key in spec}


def _pictures_line(cfg: Config) -> list[str]:
    """A line that compares the preprocessing with that of --init; [] where that is not known."""
    theirs, ours = (_preparation(cfg), {key: getattr(cfg, key) for key in PREPARATION} | {"image_size": cfg.size})
    if not theirs:
        return []
    apart = [
        f"{key} {_spelled(key, ours[key])} (there {_spelled(key, value)})"
        for key, value in theirs.items()
        if ours[key] != value
    ]
    if apart:
        return [f"pictures prepared as for --init {cfg.init} but for {', '.join(apart)}"]
    return [
        f"pictures prepared as for --init {cfg.init}: "
        + ", ".join(f"{key} {_spelled(key, value)}" for key, value in theirs.items())
    ]


def _spelled(key: str, value: Any) -> str:
    if key == "image_size":
        return "x".join(map(str, value))
    return ",".join(f"{each:g}" for each in value) if isinstance(value, tuple) else str(value)


def _assumed_gpus(cfg: Config) -> str:
    here = torch.cuda.device_count()
    like = (
        f"like the {here} of this machine"
        if here
        else f"of {memory.ASSUMED_BYTES // 2**30} GB with bfloat16; this machine has none"
    )
    return f"{cfg.devices} GPU{'s' * (cfg.devices > 1)} {like}"


def _published(cfg: Config, assumed: list[str]) -> PictureData:
    """The data set; where ImageNet is not found, its published number of images, with a line in `assumed`."""
    try:
        return objects.datamodule(cfg)
    except FileNotFoundError:
        if cfg.data != "imagenet" or cfg.data_dir:
            raise
    assumed.append(
        "ImageNet's published numbers of pictures; its folder is not named (--data_dir, $IMAGENET_DIR) and "
        "data/imagenet is not there"
    )
    return objects.datamodule(cfg, unreadable=[], make=imagenet.Published)
