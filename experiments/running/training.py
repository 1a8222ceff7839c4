"""How a run learns: the task and the trainer that its config describes."""

from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping

from experiments.reporting import run_page
from experiments.running import forecast, run_directory, trackers
from experiments.running.build import Run
from experiments.running.extension import warmup_steps
from experiments.running.teacher_score import TeacherScore
from lightning_modules.callbacks import ema
from lightning_modules.callbacks.averaging import Averaging
from lightning_modules.callbacks.checkpoints import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint
from lightning_modules.callbacks.first_images import Seen
from lightning_modules.callbacks.meter import Meter, Waits
from lightning_modules.callbacks.predictions import Predictions
from lightning_modules.callbacks.preemption import Preemption
from lightning_modules.callbacks.progress import Progress
from lightning_modules.distiller import Distill
from lightning_modules.objectives import distill_losses, losses, metrics
from lightning_modules.objectives.aux_targets import Aux
from lightning_modules.optimization.optimizers import optimizer
from lightning_modules.optimization.schedules import SCHEDULES, later
from lightning_modules.task import Task
from lightning_modules.teachers.cached_teacher import CachedTeacher
from models import cost


def task(run: Run) -> Task:
    cfg, per_epoch, start = run.cfg, run.data.steps_per_epoch, run.cfg.extend_step or 0
    schedule = partial(
        SCHEDULES[cfg.schedule],
        peak=cfg.lr,
        min_lr=cfg.min_lr,
        warmup_lr=cfg.warmup_lr,
        steps_per_epoch=per_epoch,
        warmup_steps=warmup_steps(cfg, per_epoch),
        total_steps=cfg.epochs * per_epoch - start,
    )
    schedule = partial(later, schedule=schedule, start=start) if start else schedule
    make_optimizer = partial(
        optimizer,
        name=cfg.optimizer,
        lr=cfg.lr,
        weight_decay=cfg.weight_decay,
        layer_decay=cfg.layer_decay,
        head_lr_scale=cfg.head_lr_scale,
        **cfg.optimizer_args,
    )
    build = Task
    if not cfg.eval_only and getattr(run.data, "aux", None):
        build = partial(Task, aux=Aux(run.model, len(run.data.aux), run.data.aux_weight))
    if run.teacher is not None:
        hyper = {key: value for key, value in cfg.distill_args.items() if key not in distill_losses.SHARED}
        widths = (
            (run.model.head_hidden_size, run.teacher.width) if distill_losses.LOSSES[cfg.distill].on_features else None
        )
        build = partial(
            Distill,
            teacher=run.teacher,
            distill=distill_losses.create(cfg.distill, run.data.spec["task"], widths, **hyper),
            weights=distill_losses.weights(cfg.distill, cfg.distill_args.get("alpha")),
            warmup_epochs=cfg.distill_args.get("warmup_epochs", 0),
        )
    made = build(
        run.model,
        run.data.spec,
        run_directory.plain(cfg),
        schedule=schedule,
        make_optimizer=make_optimizer,
        seed=cfg.seed,
        metric=metric(run),
        loss=losses.create(
            cfg.loss or losses.default(run.data.task), run.data.spec, cfg.label_smoothing, **cfg.loss_args
        ),
    )
    made.monitor = monitor(run)
    return made


def metric(run: Run) -> metrics.Metric:
    """What chooses the best epoch: what was asked for, what the data are known for, or the task's default."""
    return metrics.find(run.cfg.metric or getattr(run.data, "metric_name", None), run.data.task)


def monitor(run: Run) -> str:
    """Its name in the log, of the weights that are chosen."""
    return f"{ema.STAGE if ema.uses_ema(run.cfg.ema_decay, run.cfg.use_ema) else 'val'}/{metric(run).name}"


def trainer(run: Run) -> L.Trainer:
    cfg, checkpoints = run.cfg, run.folder / "checkpoints"
    watched, mode = monitor(run), metric(run).mode
    waits = Waits()
    meter = Meter(
        cfg.global_batch_size,
        cfg.log_every_steps,
        cfg.epochs * run.data.steps_per_epoch,
        waits,
        partial(cost.training_flops, run.model),
    )
    live = run.teacher is not None and not isinstance(run.teacher, CachedTeacher)
    callbacks = [
        *([TeacherScore(run.teacher, cfg.teacher)] if live else []),
        meter,
        Progress(meter, cfg.epochs),
        Predictions(run.folder, run.data.spec, cfg.fold),
    ]
    if not cfg.eval_only:  # before those that save
        callbacks += [ema.Ema(cfg.ema_decay)] if cfg.ema_decay is not None else []
        callbacks += (
            [Averaging(checkpoints, cfg.average_checkpoints, watched, mode, ema.uses_ema(cfg.ema_decay, cfg.use_ema))]
            if cfg.average_checkpoints
            else []
        )
    callbacks += [Seen(partial(run_page.write, run, "training"), run.data.spec)] if not cfg.eval_only else []
    callbacks += [Preemption(checkpoints / "last.ckpt"), LastCheckpoint(checkpoints, cfg.save_every_steps)]
    if run.data.sizes["val"]:
        callbacks.append(BestCheckpoint(checkpoints, watched, mode))
        if cfg.patience:
            callbacks.append(EarlyStopping(watched, mode=mode, patience=cfg.patience, check_finite=False))
    world, passes = forecast.world_size(cfg), 1
    if not cfg.eval_only:
        passes = run.data.accumulation(world)
    plugins: list[Any] = [AtomicCheckpointIO(passes), forecast.environment(cfg)]
    few = {"limit_train_batches": 2 * passes, "max_steps": 2} if cfg.fast_dev_run else {}
    return L.Trainer(
        **forecast.placement(cfg),
        max_epochs=cfg.epochs,
        accumulate_grad_batches=passes,
        gradient_clip_val=cfg.clip_grad,
        gradient_clip_algorithm=cfg.clip_mode,
        logger=trackers.loggers(run),
        callbacks=callbacks,
        plugins=plugins,
        profiler=waits,
        default_root_dir=run.folder,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **few,
    )  # the Meter decides when
