"""Training metrics and throughput of a run, logged as one row at each logging point."""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.nn.utils import get_total_norm

from lightning_modules.callbacks.gpu_peak_flops import device_peak
from lightning_modules.loggers.messages import warn_on_error
from lightning_modules.task import inputs

NEXT_BATCH = "[_TrainingEpochLoop].train_dataloader_next"  # Lightning's name of the wait for a training batch


class DataWaitProfiler(Profiler):
    """Counts the seconds that training waits for its batches, from the events of Lightning's loop."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds, self.since = 0.0, 0.0

    def start(self, action_name: str) -> None:
        if action_name == NEXT_BATCH:
            self.since = time.monotonic()

    def stop(self, action_name: str) -> None:
        if action_name == NEXT_BATCH:
            self.seconds += time.monotonic() - self.since


@dataclass
class Tally:
    """Totals of some optimizer steps on this rank: sums of the training values over `batches` passes, seconds
    of training, of them waited for data, operations."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    batches: int = 0
    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    operations: float = 0.0

    def count(self, values: dict[str, Tensor]) -> None:
        """Add to the sums; nothing is read from the device."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def add(self, other: "Tally") -> None:
        self.count(other.sums)
        for name in ("batches", "steps", "seconds", "waited", "operations"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Meter(Callback):
    """Logs one row every `log_every_steps` optimizer steps of an epoch and one at its end, after validation.

    Training values and throughput of a row are over all ranks and all steps since the row before, those of an epoch's
    last row over the whole epoch, without a synchronisation in between; norms are those of the row's last step, over
    all that is trained, before clipping. Throughput is global and leaves validation and the saves of an epoch's end
    out. Times and sums survive a resume, so that no row tells of a part.

    Args:
        waits: the trainer's profiler.
        flops: inputs of the network (B, ...) -> operations of one picture's training; of a teacher none.
    """

    def __init__(
        self,
        global_batch_size: int,
        log_every_steps: int,
        total_steps: int,
        waits: DataWaitProfiler,
        flops: Callable[..., float],
    ):
        self.global_batch_size, self.log_every_steps, self.total_steps = global_batch_size, log_every_steps, total_steps
        self.waits, self.flops, self.train_seconds = waits, flops, 0.0
        self.known_flops: dict[torch.Size, float] = {}
        self.last_row: dict[str, float] = {}
        self.forget()

    def forget(self) -> None:
        """Begin an epoch."""
        self.row, self.epoch, self.waits.seconds = Tally(), Tally(), 0.0
        self.norms: dict[str, Tensor] = {}

    def _close_row(self) -> Tally:
        """The steps since the last row, which now count into the epoch."""
        row, self.row = self.row, Tally()
        row.waited, self.waits.seconds = self.waits.seconds, 0.0
        self.epoch.add(row)
        return row

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Log in the module's place: a run's trackers have its config, and take one row a logging point."""
        pl_module.uses_self_log = pl_module._log_hyperparams = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step_before, self.mark = (
            trainer.global_step,
            time.monotonic(),
        )  # resumed inside an epoch, that has no on_train_epoch_start
        self.start, self.start_step = self.mark, trainer.global_step
        self.peak = device_peak(trainer.strategy.root_device, trainer.precision)
        for logger in trainer.loggers:
            if hasattr(logger, "cut"):
                logger.cut(trainer.global_step)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.forget()
        self.mark = time.monotonic()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Count what a picture of this size takes, once, and not as training time."""
        shape = batch["image"].shape[2:]
        if trainer.is_global_zero:
            if shape not in self.known_flops:
                began, self.known_flops[shape] = time.monotonic(), 0.0
                with warn_on_error("perf/tflops_per_device"):
                    self.known_flops[shape] = self.flops(*(value[:2] for value in inputs(batch)))
                self.mark += time.monotonic() - began
            self.row.operations += self.known_flops[shape] * len(batch["image"])

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """The norms of the step that a row will tell of; where each rank holds a part of the network, none."""
        due = self.row.steps + 1 >= self.log_every_steps or trainer.is_last_batch
        if not due or type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy):
            return
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        with torch.no_grad():
            self.norms = {
                "optim/grad_norm": get_total_norm([each.grad for each in trained if each.grad is not None]),
                "optim/param_norm": get_total_norm(trained),
            }

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        undo = {"loss": trainer.accumulate_grad_batches}  # by which Lightning has divided it
        self.row.count({name: value.detach() * undo.get(name, 1) for name, value in outputs.items()})
        now = time.monotonic()
        self.row.seconds, self.train_seconds, self.mark = (
            self.row.seconds + now - self.mark,
            self.train_seconds + now - self.mark,
            now,
        )
        self.row.batches += 1
        if trainer.global_step == self.step_before:
            return  # an accumulated pass, no step yet
        self.row.steps, self.step_before = self.row.steps + 1, trainer.global_step
        if self.row.steps == self.log_every_steps and not trainer.is_last_batch:
            self._log(trainer, pl_module, self._close_row(), {})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._log_epoch(
                trainer,
                pl_module,
                {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val")},
            )
            self.mark = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.row.batches or self.epoch.batches:  # there was no validation
            self._log_epoch(trainer, pl_module, {})

    def _log_epoch(self, trainer: L.Trainer, pl_module: L.LightningModule, metrics: dict[str, float]) -> None:
        self._close_row()
        self._log(trainer, pl_module, self.epoch, metrics)
        self.forget()

    def training_row(self, trainer: L.Trainer, of: Tally) -> dict[str, float]:
        """Means of the training values, norms and global throughput of some steps; {} of none."""
        if not of.batches:
            return {}
        row = {f"train/{name}": value / of.batches for name, value in _over_ranks(of.sums, trainer).items()}
        return (
            row
            | {name: float(value) for name, value in self.norms.items()}
            | (self._speed(trainer, of) if of.steps else {})
        )

    def _speed(self, trainer: L.Trainer, of: Tally) -> dict[str, float]:
        """`perf/*`: throughput of all devices, time of a step and its share of waiting on the rank that waits longest,
        operations a second of one device and their share of its peak, largest memory of a rank, hours left. A
        collective."""
        device, seconds = trainer.strategy.root_device, max(of.seconds, 1e-9)
        own = torch.tensor([of.waited / seconds, peak_memory_mb(device)], device=device)
        wait, memory = trainer.strategy.reduce(own, reduce_op="max").tolist()
        row = {
            "perf/images_per_sec": of.steps * self.global_batch_size / seconds,
            "perf/step_seconds": seconds / of.steps,
            "perf/data_wait_share": wait,
            "perf/memory_mb": memory,
            "perf/hours_left": self.seconds_left(trainer) / 3600,
        }
        if of.operations:
            row["perf/tflops_per_device"] = of.operations / seconds / 1e12
            row |= {"perf/mfu": of.operations / seconds / self.peak} if self.peak else {}
        return row

    def seconds_left(self, trainer: L.Trainer) -> float:
        """Estimate the seconds that are left, from the pace since this start or, before its first step, the pace of the
        training so far."""
        done, since = trainer.global_step, trainer.global_step - self.start_step
        pace = (time.monotonic() - self.start) / since if since else self.train_seconds / max(1, done)
        return pace * (self.total_steps - done)

    def _log(self, trainer: L.Trainer, pl_module: Any, of: Tally, metrics: dict[str, float]) -> None:
        lr = pl_module.schedule(trainer.global_step - 1)  # of the last step
        scales = {group.get("lr_scale", 1.0) for group in trainer.optimizers[0].param_groups}
        row = {"epoch": trainer.current_epoch, **self.training_row(trainer, of), **metrics, "lr": lr}
        row |= {f"lr/x{scale:.4g}": lr * scale for scale in sorted(scales - {1.0})}  # groups with a share of the rate
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step)
        self.last_row, self.norms = row, {}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.row.waited = self.waits.seconds
        checkpoint["meter"] = {
            "train_seconds": self.train_seconds,
            **_kept(self.row, trainer),
            "epoch": _kept(self.epoch, trainer),
            "norms": {name: float(value) for name, value in self.norms.items()},
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["meter"]
        self.train_seconds = state["train_seconds"]
        self.row, self.epoch = (
            _back(each, trainer.accumulate_grad_batches, pl_module.device) for each in (state, state.get("epoch"))
        )
        self.norms, self.waits.seconds = (
            {name: torch.tensor(value) for name, value in state.get("norms", {}).items()},
            self.row.waited,
        )


def _over_ranks(sums: dict[str, Tensor], trainer: L.Trainer) -> dict[str, float]:
    """Sums averaged over the ranks; a collective."""
    if not sums:
        return {}
    own = torch.stack([value.float().to(trainer.strategy.root_device) for value in sums.values()])
    return dict(zip(sums, trainer.strategy.reduce(own, reduce_op="mean").tolist()))


def _kept(of: Tally, trainer: L.Trainer) -> dict[str, Any]:
    """A tally as plain data, its sums over steps: a resume may have another number of ranks or passes."""
    in_steps = {name: value / trainer.accumulate_grad_batches for name, value in _over_ranks(of.sums, trainer).items()}
    return {
        "sums": in_steps,
        "steps": of.steps,
        "seconds": of.seconds,
        "waited": of.waited,
        "operations": of.operations,
    }


def _back(kept: dict[str, Any] | None, passes: int, device: torch.device) -> Tally:
    """The tally that `_kept` has put down; an empty one of a checkpoint without it."""
    if kept is None:
        return Tally()
    sums = {name: torch.tensor(value * passes, device=device) for name, value in kept["sums"].items()}
    return Tally(
        sums,
        kept["steps"] * passes,
        kept["steps"],
        kept["seconds"],
        kept.get("waited", 0.0),
        kept.get("operations", 0.0),
    )


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory this rank has held so far: allocated on the GPU, resident on CPU; in MB of 2^20 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
