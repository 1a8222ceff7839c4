"""Cost of tracking: one training in which blocks of steps with everything a run logs alternate with blocks that log
nothing."""

import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

import models
from datamodules.knobs import height_width
from experiments.running import build
from lightning_modules.callbacks.meter import DataWaitProfiler, Meter
from lightning_modules.loggers.csv_logger import History
from lightning_modules.loggers.wandb_logger import SafeWandbLogger
from lightning_modules.objectives import losses
from lightning_modules.optimization.optimizers import optimizer
from lightning_modules.task import Task
from models import cost

CLASSES, WARMUP_BLOCKS = 1000, 2
SPEC = {"task": "classification", "num_outputs": CLASSES}


class Switched(Meter):
    """The meter of a run, awake only while `on`; `inside` counts the seconds its hooks take, the trackers' among
    them."""

    on, inside = True, 0.0

    def _timed(self, hook: Callable[..., None], *given: Any) -> None:
        if self.on:
            began = time.perf_counter()
            hook(*given)
            self.inside += time.perf_counter() - began

    def on_train_batch_start(self, *given: Any) -> None:
        self._timed(super().on_train_batch_start, *given)

    def on_before_optimizer_step(self, *given: Any) -> None:
        self._timed(super().on_before_optimizer_step, *given)

    def on_train_batch_end(self, *given: Any) -> None:
        self._timed(super().on_train_batch_end, *given)


class Blocks(Callback):
    """Times blocks of `length` steps, (wall clock, processor, inside the meter) in seconds, and switches the meter
    between them, in pairs of shuffled order."""

    def __init__(self, meter: Switched, length: int, pairs: int):
        self.meter, self.length = meter, length
        self.order = [on for _ in range(pairs + WARMUP_BLOCKS) for on in random.sample([True, False], 2)]
        self.times: dict[bool, list[tuple[float, float, float]]] = {True: [], False: []}
        self.done = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.done += 1
        if self.done % self.length:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter() - self.wall, time.process_time() - self.processor, self.meter.inside
        self.times[self.meter.on].append(now)
        if self.order:
            self._begin()

    def _begin(self) -> None:
        self.meter.on = self.order.pop(0)
        self.meter.forget()
        self.meter.inside = 0.0
        self.meter.mark, self.wall, self.processor = time.monotonic(), time.perf_counter(), time.process_time()


def measure(model: str, batch_size: int, pairs: int, log_every_steps: int) -> None:
    """Print a step's time without and with tracking (metrics.csv, W&B's client writing offline), and their ratio by
    wall clock and by processor time of the training process: median of the pairs, quartiles; and the share of a step
    inside the tracking code itself, which noise does not hide."""
    build.quiet()
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {name: folder for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR")}
        blocks, tracker = _train(model, batch_size, pairs, log_every_steps, Path(folder))
        tracker.close(0)
    on, off = (blocks.times[state][WARMUP_BLOCKS:] for state in (True, False))
    print(
        f"{model}, batch {batch_size}, a row every {log_every_steps} steps, {pairs} interleaved pairs of blocks, "
        f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}"
    )
    for clock, name in enumerate(("wall clock", "processor")):
        ratios = [one[clock] / other[clock] for one, other in zip(on, off)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        alone, tracked = (
            1000 * statistics.median(each[clock] for each in times) / log_every_steps for times in (off, on)
        )
        print(
            f"  {name:<11}{alone:>9.2f} ms a step without, {tracked:.2f} ms with: {middle:.4f} (quartiles of the "
            f"pairs {low:.4f} to {high:.4f})"
        )
    shares = [inside / (wall - inside) for wall, _, inside in on]
    print(
        f"  tracking    {100 * statistics.median(shares):.3f} % of a step, inside its own code (largest of a block "
        f"{100 * max(shares):.3f} %)"
    )


def _train(
    model: str, batch_size: int, pairs: int, log_every_steps: int, folder: Path
) -> tuple[Blocks, SafeWandbLogger]:
    network, side = models.create(model, CLASSES), height_width(models.preprocessing(model)["image_size"])
    task = Task(
        network,
        SPEC,
        {},
        loss=losses.create("cross_entropy", SPEC, 0.1),
        schedule=lambda step: 1e-4,
        seed=0,
        make_optimizer=partial(optimizer, name="adamw", lr=1e-4, weight_decay=0.05),
    )
    steps, waits = 2 * (pairs + WARMUP_BLOCKS) * log_every_steps, DataWaitProfiler()
    meter = Switched(batch_size, log_every_steps, steps, waits, partial(cost.training_flops, network))
    blocks, tracker = Blocks(meter, log_every_steps, pairs), SafeWandbLogger(folder, config={"model": model})
    batch = {"image": torch.randn(batch_size, 3, *side), "target": torch.randint(CLASSES, (batch_size,))}
    warnings.filterwarnings("ignore", message=".*no `val_dataloader`.*")
    trainer = L.Trainer(
        max_epochs=1,
        limit_train_batches=steps,
        logger=[History(folder / "metrics.csv"), tracker],
        callbacks=[meter, blocks],
        profiler=waits,
        devices=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=folder,
    )
    trainer.fit(task, DataLoader([batch] * steps, batch_size=None))
    return blocks, tracker
