"""What a run tells while it trains: rows for the trackers, throughput, a progress bar."""
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.nn.utils import get_total_norm
from tqdm.auto import tqdm

from lightning_modules.metrics import shown
from lightning_modules.peak import device_peak
from lightning_modules.seen import spared
from lightning_modules.task import inputs

NEXT_BATCH = "[_TrainingEpochLoop].train_dataloader_next"  # Lightning's name of the wait for a training batch


class Waits(Profiler):
    """Seconds that training has waited for its batches, as Lightning's loop tells its profiler."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds, self.since = 0.0, 0.0

    def start(self, action_name: str) -> None:
        if action_name == NEXT_BATCH:
            self.since = time.monotonic()

    def stop(self, action_name: str) -> None:
        if action_name == NEXT_BATCH:
            self.seconds += time.monotonic() - self.since


class Meter(Callback):
    """Logs one row every `log_every_steps` optimizer steps of an epoch and one at its end, after validation.

    Training values are means over all ranks since the row before, without a synchronisation in between; norms are those of the row's last step,
    over all that is trained, before clipping. Throughput is global and leaves validation and the saves of an epoch's end out. Time and the
    sums since the last row survive a resume, so that no row tells of half an epoch.

    Args:
        waits: the trainer's profiler.
        flops: inputs of the network (B, ...) -> operations of one picture's training; of a teacher none.
    """

    def __init__(self, global_batch_size: int, log_every_steps: int, total_steps: int, waits: Waits, flops: Callable[..., float]):
        self.global_batch_size, self.log_every_steps, self.total_steps = global_batch_size, log_every_steps, total_steps
        self.waits, self.flops, self.known_flops = waits, flops, {}
        self.train_seconds, self.last_row = 0.0, {}
        self._forget()

    def _forget(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.norms: dict[str, Tensor] = {}
        self.batches, self.seconds, self.steps, self.operations, self.waits.seconds = 0, 0.0, 0, 0.0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step_before, self.mark = trainer.global_step, time.monotonic()  # resumed inside an epoch, that has no on_train_epoch_start
        self.start, self.start_step = self.mark, trainer.global_step
        self.peak = device_peak(trainer.strategy.root_device, trainer.precision)
        for logger in trainer.loggers:
            if hasattr(logger, "cut"):
                logger.cut(trainer.global_step)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._forget()
        self.mark = time.monotonic()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count what a picture of this size takes, once, and not as training time."""
        shape = batch["image"].shape[2:]
        if trainer.is_global_zero:
            if shape not in self.known_flops:
                began, self.known_flops[shape] = time.monotonic(), 0.0
                with spared("perf/tflops_per_device"):
                    self.known_flops[shape] = self.flops(*(value[:2] for value in inputs(batch)))
                self.mark += time.monotonic() - began
            self.operations += self.known_flops[shape] * len(batch["image"])

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """The norms of the step that a row will tell of; where each rank holds a part of the network, none."""
        if self.steps + 1 < self.log_every_steps and not trainer.is_last_batch or type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy):
            return
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        with torch.no_grad():
            self.norms = {"optim/grad_norm": get_total_norm([each.grad for each in trained if each.grad is not None]),
                          "optim/param_norm": get_total_norm(trained)}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        for name, value in outputs.items():
            undo = trainer.accumulate_grad_batches if name == "loss" else 1  # by which Lightning has divided the loss
            self.sums[name] = self.sums.get(name, 0) + value.detach() * undo
        now = time.monotonic()
        self.seconds, self.train_seconds, self.mark = self.seconds + now - self.mark, self.train_seconds + now - self.mark, now
        self.batches += 1
        if trainer.global_step == self.step_before:
            return  # an accumulated pass, no step yet
        self.steps, self.step_before = self.steps + 1, trainer.global_step
        if self.steps == self.log_every_steps and not trainer.is_last_batch:
            self._log(trainer, pl_module, {})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._log(trainer, pl_module, {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val")})
            self.mark = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.batches:  # there was no validation
            self._log(trainer, pl_module, {})

    def training_row(self, trainer: L.Trainer) -> dict[str, float]:
        """Means of the training values, norms and global throughput since the last row; {} right after one."""
        if not self.batches:
            return {}
        row = {f"train/{name}": value / self.batches for name, value in self._mean_sums(trainer).items()}
        return row | {name: float(value) for name, value in self.norms.items()} | (self._speed(trainer) if self.steps else {})

    def _mean_sums(self, trainer: L.Trainer) -> dict[str, float]:
        """`sums`, averaged over the ranks; a collective."""
        if not self.sums:
            return {}
        own = torch.stack([value.float().to(trainer.strategy.root_device) for value in self.sums.values()])
        return dict(zip(self.sums, trainer.strategy.reduce(own, reduce_op="mean").tolist()))

    def _speed(self, trainer: L.Trainer) -> dict[str, float]:
        """`perf/*`: throughput of all devices, time of a step and its share of waiting on the rank that waits longest, operations a second of
        one device and their share of its peak, largest memory of a rank, hours left. A collective."""
        device, seconds = trainer.strategy.root_device, max(self.seconds, 1e-9)
        own = torch.tensor([self.waits.seconds / seconds, peak_memory_mb(device)], device=device)
        wait, memory = trainer.strategy.reduce(own, reduce_op="max").tolist()
        row = {"perf/images_per_sec": self.steps * self.global_batch_size / seconds, "perf/step_seconds": seconds / self.steps,
               "perf/data_wait_share": wait, "perf/memory_mb": memory, "perf/hours_left": self.seconds_left(trainer) / 3600}
        if self.operations:
            row["perf/tflops_per_device"] = self.operations / seconds / 1e12
            row |= {"perf/mfu": self.operations / seconds / self.peak} if self.peak else {}
        return row

    def seconds_left(self, trainer: L.Trainer) -> float:
        """Of the training and its validations, at the pace since this start; before its first step at that of the training so far."""
        done, since = trainer.global_step, trainer.global_step - self.start_step
        pace = (time.monotonic() - self.start) / since if since else self.train_seconds / max(1, done)
        return pace * (self.total_steps - done)

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule, metrics: dict[str, float]) -> None:
        lr, scales = pl_module.lr_used, {group.get("lr_scale", 1.0) for group in trainer.optimizers[0].param_groups}
        row = {"epoch": trainer.current_epoch, **self.training_row(trainer), **metrics, "lr": lr}
        row |= {f"lr/x{scale:.4g}": lr * scale for scale in sorted(scales - {1.0})}  # groups with a share of the rate
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step)
        self.last_row = row
        self._forget()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        in_steps = {name: value / trainer.accumulate_grad_batches for name, value in self._mean_sums(trainer).items()}
        checkpoint["meter"] = {"train_seconds": self.train_seconds, "seconds": self.seconds, "steps": self.steps, "sums": in_steps,
                               "norms": {name: float(value) for name, value in self.norms.items()}, "waited": self.waits.seconds,
                               "operations": self.operations,
                               "lr": pl_module.lr_used}  # sums in steps: a resume may have another number of ranks or passes

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        state, passes = checkpoint["meter"], trainer.accumulate_grad_batches
        self.train_seconds, self.seconds, self.steps = state["train_seconds"], state["seconds"], state["steps"]
        self.batches, pl_module.lr_used = self.steps * passes, state["lr"]
        self.sums = {name: torch.tensor(value * passes, device=pl_module.device) for name, value in state["sums"].items()}
        self.norms = {name: torch.tensor(value) for name, value in state.get("norms", {}).items()}
        self.waits.seconds, self.operations = state.get("waited", 0.0), state.get("operations", 0.0)


class Progress(Callback):
    """One bar over the whole training (so its time left is the run's) on a terminal; one line an epoch elsewhere."""

    def __init__(self, meter: Meter, epochs: int, refresh_seconds: float = 1.0):
        self.meter, self.epochs, self.refresh_seconds = meter, epochs, refresh_seconds
        self.bar, self.shown = None, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and sys.stderr.isatty():
            self.bar = tqdm(total=self.meter.total_steps, initial=trainer.global_step, unit="step", dynamic_ncols=True, smoothing=0.05)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.bar is None or time.monotonic() - self.shown < self.refresh_seconds:
            return
        self.shown = time.monotonic()
        self.bar.update(trainer.global_step - self.bar.n)
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches
        speed = (trainer.global_step - self.meter.start_step) * self.meter.global_batch_size / (self.shown - self.meter.start)
        self.bar.set_description(f"epoch {trainer.current_epoch + 1}/{self.epochs}", refresh=False)
        right = f"acc {100 * float(outputs['acc1']):.1f} %, " if "acc1" in outputs else ""
        self.bar.set_postfix_str(f"loss {loss:.3f}, {right}{speed:.0f} images/s")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        row = self.meter.last_row
        line = " | ".join([f"epoch {trainer.current_epoch + 1}/{self.epochs}", f"loss {row.get('train/loss', float('nan')):.4f}",
                           *(shown(name, row[name]) for name in ("train/acc1", *(f"{stage}/{pl_module.metric.name}" for stage in ("val", "val_ema")))
                             if name in row),
                           f"{row.get('perf/images_per_sec', 0):.0f} images/s", f"{clock(self.meter.seconds_left(trainer))} left"])
        (self.bar.write if self.bar is not None else print)(line)
        sys.stdout.flush()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def clock(seconds: float) -> str:
    """`3:05`, `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory this rank has held so far: allocated on the GPU, resident on CPU; in MB of 2^20 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
