"""A training whose loss, gradients or weights are not finite ends, on all ranks at once, before anything of it is saved
or scored."""

import os
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.nn.utils import get_total_norm

from models.pretrained import not_finite

STEPS = 50  # at most, between two looks at the device
ROWS = 5  # that are named
NONE = 2**62  # more than any step


class NotFinite(RuntimeError):
    """A value is NaN or infinite; the message has its name and step, the same on all ranks."""


def gradient_norm(trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> Tensor | None:
    """The L2 norm of all gradients, a scalar on the device; None where each rank holds a part of the network."""
    if type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy):
        return None
    with torch.no_grad():
        return get_total_norm(
            [each.grad for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
        )


class Finite(Callback):
    """Raises NotFinite for the first step whose loss or gradient norm is NaN or infinite, and for such weights.

    A step only keeps its scalars and rows on the device. They are read every 50 steps, at an epoch's end and before
    every save; so are the weights, buffers and averaged weights at an epoch's end and before a save. With a gradient
    scaler (fp16) infinite gradients are ordinary: it leaves their step out.
    """

    def __init__(self) -> None:
        self.step = 0
        self.norm: Tensor | None = None
        self.passes: list[tuple[Tensor, Tensor | None]] = []  # of the step that is under way: loss, rows (B,)
        self.steps: list[
            tuple[int, list[tuple[Tensor, Tensor | None]], Tensor | None]
        ] = []  # step from 1, its passes, norm; not read yet
        self.sound: tuple[int, float, float | None] | None = None  # the last step read: its number, loss and norm

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step, self.passes, self.steps = trainer.global_step, [], []

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.norm = gradient_norm(trainer, optimizer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        undo = trainer.accumulate_grad_batches  # by which Lightning has divided the loss
        self.passes.append((outputs["loss"].detach() * undo, batch.get("index")))
        if trainer.global_step != self.step:
            self.step = trainer.global_step
            self.steps.append((self.step, self.passes, self.norm))
            self.passes, self.norm = [], None
        if trainer.is_last_batch or len(self.steps) >= STEPS:
            self.check(trainer, pl_module, weights=trainer.is_last_batch)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.check(trainer, pl_module, weights=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.check(trainer, pl_module, weights=True)

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule, *, weights: bool) -> None:
        """Look at the steps since the last look, and at the weights. A collective. Raises NotFinite on all ranks."""
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        steps, self.steps = self.steps, []
        losses = _read([[loss for loss, _ in passes] for _, passes, _ in steps])
        norms = _read([[norm] for *_, norm in steps if norm is not None])  # of all steps or of none
        judged = [each + (norms[place] if norms and not scaled else []) for place, each in enumerate(losses)]
        first = next((place for place, values in enumerate(judged) if not _finite(values)), None)
        broken = (
            [
                name
                for each in (pl_module, getattr(pl_module, "ema", None))
                if each is not None
                for name in not_finite(each.state_dict())
            ]
            if weights
            else []
        )
        own = torch.tensor(
            [NONE if first is None else steps[first][0], 0 if broken else 1], device=trainer.strategy.root_device
        )
        step, whole = trainer.strategy.reduce(own, reduce_op="min").tolist()
        sound = [
            (number, sum(losses[place]) / len(losses[place]), norms[place][0] if norms else None)
            for place, (number, *_) in enumerate(steps)
            if number < step
        ]
        self.sound = sound[-1] if sound else self.sound
        if step == NONE and whole:
            return
        found: Any = None
        if step == NONE:
            found = f"{broken[0]} ({len(broken)} tensors are not finite)" if broken else None
        elif first is not None and steps[first][0] == step:
            found = _found(steps[first][1], losses[first], norms[first][0] if norms else None)
        self.steps = []
        raise NotFinite(
            self._message(
                trainer,
                pl_module,
                min(step, trainer.global_step),
                _first_of_ranks(found, trainer.world_size),
                step == NONE,
            )
        )

    def _message(self, trainer: L.Trainer, pl_module: Any, step: int, found: Any, of_weights: bool) -> str:
        where = f"step {step} (epoch {trainer.current_epoch + 1})"
        if of_weights:
            line = f"the weights are not finite after {where}: {found}"
        else:
            what, value, rows = found
            line = f"the {what} is {value} at {where}{_rows(trainer, rows)}"
        if self.sound is None:
            return f"{line}; no loss before was finite, learning rate {pl_module.schedule(step - 1):.4g}"
        number, loss, norm = self.sound
        return (
            f"{line}; the last finite loss was {loss:.5g} at step {number}, with learning rate "
            f"{pl_module.schedule(number - 1):.4g}" + (f" and gradient norm {norm:.4g}" if norm is not None else "")
        )


def _read(values: list[list[Tensor]]) -> list[list[float]]:
    """Numbers of scalars on the device, (steps, passes), in one copy."""
    if not values:
        return []
    numbers = iter(torch.stack([value.float() for each in values for value in each]).tolist())
    return [[next(numbers) for _ in each] for each in values]


def _finite(values: list[float]) -> bool:
    return all(abs(value) < float("inf") for value in values)


def _found(
    passes: list[tuple[Tensor, Tensor | None]], losses: list[float], norm: float | None
) -> tuple[str, float | None, list[int]]:
    """(what is not finite, its value, the rows of its pictures): of the passes whose loss is not finite, else of all of
    the step."""
    bad = [place for place, value in enumerate(losses) if not _finite([value])]
    index = [passes[place][1] for place in bad or range(len(losses))]
    rows = [row for each in index if each is not None for row in each.tolist()]
    return ("loss", losses[bad[0]], rows) if bad else ("gradient norm", norm, rows)


def _first_of_ranks(found: Any, world_size: int) -> Any:
    """The findings of all ranks at the same step as one: the first rank's, with the rows of all that found the same."""
    if world_size == 1:
        return found
    every: list[Any] = [None] * world_size
    dist.all_gather_object(every, found)
    every = sorted((each for each in every if each is not None), key=lambda each: each[0] != "loss")
    if isinstance(every[0], str):
        return every[0]
    what, value, _ = every[0]
    return what, value, [row for each in every if each[0] == what for row in each[2]]


def _rows(trainer: L.Trainer, rows: list[int]) -> str:
    """`, which learns from the rows 3 (train/dark/3.jpg), ... of train`."""
    rows = sorted({*rows})
    if not rows:
        return ""
    split = getattr(getattr(trainer, "datamodule", None), "splits", {}).get("train")
    names = None if split is None else split.names if split.ids is None else split.ids
    named = [str(row) if names is None else f"{row} ({os.fsdecode(names[row])})" for row in rows[:ROWS]]
    more = f" and {len(rows) - ROWS} more" if len(rows) > ROWS else ""
    return f", which learns from the pictures of the rows {', '.join(named)}{more} of train"
