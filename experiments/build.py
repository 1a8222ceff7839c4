"""Names -> objects: the one place that knows all rooms."""
import json
import logging
import os
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from torch import nn

import datamodules
import models
from datamodules.decode import PictureError
from experiments import plan, preflight, rundir
from experiments.config import Command, Config, read
from experiments.recipe import recipe_data
from experiments.usage import TOLD, UsageError, size
from lightning_modules import distill_losses, targets, teacher_cache
from lightning_modules.freeze import freeze
from lightning_modules.preemption import COLLECTIVE_TIMEOUT
from lightning_modules.signals import notice
from lightning_modules.teacher import Teacher, Teachers
from lightning_modules.teacher_cache import CachedTeacher
from models import cost, pretrained

DECISION = "VITLAB_DECISION"  # what the launching process decided, for the ranks Lightning starts
TABLE = ("target", "task", "image", "group", "bad_images", "folds", "fold")  # knobs of data sets that are tables
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


def resolve(command: Command) -> Run:
    """Decide once, in the launching process; ranks take its result. Raises ValueError or FileNotFoundError for what a person must mend."""
    quiet()
    if DECISION in os.environ and "LOCAL_RANK" in os.environ:
        return _build(Config(**_tuples(json.loads(os.environ[DECISION])["cfg"])), json.loads(os.environ[DECISION]))
    environment = next((kind() for kind in (TorchElasticEnvironment, SLURMEnvironment) if kind.detect()), LightningEnvironment())
    if not environment.creates_processes_externally or environment.world_size() == 1:
        run, decision = decide(command)
        os.environ[DECISION] = json.dumps(decision)
        return run
    if not dist.is_initialized():  # Lightning goes on with this group
        backend = "cpu:gloo,cuda:nccl" if plan.on_gpu(command.config) else "gloo"
        os.environ.setdefault("MASTER_ADDR", environment.main_address)
        os.environ.setdefault("MASTER_PORT", str(environment.main_port))
        dist.init_process_group(backend, rank=environment.global_rank(), world_size=environment.world_size(), timeout=COLLECTIVE_TIMEOUT)
        notice.together = True  # from here on no rank leaves alone
    run, shared = None, [None]
    if environment.global_rank() == 0:
        try:
            run, shared[0] = decide(command)
        except (ValueError, FileNotFoundError) as error:
            shared[0] = str(error)
    dist.broadcast_object_list(shared, device=torch.device("cpu"))
    if isinstance(shared[0], str):
        raise UsageError(shared[0])
    return run or _build(Config(**_tuples(shared[0]["cfg"])), shared[0])


def quiet() -> None:
    """Silence what Lightning says of itself."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")  # lightning 2.6 with newer torch
    warnings.filterwarnings("ignore", message=".*Total length of `list` across ranks is zero.*")  # no val split: said by --dry_run
    warnings.filterwarnings("ignore", message=".*dataloader is not resumable.*")  # ours is: its position is in the checkpoint


def decide(command: Command) -> tuple[Run, dict[str, Any]]:
    """Check names, read the folder, fill what was left out, enter the run directory. Returns the run and its decision as plain data."""
    command, saved = _with_saved(_with_data(_with_saved(command))), _saved(command.config)  # reading the line again forgets what was taken
    cfg, alone = command.config, command.recipe_alone
    preflight.check_names(cfg)
    problems = [plan.device_problem(cfg)]
    left_out = _left_out(cfg, saved)
    cfg, alone = (replace(each.filled(**left_out), precision=plan.precision(each) if each.precision == "auto" else each.precision)
                  for each in (cfg, alone))
    data = None
    try:
        data = datamodule(cfg)
        guessed = {key: value for key, value in getattr(data, "resolved", dict)().items() if getattr(cfg, key) is None}
        cfg, alone = cfg.filled(**guessed), alone.filled(**guessed)
        cfg, alone = (preflight.for_task(each, data) for each in (cfg, alone))
        if cfg.teacher:
            cfg = cfg.filled(distill=distill_losses.default(data.task))
        if not problems[0]:
            data.accumulation(plan.world_size(cfg))
    except (ValueError, FileNotFoundError) as error:
        problems.append(str(error))
    problems += preflight.unfit(cfg, data) if data else []
    problems += preflight.unlearnable(cfg, data.spec) if data and not cfg.eval_only else []
    if any(problems):
        raise UsageError("\n".join(filter(None, problems)))
    with torch.device("meta"):
        meta = models.create(cfg.model, data.spec["num_outputs"], size(cfg.image_size), **cfg.model_args)
    preflight.check_network(meta, cfg, data)
    cfg, alone, notes = preflight.with_warmup(cfg, alone, cfg.epochs * data.steps_per_epoch)
    cfg, alone, more = preflight.with_layer_decay(cfg, alone, meta, "layer_decay" in command.chosen)
    cfg = replace(cfg, cache_side=data.cache_side)
    cfg = replace(cfg, name=cfg.name or rundir.run_name(cfg, replace(alone, data=cfg.data, model=cfg.model)),
                  data_dir=data.data_dir and str(data.data_dir))
    cfg = cfg.filled(micro_batch_size=_micro_batch_size(cfg, data, meta))
    data.micro_batch_size = cfg.micro_batch_size
    network, line = model(cfg, data)
    guide, identity = teacher(cfg, data), data.identity
    if isinstance(guide, CachedTeacher):
        guide.check(seen_by_teacher(cfg, data))
        identity = {**identity, "teacher_digest": guide.digest}
    for note in () if TOLD in os.environ else (*command.notes, *notes, *more, *([line] if line else []), *preflight.advice(cfg, data, meta)):
        print(note)
    if cfg.dry_run:
        folder, resume, finished = Path(cfg.runs_dir) / cfg.name, None, rundir.look(cfg, identity)
    else:
        folder, resume, finished = rundir.enter(cfg, data.spec, identity)
        if cfg.folds:
            data.keep_folds()
    decision = {"cfg": {key: getattr(cfg, key) for key in cfg.__dataclass_fields__}, "folder": str(folder), "resume": resume,
                "finished": finished}
    return Run(cfg, folder, resume, finished, data, network, guide), decision


def _micro_batch_size(cfg: Config, data: L.LightningDataModule, meta: nn.Module) -> int:
    """Once chosen it stays: a resume splits its batches as before. Pictures mixed within a pass are mixed as a cached teacher saw them."""
    if cfg.micro_batch_size is not None:
        return cfg.micro_batch_size
    before = {} if cfg.overwrite else rundir.stored(Path(cfg.runs_dir) / cfg.name)
    if all(before.get(key) == getattr(cfg, key) for key in ("devices", "num_nodes")):
        return before["micro_batch_size"]
    if cfg.teacher and data.mixing and teacher_cache.is_cache(cfg.teacher):
        return teacher_cache.read_about(cfg.teacher)["identity"]["pass_size"]
    return plan.micro_batch_size(meta, cfg)


def listed(command: Command) -> L.LightningDataModule:
    """The data set of a run alone, prepared as its model wants it. Raises ValueError or FileNotFoundError."""
    command = _with_data(_with_saved(command))
    preflight.check_names(command.config)
    return datamodule(command.config.filled(**_left_out(command.config, _saved(command.config))))


def _left_out(cfg: Config, saved: dict[str, Any]) -> dict[str, Any]:
    """How the pictures are prepared where no flag says it: as for the saved network, or else for the model."""
    found = models.preprocessing(cfg.model) | {key: saved["spec"][key] for key in PREPARATION if saved}
    return found | {"image_size": "x".join(map(str, found["image_size"]))}


def cache_pictures(data: L.LightningDataModule, prog: str = "run.py") -> None:
    """Make the picture cache ready. Each process asks, one of a machine builds, and a signal ends it at once: what is done is kept.

    Exits with 1 and a line, in which `prog` speaks, for a picture that cannot be read and a disk that has no room.
    """
    if data.cache is None:
        return
    before, notice.together = notice.together, False
    try:
        data.cache.build()
    except (PictureError, ValueError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    finally:
        notice.together = before


def seen_by_teacher(cfg: Config, data: L.LightningDataModule) -> dict[str, Any]:
    """What decides which pictures the teacher of a run sees (`teacher_cache.identity`)."""
    world = plan.world_size(cfg)
    return teacher_cache.identity(rundir.plain(cfg), data.identity, data.spec, world_size=world,
                                  pass_size=cfg.global_batch_size // world // data.accumulation(world),
                                  device="cuda" if plan.on_gpu(cfg) else "cpu")


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _build(cfg: Config, decision: dict[str, Any]) -> Run:
    data = datamodule(cfg)
    return Run(cfg, Path(decision["folder"]), decision["resume"], decision["finished"], data, model(cfg, data)[0], teacher(cfg, data))


def _with_data(command: Command) -> Command:
    """The command with a data set named: what the folder says it is, or imagenet; the recipe may follow from it. A folder with tables is the
    competition that the recipe is for, where it is for one."""
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
    return pretrained.read_about(cfg.init)


def _with_saved(command: Command) -> Command:
    """An evaluation of one of our runs is of its network, on its data set and prepared as there, where nothing else is said."""
    saved, cfg = _saved(command.config).get("config", {}), command.config
    if not saved:
        return command
    taken = {key: saved.get(key) for key in ("model", "model_args") if cfg.model is None}
    taken |= {key: saved[key] for key in ("data", "data_dir", "data_args", *TABLE, "metric") if key in saved and not (cfg.data or cfg.data_dir)}
    taken |= {key: saved[key] for key in ("loss", "loss_args") if key in saved and cfg.loss is None}  # they say what the outputs mean
    return replace(command, config=replace(cfg, **taken), recipe_alone=replace(command.recipe_alone, **taken))


def datamodule(cfg: Config) -> L.LightningDataModule:
    """The data set, its folder listed. For an evaluation of a vitlab checkpoint the classes keep the checkpoint's order, targets its range."""
    names = {}
    if saved := _saved(cfg):
        names = {"class_names": saved["spec"].get("class_names")}
    known = datamodules.accepted(cfg.data)
    table = {key: getattr(cfg, key) for key in TABLE if getattr(cfg, key) not in (None, "error")}
    if strange := table.keys() - {*known}:
        raise UsageError(f"--{min(strange)} is for tables (a folder with train.csv); --data {cfg.data} has none")
    if cfg.folds and cfg.fold is None:
        table["fold"] = 0  # over all folds: the first stands for the rest
    if cfg.folds and "folds_at" in known and "folds_at" not in cfg.data_args:
        over = Path(cfg.runs_dir) / "folds.csv"
        table["folds_at"] = str(over if cfg.name == f"fold{cfg.fold}" and over.is_file() else over.with_suffix(""))
    table |= {"metric": cfg.metric} if "metric" in known and cfg.metric else {}
    encoding, outputs = targets.encoding_of(cfg.loss, cfg.loss_args.get("bins", targets.BINS))
    data = datamodules.create(
        cfg.data, encoding=encoding, outputs_per_target=outputs, **table, data_dir=cfg.data_dir, image_size=size(cfg.image_size), mean=cfg.mean,
        std=cfg.std, interpolation=cfg.interpolation, crop_pct=cfg.crop_pct, crop_mode=cfg.crop_mode, crop_scale=cfg.crop_scale,
        hflip=cfg.hflip, val_fraction=cfg.val_fraction, rand_augment=cfg.rand_augment, random_erasing=cfg.random_erasing,
        repeated_augment=cfg.repeated_augment, mixup=cfg.mixup, cutmix=cfg.cutmix, label_smoothing=cfg.label_smoothing,
        augment_args=cfg.augment_args, own_augment=cfg.augment, train_size=cfg.train_size, epochs=cfg.epochs, split_seed=cfg.split_seed,
        seed=cfg.seed, global_batch_size=cfg.global_batch_size, micro_batch_size=cfg.micro_batch_size, workers=cfg.workers,
        cache_dir=cfg.cache_dir, cache_side=cfg.cache_side, eval_only=cfg.eval_only, **names, **cfg.data_args)
    if saved and data.target_range:
        data.target_range = saved["spec"].get("target_range") or data.target_range
    if saved and "columns" in saved["spec"] | data.spec:
        if not hasattr(data, "standardise"):
            names = ", ".join(saved["spec"]["columns"]["names"])
            raise UsageError(f"--init {cfg.init} takes columns of a table ({names}); --data {cfg.data} has none")
        data.standardise(saved["spec"].get("columns") or {})
    return data


def model(cfg: Config, data: L.LightningDataModule) -> tuple[nn.Module, str]:
    """The network with its first weights, and the line that says where they come from ('' from scratch)."""
    L.seed_everything(cfg.seed, verbose=False)
    network = models.create(cfg.model, data.spec["num_outputs"], size(cfg.image_size), columns=pretrained.columns_of(data.spec), **cfg.model_args)
    line = pretrained.initialise(network, cfg.init, name=cfg.model, reset_head=cfg.init_head == "reset", whole=cfg.eval_only,
                                 use_ema=cfg.use_ema if cfg.eval_only or cfg.ema_decay is None else None) if cfg.init else ""
    if cfg.train_size is not None and hasattr(network, "set_any_size"):
        network.set_any_size()
    if cfg.freeze and not cfg.eval_only:
        names, count = freeze(network, cfg.freeze), cost.parameters(network)
        fixed = sum(parameter.numel() for name, parameter in network.named_parameters() if name in {*names})
        line += f"{'; ' * bool(line)}freeze {cfg.freeze}: {fixed:,} of {count:,} parameters stay as they are"
    return network, line


def teacher(cfg: Config, data: L.LightningDataModule) -> Teacher | Teachers | CachedTeacher | None:
    """The network or networks that a run learns from, or what they once said. Raises ValueError or FileNotFoundError for one that is untrained
    or does not fit."""
    if not cfg.teacher or cfg.eval_only:
        return None
    if teacher_cache.is_cache(cfg.teacher):
        return CachedTeacher(cfg.teacher)
    found = [Teacher.load(source.strip(), cfg.teacher_init, student=data.spec, precision=cfg.precision) for source in cfg.teacher.split(",")]
    return found[0] if len(found) == 1 else Teachers(found, data.spec["task"])


def gmacs(run: Run) -> float:
    """Billions of multiply-accumulates of one picture's forward pass."""
    with torch.device("meta"):
        meta = models.create(run.cfg.model, run.data.spec["num_outputs"], size(run.cfg.image_size), **run.cfg.model_args)
    return cost.gmacs(meta, size(run.cfg.image_size))
