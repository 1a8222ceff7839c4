"""Checks of a run before it starts, and advice to print: names, data, losses, sizes. Nothing is written here."""

from dataclasses import fields, replace
from functools import partial
from importlib.util import find_spec

import torch
from torch import nn

import datamodules
import models
from datamodules.base import PictureData
from datamodules.loading.closest import did_you_mean
from datamodules.loading.cores import cores
from datamodules.loading.workers import worker_count
from datamodules.tables.table import counted
from datamodules.transforms.augment import Augment
from experiments.cli.errors import UsageError
from experiments.cli.keywords import check_values
from experiments.cli.knobs import rare
from experiments.cli.recipes import recipe_model
from experiments.config import Config
from experiments.reporting import attention_maps
from experiments.running import forecast
from lightning_modules.callbacks.ema import uses_ema
from lightning_modules.objectives import distill_losses, losses, metrics
from lightning_modules.optimization.freeze import freeze, hold_frozen
from lightning_modules.optimization.layer_decay import PLAIN_DEPTH, for_depth
from lightning_modules.optimization.optimizers import check_optimizer
from lightning_modules.teachers import cached_teacher
from models.spec import Spec

FEW_WORKERS = 4  # feed no GPU from files
DECODED_PER_SECOND = 100  # JPEGs of 110 kB to training crops of 224 pixels, on one core of a server


def check_names(cfg: Config) -> None:
    models.check_name(cfg.model)
    if not cfg.model.startswith("timm/"):
        check_values(
            models.REGISTRY[cfg.model].build.__init__,
            cfg.model_args,
            f"--model_args of {cfg.model}",
            models.keywords(cfg.model),
        )
    elif reserved := cfg.model_args.keys() & {
        "num_classes",
        "in_chans",
        "img_size",
        "pretrained",
        "checkpoint_path",
        "columns",
    }:
        raise UsageError(f"--model_args.{min(reserved)} is not for here: --image_size, --init and the data decide it")
    if cfg.data not in datamodules.names():
        raise UsageError(
            f"no data set named {cfg.data!r}{did_you_mean(cfg.data, datamodules.names())} "
            f"(there are {', '.join(datamodules.names())})"
        )
    elsewhere = {knob.name for room in (PictureData, Config) for knob in fields(room)} - rare("data_args").keys()
    known = [key for key in datamodules.accepted(cfg.data) if key not in elsewhere]
    check_values(datamodules.data_class(cfg.data).__init__, cfg.data_args, f"--data_args of {cfg.data}", known)
    known = [*(field.name for field in fields(Augment)), *rare("augment_args")]
    check_values(Augment.__init__, cfg.augment_args, "--augment_args", known)
    if cfg.logger == "tensorboard" and find_spec("tensorboard") is None:
        raise UsageError("--logger tensorboard needs a package that is not there: pip install tensorboard")
    losses.check_values(cfg.loss_args)  # the number of outputs follows from them


def unfit(cfg: Config, data: PictureData) -> list[str]:
    """Problems of the data with what is asked for."""
    problems = ["--patience watches val, and these data have no val split"] * bool(
        cfg.patience and not data.sizes["val"]
    )
    if (cfg.average_checkpoints or "").startswith("best") and not data.sizes["val"]:
        problems.append(
            f"--average_checkpoints {cfg.average_checkpoints} chooses by val, and these data have no val split: "
            f"last-5, for example"
        )
    if not cfg.eval_only and not data.sizes["train"]:
        problems.append(f"{data.data_dir} has no train folder: --eval_only --init PATH scores it")
    elif not cfg.eval_only and data.task == "classification" and data.spec["num_outputs"] < 2:
        problems.append(
            f"{data.data_dir} has the single class {data.spec['class_names'][0]}: nothing can be learned from it"
        )
    if cfg.teacher and (flags := [flag for flag in ("input_columns", "aux_targets") if getattr(data, flag, None)]):
        problems.append(
            f"--data_args.{flags[0]} does not go with --teacher, which learns and is asked by pictures only"
        )
    try:
        chosen = metrics.find(cfg.metric or getattr(data, "metric_name", None), data.task)
        targets = next((data.splits[name].targets for name in ("val", "test", "train") if data.sizes.get(name)), ())
        if chosen.name not in metrics.METRICS and len(targets):
            metrics.attempt(chosen, data.spec, targets)
    except ValueError as error:
        problems.append(str(error))
    return problems


def for_task(cfg: Config, data: PictureData) -> Config:
    """Fill loss, metric and smoothing of the task; the default smoothing does not apply to a regression."""
    off = data.task == "regression" and cfg.label_smoothing == Config.label_smoothing
    cfg = replace(cfg, label_smoothing=0.0) if off else cfg
    return cfg.filled(loss=losses.default(data.task), metric=getattr(data, "metric_name", None))


def unlearnable(cfg: Config, spec: Spec) -> list[str]:
    """Problems of loss, optimizer and distillation with their settings."""
    problems, task = [], spec["task"]
    of_classes = partial(
        losses.check_loss,
        cfg.loss,
        smoothing=cfg.label_smoothing,
        mixing=bool(cfg.mixup or cfg.cutmix),
        num_outputs=spec["num_outputs"],
    )
    for check in (
        partial(losses.create, cfg.loss, spec, cfg.label_smoothing, **cfg.loss_args),
        *([of_classes] if task == "classification" else []),
        partial(check_optimizer, cfg.optimizer, cfg.optimizer_args),
        *([partial(_check_distill, cfg, task)] if cfg.teacher else []),
    ):
        try:
            check()
        except ValueError as error:
            problems.append(str(error))
    return problems


def _check_distill(cfg: Config, task: str) -> None:
    """Check the distillation loss and its keywords. Raises ValueError."""
    entry, hyper = distill_losses.check_name(cfg.distill, task), dict(cfg.distill_args)
    distill_losses.weights(cfg.distill, hyper.pop("alpha", None))
    distill_losses.check_warmup(hyper.pop("warmup_epochs", 0))
    sources = [source.strip() for source in cfg.teacher.split(",")]
    caches = [source for source in sources if cached_teacher.is_cache(source)]
    if entry.on_features and len(sources) > 1:
        raise ValueError(f"--distill {cfg.distill} compares the features of one teacher, not of several")
    if caches and len(sources) > 1:
        raise ValueError(
            f"--teacher {caches[0]} is a cache and stands alone: prepare.py teacher makes one of several teachers "
            f"together"
        )
    if caches and cfg.folds and cfg.fold is None:
        raise ValueError(
            f"--teacher {caches[0]} is a cache of answers to the rows that one fold trains on: --fold I names it, and "
            f"each fold has a "
            "cache of its own"
        )
    if caches and entry.on_features:
        raise ValueError(
            f"--distill {cfg.distill} compares features, and the cache {caches[0]} holds logits: give the teacher "
            f"itself"
        )
    if caches and cfg.teacher_init:
        raise ValueError(f"--teacher_init is for a model's name; --teacher {caches[0]} is a cache of its answers")
    distill_losses.create(cfg.distill, task, (1, 1), **hyper)


def check_network(meta: nn.Module, cfg: Config, data: PictureData) -> None:
    """Check the network on the meta device: every size of training crops, attention maps. Raises UsageError."""
    _check_train_sizes(meta, cfg, data)
    if cfg.logger_args.get("attention") and (problems := attention_maps.no_maps(meta, data, cfg.size)):
        raise UsageError("\n".join(problems))


def check_pass(meta: nn.Module, cfg: Config, data: PictureData) -> None:
    """Check that batch norm sees more than one value of a channel in a training pass. Raises UsageError."""
    pictures = cfg.global_batch_size // forecast.world_size(cfg) // data.accumulation(forecast.world_size(cfg))
    if (
        cfg.eval_only
        or pictures > 1
        or not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in meta.modules())
    ):
        return
    if cfg.freeze:
        freeze(meta, cfg.freeze)
    hold_frozen(meta.train())
    try:
        for height, width in sorted({*data.train_sizes}):
            meta(torch.zeros(1, 3, height, width, device="meta"))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UsageError(
            f"--micro_batch_size {pictures}: a pass of one picture (--global_batch_size {cfg.global_batch_size} over "
            f"{forecast.world_size(cfg)} processes) gives the batch norm of {cfg.model} one value of a channel, and "
            f"no spread: at least 2"
        ) from None


def _check_train_sizes(meta: nn.Module, cfg: Config, data: PictureData) -> None:
    """Check that the network takes the sizes of --augment_args.train_size. Raises UsageError."""
    if cfg.train_size is None or cfg.eval_only:
        return
    try:
        if hasattr(meta, "set_any_size"):
            meta.set_any_size()
        for height, width in sorted({*data.train_sizes}):
            meta(torch.zeros(2, 3, height, width, device="meta"))
    except (ValueError, AssertionError, RuntimeError) as error:
        hint = (
            "; timm's plain transformers take --model_args.dynamic_img_size true"
            if cfg.model.startswith("timm/")
            else ""
        )
        why = str(error).splitlines()[0] + hint
        raise UsageError(f"--augment_args.train_size {cfg.train_size}: {cfg.model} does not take it: {why}") from None


def with_warmup(cfg: Config, alone: Config, steps: int) -> tuple[Config, Config, list[str]]:
    """Replace a recipe's warm-up that is longer than the run by the default, with a note. Raises UsageError for a typed
    one."""
    if (cfg.warmup_steps or 0) <= steps:
        return cfg, alone, []
    if cfg.warmup_steps != alone.warmup_steps:
        raise UsageError(f"--warmup_steps {cfg.warmup_steps} is more than the run's {steps} steps")
    note = (
        f"warm-up: the recipe's {cfg.warmup_steps} steps are more than the run's {steps}; a tenth of the epochs instead"
    )
    return replace(cfg, warmup_steps=None), replace(alone, warmup_steps=None), [note]


def with_layer_decay(cfg: Config, alone: Config, model: nn.Module, given: bool) -> tuple[Config, Config, list[str]]:
    """Adapt the layer decay of a general recipe, meant for 12 blocks, to the depth of the network, with a note.

    A value that is `given` by flag or file, or by a recipe for one model, stays.
    """
    if alone.layer_decay is None or recipe_model(cfg.recipe):
        return cfg, alone, []
    factor, layers = for_depth(alone.layer_decay, model)
    if factor == alone.layer_decay:
        return cfg, alone, []
    note = (
        f"layer_decay {factor:.4g}: the recipe's {alone.layer_decay:g} is for {PLAIN_DEPTH} layers and {cfg.model} "
        f"has {layers}"
    )
    return (
        cfg if given else replace(cfg, layer_decay=factor),
        replace(alone, layer_decay=factor),
        [] if given else [note],
    )


def _loading(cfg: Config, data: PictureData) -> list[str]:
    """A line on cores and workers of a rank; a warning where they are too few for a GPU."""
    if data.in_memory:
        return []
    share, workers = cores(cfg.devices), worker_count(cfg.workers, False, cfg.devices)
    line = (
        f"loading with {counted(workers, 'worker')} on {counted(share, 'core')}"
        + f", for each of {cfg.devices} processes" * (cfg.devices > 1)
    )
    if forecast.on_gpu(cfg) and min(max(workers, 1), share) < FEW_WORKERS and data.cache is None:
        line += (
            f": a core decodes about {DECODED_PER_SECOND} pictures of ImageNet's size a second, and a GPU may wait: "
            f"more cores "
            "(srun --cpus-per-task, the container's quota), more --workers, or --cache_dir"
        )
    return [line]


def advice(cfg: Config, data: PictureData, meta: nn.Module) -> list[str]:
    """Lines on settings that are allowed but perhaps not intended."""
    if cfg.eval_only:
        return data.notes()
    lines, steps = [*data.notes(), *_loading(cfg, data)], cfg.epochs * data.steps_per_epoch
    if uses_ema(cfg.ema_decay, cfg.use_ema) and cfg.ema_decay < 1 and steps < 5 / (1 - cfg.ema_decay):
        lines.append(
            f"ema_decay {cfg.ema_decay:g} looks back over {1 / (1 - cfg.ema_decay):.0f} of only {steps} steps, so its "
            f"weights stay near the "
            f"first ones: --ema_decay {max(0.0, 1 - 10 / steps):.4g}, or --use_ema false"
        )
    if cfg.average_checkpoints and int(cfg.average_checkpoints.split("-")[1]) > cfg.epochs:
        lines.append(
            f"average_checkpoints {cfg.average_checkpoints}: there are only {cfg.epochs} epochs, and all are averaged"
        )
    if cfg.freeze and not cfg.init:
        lines.append(f"freeze {cfg.freeze}: without --init the frozen layers keep their random first values")
    if isinstance(meta.get_classifier(), tuple) and (not cfg.teacher or distill_losses.LOSSES[cfg.distill].on_features):
        how = (
            f"--distill {cfg.distill} compares what lies before the heads"
            if cfg.teacher
            else f"{cfg.model} without --teacher"
        )
        lines.append(f"{how}: the mean of its two heads learns the labels")
    return lines
