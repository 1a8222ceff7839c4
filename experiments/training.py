"""How a run learns: the task and the trainer that its config describes."""
from functools import partial
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.callbacks import EarlyStopping

from experiments import plan, run_page, rundir
from experiments.build import Run
from experiments.config import Config
from lightning_modules import distill_losses, ema
from lightning_modules.averaging import Averaging
from lightning_modules.checkpoints import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint
from lightning_modules.distiller import Distill
from lightning_modules.history import History
from lightning_modules.losses import LOSSES
from lightning_modules.meter import Meter, Progress
from lightning_modules.optim import optimizer
from lightning_modules.predictions import Predictions
from lightning_modules.preemption import Preemption
from lightning_modules.schedules import SCHEDULES
from lightning_modules.seen import Seen
from lightning_modules.task import Classify
from lightning_modules.tracking import SafeWandbLogger
from models import cost


def task(run: Run) -> Classify:
    cfg, per_epoch = run.cfg, run.data.steps_per_epoch
    warmup = cfg.warmup_steps
    if warmup is None:
        epochs = min(5.0, cfg.epochs / 10) if cfg.warmup_epochs is None else cfg.warmup_epochs
        warmup = round((round(epochs) if cfg.schedule in ("timm", "deit") else epochs) * per_epoch)  # those move once an epoch
    schedule = partial(SCHEDULES[cfg.schedule], peak=cfg.lr, min_lr=cfg.min_lr, warmup_lr=cfg.warmup_lr, warmup_steps=warmup,
                       total_steps=cfg.epochs * per_epoch, steps_per_epoch=per_epoch)
    make_optimizer = partial(optimizer, name=cfg.optimizer, lr=cfg.lr, weight_decay=cfg.weight_decay, layer_decay=cfg.layer_decay,
                             head_lr_scale=cfg.head_lr_scale, **cfg.optimizer_args)
    build = Classify
    if run.teacher is not None:
        hyper = {key: value for key, value in cfg.distill_args.items() if key != "alpha"}
        widths = (run.model.head_hidden_size, run.teacher.width) if distill_losses.LOSSES[cfg.distill].on_features else None
        build = partial(Distill, teacher=run.teacher, distill=distill_losses.create(cfg.distill, run.data.spec["task"], widths, **hyper),
                        weights=distill_losses.weights(cfg.distill, cfg.distill_args.get("alpha")))
    made = build(run.model, run.data.spec, rundir.plain(cfg), loss=partial(LOSSES[cfg.loss], smoothing=cfg.label_smoothing),
                 schedule=schedule, make_optimizer=make_optimizer, seed=cfg.seed)
    made.monitor = monitor(cfg)
    return made


def monitor(cfg: Config) -> str:
    """The metric that chooses the best epoch."""
    return ema.MONITOR if ema.uses_ema(cfg.ema_decay, cfg.use_ema) else Classify.monitor


def trainer(run: Run) -> L.Trainer:
    cfg, checkpoints = run.cfg, run.folder / "checkpoints"
    meter = Meter(cfg.global_batch_size, cfg.log_every_steps)
    callbacks = [meter, Progress(meter, cfg.epochs * run.data.steps_per_epoch, cfg.epochs),
                 Predictions(run.folder, run.data.spec["class_names"])]
    if not cfg.eval_only:  # before those that save
        callbacks += [ema.Ema(cfg.ema_decay)] if cfg.ema_decay is not None else []
        callbacks += [Averaging(checkpoints, cfg.average_checkpoints, monitor(cfg), Classify.mode, ema.uses_ema(cfg.ema_decay, cfg.use_ema))] \
            if cfg.average_checkpoints else []
    callbacks += [Seen(partial(run_page.write, run, "training"), run.data.spec)] if not cfg.eval_only else []
    callbacks += [Preemption(checkpoints / "last.ckpt"), LastCheckpoint(checkpoints, cfg.save_every_steps)]
    if run.data.sizes["val"]:
        callbacks.append(BestCheckpoint(checkpoints, monitor(cfg), Classify.mode))
        if cfg.patience:
            callbacks.append(EarlyStopping(monitor(cfg), mode=Classify.mode, patience=cfg.patience))
    world, passes = plan.world_size(cfg), 1
    if not cfg.eval_only:
        passes = run.data.accumulation(world)
    plugins: list[Any] = [AtomicCheckpointIO(passes)]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # Preemption does it, at a step's end
    return L.Trainer(
        **plan.placement(cfg), max_epochs=cfg.epochs, accumulate_grad_batches=passes, gradient_clip_val=cfg.clip_grad,
        gradient_clip_algorithm=cfg.clip_mode, logger=loggers(run), callbacks=callbacks, plugins=plugins,
        default_root_dir=run.folder, num_sanity_val_steps=0, use_distributed_sampler=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1)  # the Meter decides when


def loggers(run: Run) -> list[Any]:
    cfg, found = run.cfg, [History(run.folder / "metrics.csv")]
    if cfg.logger == "wandb":
        config = {**rundir.plain(cfg), "params": cost.parameters(run.model), "commit": rundir.commit()}
        found.append(SafeWandbLogger(run.folder, config=config))
    return found
