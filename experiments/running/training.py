"""The task and the trainer that the config of a run describes."""

from dataclasses import fields
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping

import lightning_modules
from experiments.reporting import run_page
from experiments.running import forecast, run_directory, trackers
from experiments.running.build import Run
from experiments.running.teacher_score import TeacherScore
from lightning_modules.callbacks import ema
from lightning_modules.callbacks.averaging import Averaging
from lightning_modules.callbacks.checkpoints import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint
from lightning_modules.callbacks.first_images import FirstImagesCallback
from lightning_modules.callbacks.meter import DataWaitProfiler, Meter
from lightning_modules.callbacks.predictions import Predictions
from lightning_modules.callbacks.preemption import Preemption
from lightning_modules.callbacks.progress import Progress
from lightning_modules.factory import OF_RUNS
from lightning_modules.knobs import Learning
from lightning_modules.objectives import metrics
from lightning_modules.task import Task
from lightning_modules.teachers.cached_teacher import CachedTeacher
from models import cost


def task(run: Run) -> Task:
    """The LightningModule of a run; its checkpoints keep the whole config."""
    cfg = run.cfg
    learning = {each.name: getattr(cfg, each.name) for each in fields(Learning) if each.name not in OF_RUNS}
    return lightning_modules.create(
        run.model,
        run.data,
        run.teacher,
        start_step=cfg.extend_step or 0,
        config=run_directory.plain(cfg),
        epochs=cfg.epochs,
        seed=cfg.seed,
        label_smoothing=cfg.label_smoothing,
        metric=cfg.metric,
        **learning,
        **({"distill": cfg.distill, "distill_args": cfg.distill_args} if run.teacher is not None else {}),
    )


def metric(run: Run) -> metrics.Metric:
    """The metric that chooses the best epoch: --metric, the data set's own, or the task's default."""
    return metrics.find(run.cfg.metric or getattr(run.data, "metric_name", None), run.data.task)


def monitor(run: Run) -> str:
    """The logged name of that metric, for the weights that are chosen (`val_ema/...` for averaged ones)."""
    return f"{ema.STAGE if ema.uses_ema(run.cfg.ema_decay, run.cfg.use_ema) else 'val'}/{metric(run).name}"


def trainer(run: Run) -> L.Trainer:
    cfg, checkpoints = run.cfg, run.folder / "checkpoints"
    watched, mode = monitor(run), metric(run).mode
    waits = DataWaitProfiler()
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
    callbacks += (
        [FirstImagesCallback(partial(run_page.write, run, "training"), run.data.spec)] if not cfg.eval_only else []
    )
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
