"""Names -> objects: the one place that knows all rooms."""

import atexit
import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

import datamodules
import models
from datamodules import imagenet
from datamodules.knobs import ImageFiles, Table, height_width
from datamodules.loading.decode import PictureError
from experiments.cli import early, launcher
from experiments.cli.errors import TOLD, UsageError
from experiments.cli.recipes import recipe_data
from experiments.config import Command, Config, read
from experiments.folds import directories
from experiments.running import forecast, held_out, preflight, rendezvous, run_directory
from experiments.running.extension import extended
from lightning_modules.callbacks.signals import notice
from lightning_modules.objectives import distill_losses, targets
from lightning_modules.optimization.freeze import freeze
from lightning_modules.teachers import cached_teacher
from lightning_modules.teachers.cached_teacher import CachedTeacher
from lightning_modules.teachers.teacher import Teacher, Teachers, check_spec
from models import cost, pretrained

DECISION = "VITLAB_DECISION"  # what the launching process decided, for the ranks Lightning starts
TABLE = ("target", "task", "image", "group", "bad_rows", "folds", "fold")  # knobs of data sets that are tables
TRIED_PICTURES = 16  # of val and of test, in --fast_dev_run
PREPARATION = ("image_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


@dataclass
class Run:
    """A run that may start: its resolved config, its directory, what it resumes from, and the objects built so far."""

    cfg: Config
    folder: Path
    resume: str | None
    finished: bool
    data: L.LightningDataModule
    model: nn.Module
    teacher: Teacher | Teachers | CachedTeacher | None = None
    asked: str | None = None  # `early.asked`
    assumed: tuple[str, ...] = ()  # what a plan takes for granted


def resolve(command: Command, *, assume: bool = False) -> Run:
    """Decide once, in the launching process; ranks take its result. `assume`: see `decide`. Raises ValueError or
    FileNotFoundError for what a person must mend."""
    quiet()
    forecast.share_cores(command.config)
    if DECISION in os.environ and "LOCAL_RANK" in os.environ:
        return _build(json.loads(os.environ[DECISION]))
    place = forecast.environment(command.config)
    if not place.creates_processes_externally or place.world_size() == 1:
        run = enter(decide(command, assume=assume))
        os.environ[DECISION] = json.dumps(_decision(run))
        return run
    if problem := launcher.problem(command.config.devices, command.config.num_nodes, planned=command.config.dry_run):
        raise UsageError(problem)
    rendezvous.meet(place, command.config)
    run = _resolve_together(command, first=place.global_rank() == 0)
    notice.together = True  # from here on no rank leaves alone
    return run


def _resolve_together(command: Command, *, first: bool) -> Run:
    """Rank 0 decides, all build what it decided, and it enters the directory once no rank has anything against it.
    Raises as `resolve`."""
    run, problem = _attempt(decide, command) if first else (None, None)
    decision = rendezvous.tell(run and _decision(run), problem)
    if not first:
        run, problem = _attempt(_build, decision)
    rendezvous.agree(problem)
    if not run.cfg.dry_run and not run.finished:
        rendezvous.one_disk(run.cfg.runs_dir)
    if first:
        run, problem = _attempt(enter, run)
    run.resume, run.finished = rendezvous.tell(run and (run.resume, run.finished), problem)
    return run


def _attempt(do: Callable[[Any], Run], given: Any) -> tuple[Run | None, Exception | None]:
    try:
        return do(given), None
    except (ValueError, FileNotFoundError) as error:
        return None, error


def _decision(run: Run) -> dict[str, Any]:
    """What other ranks need to build the same run, as plain data."""
    return {
        "cfg": {each.name: getattr(run.cfg, each.name) for each in fields(run.cfg)},
        "folder": str(run.folder),
        "resume": run.resume,
        "finished": run.finished,
        "unreadable": getattr(run.data, "unreadable", None) or [],
    }


def quiet() -> None:
    """Silence what Lightning says of itself."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", message=".*isinstance\\(treespec, LeafSpec\\).*"
    )  # lightning 2.6 with newer torch
    warnings.filterwarnings(
        "ignore", message=".*Total length of `list` across ranks is zero.*"
    )  # no val split: said by --dry_run
    warnings.filterwarnings(
        "ignore", message=".*dataloader is not resumable.*"
    )  # ours is: its position is in the checkpoint


def decide(command: Command, *, assume: bool = False) -> Run:
    """Check names, read the folder, fill what was left out, look into the run directory. Writes nothing; `enter` does.

    assume: for a plan alone, go on without the GPUs asked for and without ImageNet's files; `Run.assumed` tells.
    """
    typed = command.config
    command = _with_saved(_with_data(_with_saved(command)))  # reading the line again forgets what was taken
    cfg, alone = _tried(command.config), command.recipe_alone
    preflight.check_names(cfg)
    assumed = [_assumed_gpus(cfg)] if assume and forecast.lacks_gpus(cfg) else []
    away, problems, left_out = bool(assumed), [None if assumed else forecast.device_problem(cfg)], _left_out(cfg)
    cfg, alone = (
        replace(
            each.filled(**left_out),
            precision=forecast.precision(each, assumed=away) if each.precision == "auto" else each.precision,
        )
        for each in (cfg, alone)
    )
    data = None
    try:
        data = _published(cfg, assumed) if assume else datamodule(cfg)
        guessed = {key: value for key, value in getattr(data, "resolved", dict)().items() if getattr(cfg, key) is None}
        cfg, alone = cfg.filled(**guessed), alone.filled(**guessed)
        args = getattr(data, "resolved_args", dict)()
        cfg, alone = (replace(each, data_args={**args, **each.data_args}) for each in (cfg, alone))
        cfg, alone = (preflight.for_task(each, data) for each in (cfg, alone))
        if cfg.teacher:
            cfg = cfg.filled(distill=distill_losses.default(data.task))
        if not problems[0]:
            data.accumulation(forecast.world_size(cfg))
    except (ValueError, FileNotFoundError) as error:
        problems.append(str(error))
    problems += preflight.unfit(cfg, data) if data else []
    problems += preflight.unlearnable(cfg, data.spec) if data and not cfg.eval_only else []
    if any(problems):
        raise UsageError("\n".join(filter(None, problems)))
    seen = [] if assumed else held_out.check(cfg, data, datamodule)
    with torch.device("meta"):
        meta = models.create(cfg.model, data.spec["num_outputs"], height_width(cfg.image_size), **cfg.model_args)
    preflight.check_network(meta, cfg, data)
    cfg, alone, notes = preflight.with_warmup(cfg, alone, cfg.epochs * data.steps_per_epoch)
    cfg, alone, more = preflight.with_layer_decay(cfg, alone, meta, "layer_decay" in command.chosen)
    cfg = replace(cfg, cache_side=data.cache_side)
    cfg = replace(
        cfg,
        name=cfg.name or run_directory.run_name(cfg, replace(alone, data=cfg.data, model=cfg.model)),
        data_dir=data.data_dir and str(data.data_dir),
    )
    cfg, longer = extended(cfg, data.steps_per_epoch, command.chosen)
    cfg = cfg.filled(micro_batch_size=_micro_batch_size(cfg, data, meta, assumed=away))
    data.micro_batch_size = cfg.micro_batch_size
    preflight.check_pass(meta, cfg, data)
    network, line = model(cfg, data)
    guide = teacher(cfg, data)
    if isinstance(guide, CachedTeacher):
        guide.check(seen_by_teacher(cfg, data))
    words = (
        *command.notes,
        *notes,
        *more,
        *longer,
        *([line] if line else []),
        *_pictures_line(cfg),
        *seen,
        *getattr(guide, "notes", ()),
        *preflight.advice(cfg, data, meta),
    )
    for note in () if TOLD in os.environ else words:
        print(note)
    cfg = run_directory.placed(cfg)
    folder = Path(cfg.runs_dir) / cfg.name
    run = Run(cfg, folder, None, False, data, network, guide, early.asked(typed, folder), tuple(assumed))
    run.finished = run_directory.look(cfg, _identity(run))
    return run


def _assumed_gpus(cfg: Config) -> str:
    here = torch.cuda.device_count()
    like = (
        f"like the {here} of this machine"
        if here
        else f"of {forecast.ASSUMED_BYTES // 2**30} GB with bfloat16; this machine has none"
    )
    return f"{cfg.devices} GPU{'s' * (cfg.devices > 1)} {like}"


def _published(cfg: Config, assumed: list[str]) -> L.LightningDataModule:
    """The data set, or ImageNet by its published numbers where no folder is named and none is found; `assumed` then has
    a line more."""
    try:
        return datamodule(cfg)
    except FileNotFoundError:
        if cfg.data != "imagenet" or cfg.data_dir:
            raise
    assumed.append(
        "ImageNet's published numbers of pictures; its folder is not named (--data_dir, $IMAGENET_DIR) and "
        "data/imagenet is not there"
    )
    return datamodule(cfg, unreadable=[], make=imagenet.Published)


def enter(run: Run) -> Run:
    """Make or re-enter the directory of a run that is decided, unless only a plan is asked for. Raises UsageError
    (`run_directory.enter`)."""
    if not run.cfg.dry_run:
        run.folder, run.resume, run.finished = run_directory.enter(run.cfg, run.data.spec, _identity(run))
        if run.cfg.folds:
            run.data.keep_folds()
    return run


def _identity(run: Run) -> dict[str, Any]:
    """What must be equal for a resume (`PictureData.identity`, and a cached teacher's answers)."""
    return run.data.identity | (
        {"teacher_digest": run.teacher.digest} if isinstance(run.teacher, CachedTeacher) else {}
    )


def _tried(cfg: Config) -> Config:
    """The config of --fast_dev_run: few pictures to score, no tracker, in a folder that goes with this process; any
    other as it is."""
    if not cfg.fast_dev_run or cfg.dry_run:
        return cfg
    folder = tempfile.mkdtemp(prefix="vitlab-fast-dev-run-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    few = min(cfg.limit_val or TRIED_PICTURES, TRIED_PICTURES)
    return replace(cfg, limit_val=few, runs_dir=folder, logger="csv", tags=None, notes=None, logger_args={})


def _micro_batch_size(cfg: Config, data: L.LightningDataModule, meta: nn.Module, *, assumed: bool) -> int:
    """Once chosen it stays: a resume splits its batches as before. Pictures mixed within a pass are mixed as a cached
    teacher saw them."""
    if cfg.micro_batch_size is not None:
        return cfg.micro_batch_size
    before = {} if cfg.overwrite else run_directory.stored(Path(cfg.runs_dir) / cfg.name)
    if all(before.get(key) == getattr(cfg, key) for key in ("devices", "num_nodes")):
        return before["micro_batch_size"]
    if cfg.teacher and data.mixing and cached_teacher.is_cache(cfg.teacher):
        return cached_teacher.read_about(cfg.teacher)["identity"]["pass_size"]
    return forecast.micro_batch_size(meta, cfg, assumed=assumed)


def listed(command: Command) -> L.LightningDataModule:
    """The data set of a run alone, prepared as its model wants it. Raises ValueError or FileNotFoundError."""
    command = _with_data(_with_saved(command))
    preflight.check_names(command.config)
    return datamodule(command.config.filled(**_left_out(command.config)))


def _left_out(cfg: Config) -> dict[str, Any]:
    """How the pictures are prepared where no flag and no recipe says it: as for the weights in `--init`, where they
    tell it, or else for the model. Raises ValueError or FileNotFoundError."""
    found = models.preprocessing(cfg.model) | _preparation(cfg)
    return found | {"image_size": "x".join(map(str, found["image_size"]))}


def _preparation(cfg: Config) -> dict[str, Any]:
    """How the pictures were prepared that the weights in `--init` were trained on; {} where it is not known."""
    spec = pretrained.about(directories.own(cfg.init, cfg, "--init"), cfg.model).get("spec", {}) if cfg.init else {}
    return {key: tuple(spec[key]) if isinstance(spec[key], list) else spec[key] for key in PREPARATION if key in spec}


def _pictures_line(cfg: Config) -> list[str]:
    """A line on whether the pictures are prepared as those that the weights in `--init` were trained on; none where
    that is not known."""
    theirs, ours = (
        _preparation(cfg),
        {key: getattr(cfg, key) for key in PREPARATION} | {"image_size": height_width(cfg.image_size)},
    )
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


def cache_pictures(data: L.LightningDataModule, prog: str = "run.py") -> None:
    """Make the picture cache ready. Each process asks, one of a machine builds, and a signal ends it at once: what is
    done is kept.

    Exits with 1 and a line, in which `prog` speaks, for a picture that cannot be read and a disk that has no room.
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


def seen_by_teacher(cfg: Config, data: L.LightningDataModule) -> dict[str, Any]:
    """What decides which pictures the teacher of a run sees (`cached_teacher.identity`)."""
    world = forecast.world_size(cfg)
    return cached_teacher.identity(
        run_directory.plain(cfg),
        data.identity,
        data.spec,
        world_size=world,
        pass_size=cfg.global_batch_size // world // data.accumulation(world),
        device="cuda" if forecast.on_gpu(cfg) else "cpu",
    )


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _build(decision: dict[str, Any]) -> Run:
    cfg = Config(**_tuples(decision["cfg"]))
    data = datamodule(cfg, decision["unreadable"])
    return Run(
        cfg,
        Path(decision["folder"]),
        decision["resume"],
        decision["finished"],
        data,
        model(cfg, data)[0],
        teacher(cfg, data),
    )


def _with_data(command: Command) -> Command:
    """The command with a data set named: what the folder says it is, or imagenet; the recipe may follow from it. A
    folder with tables is the competition that the recipe is for, where it is for one."""
    cfg = command.config
    if cfg.model is None:
        raise UsageError("--model is missing: --list models prints the names; --recipe demo is a small one to try")
    if cfg.data:
        return command
    found, meant = datamodules.detect(cfg.data_dir) if cfg.data_dir else "imagenet", recipe_data(cfg.recipe)
    if found == "csv" and meant and issubclass(datamodules.data_class(meant), datamodules.data_class("csv")):
        found = meant
    return read([*command.argv, "--data", found])


def _saved(cfg: Config) -> dict[str, Any]:
    """The checkpoint of ours that an evaluation takes its weights from, without its weights; {} where it is none."""
    if not cfg.eval_only or not Path(cfg.init).exists():
        return {}
    return pretrained.read_about(directories.own(cfg.init, cfg, "--init"))


def _with_saved(command: Command) -> Command:
    """An evaluation of one of our runs is of its network, on its data set and prepared as there, where nothing else is
    said."""
    saved, cfg = _saved(command.config).get("config", {}), command.config
    if not saved:
        return command
    taken = {key: saved.get(key) for key in ("model", "model_args") if cfg.model is None}
    if not (cfg.data or cfg.data_dir):
        taken |= {
            key: saved[key] for key in ("data", "data_dir", "data_args", "bad_images", *TABLE, "metric") if key in saved
        }
    taken |= {key: saved[key] for key in ("val_fraction", "split_seed") if key in saved and key not in command.chosen}
    taken |= {
        key: saved[key] for key in ("loss", "loss_args") if key in saved and cfg.loss is None
    }  # they say what the outputs mean
    return replace(command, config=replace(cfg, **taken), recipe_alone=replace(command.recipe_alone, **taken))


def datamodule(
    cfg: Config, unreadable: list[str] | None = None, make: Callable[..., Any] | None = None
) -> L.LightningDataModule:
    """The data set, its folder listed. For an evaluation of a vitlab checkpoint the classes keep the checkpoint's
    order, targets its range.

    unreadable: pictures that cannot be read, as the launching process has found them; None looks for them.
    make: what builds it; None: `datamodules.create`.
    """
    names = {}
    if saved := _saved(cfg):
        names = {"class_names": saved["spec"].get("class_names")}
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
    if saved and data.target_range:
        data.target_range = saved["spec"].get("target_range") or data.target_range
    if saved and "columns" in saved["spec"] | data.spec:
        if not hasattr(data, "standardise"):
            names = ", ".join(saved["spec"]["columns"]["names"])
            raise UsageError(f"--init {cfg.init} takes columns of a table ({names}); --data {cfg.data} has none")
        data.standardise(saved["spec"].get("columns") or {})
    return data


def _check_for_files(cfg: Config, known: set[str]) -> None:
    """Raises UsageError for a knob of tables, or of image files, that the data set has not."""
    for group, text in ((Table, "tables (a folder with train.csv)"), (ImageFiles, "picture files")):
        for knob in fields(group):
            value = getattr(cfg, knob.name)
            if value != knob.default and knob.name not in {*known, "metric"}:
                said = f" {value}" * (group is ImageFiles)
                raise UsageError(f"--{knob.name}{said} is for {text}; --data {cfg.data} has none")


def model(cfg: Config, data: L.LightningDataModule) -> tuple[nn.Module, str]:
    """The network with its first weights, and the line that says where they come from ('' from scratch)."""
    L.seed_everything(cfg.seed, verbose=False)
    network = models.create(
        cfg.model,
        data.spec["num_outputs"],
        height_width(cfg.image_size),
        columns=pretrained.columns_of(data.spec),
        **cfg.model_args,
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


def teacher(cfg: Config, data: L.LightningDataModule) -> Teacher | Teachers | CachedTeacher | None:
    """The network or networks that a run learns from, or what they once said. Raises ValueError or FileNotFoundError
    for one that is untrained or does not fit."""
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


def gmacs(run: Run) -> float:
    """Billions of multiply-accumulates of one picture's forward pass."""
    with torch.device("meta"):
        meta = models.create(
            run.cfg.model, run.data.spec["num_outputs"], height_width(run.cfg.image_size), **run.cfg.model_args
        )
    return cost.gmacs(meta, height_width(run.cfg.image_size))
