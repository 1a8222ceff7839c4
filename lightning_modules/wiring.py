"""Learning knobs as plain data -> the loss, schedule, optimizer and metric of a task."""

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import Any

from lightning_modules.knobs import Learning
from lightning_modules.objectives import losses, metrics
from lightning_modules.optimization.optimizers import optimizer
from lightning_modules.optimization.schedules import SCHEDULES, later, warmup_length
from models.spec import Spec


def defaults() -> dict[str, Any]:
    """The default of every learning knob, those of the data module included."""
    learning = Learning()
    shared = {"epochs": 100, "seed": 0, "label_smoothing": 0.0, "metric": None}
    return {each.name: getattr(learning, each.name) for each in fields(Learning)} | shared


def wire(knobs: Mapping[str, Any], spec: Spec, steps_per_epoch: int | None, start_step: int = 0) -> dict[str, Any]:
    """The keyword arguments of `Task` beside network, specification and config.

    Args:
        knobs: every learning knob (lightning_modules/knobs.py).
        spec: the data's specification.
        steps_per_epoch: optimizer steps; None where it is not known, then the task cannot be trained.
        start_step: optimizer step at which the schedule begins.

    Raises ValueError for a loss, metric or keyword that does not fit the task.
    """
    schedule = _untrainable if steps_per_epoch is None else _schedule(knobs, steps_per_epoch, start_step)
    loss = knobs["loss"] or losses.default(spec["task"])
    return {
        "loss": losses.create(loss, spec, knobs["label_smoothing"], **knobs["loss_args"]),
        "schedule": schedule,
        "make_optimizer": partial(
            optimizer,
            name=knobs["optimizer"],
            lr=knobs["lr"],
            weight_decay=knobs["weight_decay"],
            layer_decay=knobs["layer_decay"],
            head_lr_scale=knobs["head_lr_scale"],
            **knobs["optimizer_args"],
        ),
        "seed": knobs["seed"],
        "metric": metrics.find(knobs["metric"], spec["task"]),
        "clip_grad": knobs["clip_grad"],
        "clip_mode": knobs["clip_mode"],
        "ema_decay": knobs["ema_decay"],
    }


def _schedule(knobs: Mapping[str, Any], steps_per_epoch: int, start_step: int) -> partial[float]:
    """Optimizer step (0-based) -> learning rate."""
    schedule = partial(
        SCHEDULES[knobs["schedule"]],
        peak=knobs["lr"],
        min_lr=knobs["min_lr"],
        warmup_lr=knobs["warmup_lr"],
        steps_per_epoch=steps_per_epoch,
        warmup_steps=warmup_length(
            knobs["schedule"],
            knobs["epochs"] - (start_step / steps_per_epoch if start_step else 0),
            steps_per_epoch,
            warmup_epochs=knobs["warmup_epochs"],
            warmup_steps=knobs["warmup_steps"],
        ),
        total_steps=knobs["epochs"] * steps_per_epoch - start_step,
    )
    return partial(later, schedule=schedule, start=start_step) if start_step else schedule


def _untrainable(step: int) -> float:
    raise ValueError(
        "this task comes from a checkpoint that does not hold the steps of an epoch: to train its network further, "
        "build a task with lightning_modules.create(task.model, data, epochs=...)"
    )
