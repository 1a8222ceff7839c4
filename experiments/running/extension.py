"""`--extend RUN`: a finished run trained longer. Its full state goes on; the schedule runs once more, over the epochs
that are added."""

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from experiments.cli.errors import UsageError
from experiments.config import Config
from experiments.running import run_directory
from lightning_modules.optimization.schedules import warmup_length


def extended(cfg: Config, steps_per_epoch: int, chosen: Collection[str]) -> tuple[Config, list[str]]:
    """The config with the step that the added part starts at (`extend_step`), and lines on it. A run directory that has
    begun keeps its own. A recipe's warm-up that takes all that is added gives way to a tenth of it.

    Raises UsageError for a run that is not finished or has as many epochs already, and for such a warm-up that is
    `chosen`.
    """
    if not cfg.extend:
        return cfg, []
    own = {} if cfg.overwrite else run_directory.stored(cfg.folder)
    step = cfg.extend_step or own.get("extend_step") or _steps_done(cfg)
    done, added = step / steps_per_epoch, cfg.epochs - step / steps_per_epoch
    if added <= 0:
        raise UsageError(
            f"--extend {cfg.extend} has {done:g} epochs done, and --epochs {cfg.epochs} is the whole: give more"
        )
    cfg = replace(cfg, extend_step=step)
    notes = [
        f"extend {cfg.extend}: {done:g} epochs done, {added:g} added; the rate rises to {cfg.lr:g} once more and "
        f"falls to {cfg.min_lr:g}"
    ]
    if warmup_steps(cfg, steps_per_epoch) >= added * steps_per_epoch:
        if {"warmup_epochs", "warmup_steps"} & {*chosen}:
            raise UsageError(f"--extend {cfg.extend}: {added:g} epochs are added, and the warm-up takes as long")
        cfg = replace(cfg, warmup_epochs=None, warmup_steps=None)
        notes.append("warm-up: the recipe's takes all that is added; a tenth of it instead")
    return cfg, notes


def warmup_steps(cfg: Config, steps_per_epoch: int) -> int:
    """Warm-up steps of the run, or of the added part. Default: a tenth of its epochs, at most 5."""
    epochs = cfg.epochs - (cfg.extend_step / steps_per_epoch if cfg.extend_step else 0)  # an evaluation has no steps
    return warmup_length(
        cfg.schedule, epochs, steps_per_epoch, warmup_epochs=cfg.warmup_epochs, warmup_steps=cfg.warmup_steps
    )


def _steps_done(cfg: Config) -> int:
    folder = Path(str(cfg.extend))
    if not run_directory.stored(folder):
        raise UsageError(f"--extend {folder}: there is no run directory")
    if os.path.realpath(folder) == os.path.realpath(cfg.folder):
        raise UsageError(f"--extend {folder} is another run: it needs a --name of its own")
    result = run_directory.result(folder)
    if not (result.get("finished") and result.get("steps")):
        raise UsageError(f"--extend {folder} is no finished training; its own command goes on with it")
    return result["steps"]
