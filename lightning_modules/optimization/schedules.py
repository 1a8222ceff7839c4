"""Learning rates as pure functions of the 0-based optimizer step: the published trainers' schedules, each with its own
off-by-one.

All take `peak`, `min_lr`, `warmup_lr` (the rate a warm-up starts from), `warmup_steps`, `total_steps` and
`steps_per_epoch`, and return the rate of `step`. Past the last step the rate is `min_lr`; a run shorter than its
warm-up ends within it.
"""

import math
from collections.abc import Callable
from typing import Any


def _cosine(progress: float, peak: float, min_lr: float) -> float:
    return min_lr + (peak - min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def cosine(
    step: int,
    *,
    peak: float,
    min_lr: float,
    warmup_lr: float,
    warmup_steps: int,
    total_steps: int,
    steps_per_epoch: int,
) -> float:
    """Per step: linear from `warmup_lr` to `peak`, then half a cosine over the steps left.

    As timm's CosineLRScheduler per update with `warmup_prefix`; with `warmup_lr` = `min_lr` = 0 as big_vision
    (utils.py:1113-1138).
    """
    if step < warmup_steps:
        return warmup_lr + (peak - warmup_lr) * step / warmup_steps
    return _cosine((step - warmup_steps) / max(1, total_steps - warmup_steps), peak, min_lr)


def timm(
    step: int,
    *,
    peak: float,
    min_lr: float,
    warmup_lr: float,
    warmup_steps: int,
    total_steps: int,
    steps_per_epoch: int,
) -> float:
    """Per epoch, the default of timm's train.py: the cosine runs from epoch 0 on, beneath the warm-up, so that it
    starts below `peak`."""
    epoch, warmup_epochs = step // steps_per_epoch, warmup_steps / steps_per_epoch
    if epoch < warmup_epochs:
        return warmup_lr + (peak - warmup_lr) * epoch / warmup_epochs
    return _cosine(epoch * steps_per_epoch / max(1, total_steps), peak, min_lr)


def deit(step: int, *, steps_per_epoch: int, **settings: Any) -> float:
    """`timm` one epoch late, as DeiT sets the rate of an epoch after it (main.py:432): epochs 0 and 1 run at
    `warmup_lr`."""
    return timm(max(0, step - steps_per_epoch), steps_per_epoch=steps_per_epoch, **settings)


def swin(step: int, **settings: Any) -> float:
    """`cosine` one step late, as Swin sets the rate of a step after it (main.py:205): steps 0 and 1 run at
    `warmup_lr`."""
    return cosine(max(0, step - 1), **settings)


def convnext(
    step: int,
    *,
    peak: float,
    min_lr: float,
    warmup_lr: float,
    warmup_steps: int,
    total_steps: int,
    steps_per_epoch: int,
) -> float:
    """ConvNeXt's `cosine_scheduler` (utils.py:428-445): the warm-up includes both its ends, so `peak` is the rate of
    two steps."""
    if step < warmup_steps:
        return warmup_lr + (peak - warmup_lr) * step / max(1, warmup_steps - 1)
    return cosine(
        step,
        peak=peak,
        min_lr=min_lr,
        warmup_lr=warmup_lr,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
    )


def warmup_length(
    schedule: str, epochs: float, steps_per_epoch: int, *, warmup_epochs: float | None, warmup_steps: int | None
) -> int:
    """Optimizer steps of the warm-up. With neither length given it is a tenth of the epochs, 5 at most.

    `timm` and `deit` change the rate once an epoch, so their warm-up is whole epochs.
    """
    if warmup_steps is not None:
        return warmup_steps
    length = min(5.0, epochs / 10) if warmup_epochs is None else warmup_epochs
    return round((round(length) if schedule in ("timm", "deit") else length) * steps_per_epoch)


def later(step: int, *, schedule: Callable[[int], float], start: int) -> float:
    """A schedule that begins at step `start`; not for steps before."""
    return schedule(step - start)


SCHEDULES: dict[str, Callable[..., float]] = {
    "cosine": cosine,
    "timm": timm,
    "deit": deit,
    "swin": swin,
    "convnext": convnext,
}
