"""The progress of a run: a bar on a terminal, printed lines elsewhere."""

import os
import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from tqdm.auto import tqdm

from lightning_modules.callbacks.meter import Meter
from lightning_modules.loggers.formats import format_duration, format_metric, format_rate

REFRESH_SECONDS, LINE_SECONDS = 1.0, 60.0  # between two looks of the bar, and two lines where there is no terminal


class Progress(Callback):
    """One bar over the whole training (so its time left is the run's) on a terminal; elsewhere a line a minute. An
    epoch has one line on both. Nothing is read from the device for it: the loss is that of the last row."""

    def __init__(self, meter: Meter, epochs: int):
        self.meter, self.epochs, self.bar = meter, epochs, None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.printed = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.since = trainer.global_step, self.meter.train_seconds
        if (
            trainer.is_global_zero and sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns
        ):  # 0: of unknown size
            self.bar = tqdm(
                total=self.meter.total_steps,
                initial=trainer.global_step,
                unit="step",
                dynamic_ncols=True,
                smoothing=0.05,
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, row = trainer.global_step, self.meter.last_row
        if step == self.since[0] or not self._due(trainer):
            return  # an accumulated pass, no step yet; or too soon
        words = [f"loss {row['train/loss']:.3f}"] if "train/loss" in row else []
        words.append(
            format_rate(
                (step - self.since[0])
                * self.meter.global_batch_size
                / max(self.meter.train_seconds - self.since[1], 1e-9)
            )
        )
        epoch = f"epoch {trainer.current_epoch + 1}/{self.epochs}"
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            self.bar.set_description(epoch, refresh=False)
            self.bar.set_postfix_str(", ".join(words))
            return
        self.since = step, self.meter.train_seconds
        print(
            " | ".join(
                [
                    epoch,
                    f"step {step:,}/{self.meter.total_steps:,}",
                    *words,
                    f"{format_duration(self.meter.seconds_left(trainer))} left",
                ]
            ),
            flush=True,
        )

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._scored(trainer, "validation", batch_idx, trainer.num_val_batches)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._scored(trainer, "test", batch_idx, trainer.num_test_batches)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._scored(trainer, "prediction", batch_idx, trainer.num_predict_batches)

    def _scored(self, trainer: L.Trainer, what: str, batch: int, batches: list[int | float]) -> None:
        if self.bar is None and self._due(trainer):
            epoch = f"epoch {trainer.current_epoch + 1}/{self.epochs} | " * (trainer.state.fn == "fit")
            print(f"{epoch}{what}, batch {batch + 1:,}/{batches[0]:,}", flush=True)

    def _due(self, trainer: L.Trainer) -> bool:
        """Whether a line is due; a due one counts as printed."""
        now = time.monotonic()
        if not trainer.is_global_zero or now - self.printed < (LINE_SECONDS if self.bar is None else REFRESH_SECONDS):
            return False
        self.printed = now
        return True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        row = self.meter.last_row
        line = " | ".join(
            [
                f"epoch {trainer.current_epoch + 1}/{self.epochs}",
                f"loss {row.get('train/loss', float('nan')):.4f}",
                *(
                    format_metric(name, row[name])
                    for name in ("train/acc1", *(f"{stage}/{pl_module.metric.name}" for stage in ("val", "val_ema")))
                    if name in row
                ),
                format_rate(row.get("perf/images_per_sec", 0.0)),
                f"{format_duration(self.meter.seconds_left(trainer))} left",
            ]
        )
        if self.bar is not None:
            self.bar.update(trainer.global_step - self.bar.n)
        (self.bar.write if self.bar is not None else print)(line)
        sys.stdout.flush()
        self.printed, self.since = time.monotonic(), (trainer.global_step, self.meter.train_seconds)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
