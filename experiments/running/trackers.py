"""Loggers of a run: metrics.csv always, and the tracker of --logger."""

import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only

from experiments import export
from experiments.cli.checks import tags
from experiments.folds import directories
from experiments.running import forecast, objects, run_directory
from experiments.running.build import Run
from lightning_modules.callbacks.signals import PREEMPTED
from lightning_modules.loggers.csv_logger import History
from lightning_modules.loggers.messages import warn
from lightning_modules.loggers.wandb_local import id_of_agent, own_id
from models import cost

PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "timm", "wandb", "numpy")


def loggers(run: Run) -> list[Any]:
    cfg, found = run.cfg, [History(run.folder / "metrics.csv")]
    if cfg.logger == "wandb":
        found.append(_wandb(run))
    elif cfg.logger == "tensorboard":
        from lightning_modules.loggers.tensorboard_logger import TensorBoard  # its package is an extra

        found.append(TensorBoard(run.folder, about(run)))
    return found


def _wandb(run: Run, identity: str | None = None) -> Any:
    from lightning_modules.loggers.wandb_logger import SafeWandbLogger  # wandb: a second, where it is asked for

    name, group = directories.name_and_group(run.folder, run.cfg)
    return SafeWandbLogger(
        run.folder,
        identity=identity,
        config=about(run),
        name=name,
        group=group,
        tags=tags(run.cfg.tags),
        notes=run.cfg.notes,
    )


def tell_agent(run: Run) -> None:
    """Write a finished run into the W&B run of a sweep's agent that asked for the same again: its rows and its result.
    The run directory keeps the W&B run that it was trained under."""
    identity = id_of_agent()
    if run.cfg.logger != "wandb" or rank_zero_only.rank or identity in (None, own_id(run.folder)):
        return
    print(f"the sweep's run {identity} in W&B is told its rows and result", flush=True)
    tracker = _wandb(run, identity)
    tracker.cut(sys.maxsize)
    tracker.summarise(run_directory.result(run.folder))
    tracker.close(0)


def about(run: Run) -> dict[str, Any]:
    """What a tracker is told of a run once: its config, what the network costs, on what code and machine it runs."""
    cfg = run.cfg
    return {
        **run_directory.plain(cfg),
        "params": cost.parameters(run.model),
        "gmacs": round(objects.gmacs(run.cfg, run.data.spec), 4),
        "commit": run_directory.commit(),
        "version": run_directory.version(),
        "world_size": forecast.world_size(cfg),
        "device": torch.cuda.get_device_name() if forecast.on_gpu(cfg) else platform.processor() or "cpu",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def conclude(run: Run, trainer: L.Trainer, values: dict[str, Any]) -> None:
    """Tell the tracker the result and, where asked, give it the weights."""
    for tracker in trainer.loggers[1:]:
        tracker.summarise(values)
        if run.cfg.logger_args.get("checkpoint"):
            try:
                weights = export.export(run.folder, use_ema=run.cfg.use_ema)
            except (OSError, ValueError, RuntimeError) as error:
                warn(f"the weights are not uploaded: {error}")
                continue
            tracker.upload(weights, values)


def close(trainer: L.Trainer, code: int) -> None:
    """End the tracker's run with its state, by the exit code of the process."""
    for tracker in trainer.loggers[1:]:
        tracker.close(code)


def over_folds(folder: Path, values: dict[str, Any]) -> None:
    """One W&B run more for what the folds say together: the config of the directory over them, the result in the
    summary."""
    cfg = run_directory.stored(folder)
    if cfg.get("logger") != "wandb":
        return
    try:
        config = {**cfg, "params": values["params"], "commit": values["commit"]}
        from lightning_modules.loggers.wandb_logger import SafeWandbLogger

        tracker = SafeWandbLogger(
            folder, config=config, group=folder.name, job_type="folds", tags=tags(cfg["tags"]), notes=cfg["notes"]
        )
        tracker.summarise(values)
        tracker.close(0 if values["finished"] else PREEMPTED)
    except Exception as error:  # the folds are merged, whatever a tracker says
        warn(f"W&B has no run over all folds ({type(error).__name__}: {str(error)[:120]})")
