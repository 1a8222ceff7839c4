"""Checkpoints: written whole or not at all, `best.ckpt` by the monitored metric, `last.ckpt` the last step saved."""
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file, flushes to disk, renames: a kill or a full disk leaves the previous file whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        try:
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class BestCheckpoint(Checkpoint):
    """`best.ckpt`: saved whenever the monitored validation metric is at least as good as in every epoch before: of equals the
    latest, the further trained. NaN never wins."""

    def __init__(self, folder: Path, monitor: str, mode: str):
        self.path, self.monitor, self.sign = folder / "best.ckpt", monitor, {"max": 1, "min": -1}[mode]
        self.best: float | None = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.training and trainer.state.fn != "fit":
            return
        value = float(trainer.callback_metrics.get(self.monitor, float("nan")))
        if value == value and (self.best is None or self.sign * value >= self.sign * self.best):
            self.best = value
            trainer.save_checkpoint(self.path)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]


class LastCheckpoint(Checkpoint):
    """`last.ckpt`: at every epoch's end, after validation, and every `every_n_steps` optimizer steps inside it."""

    def __init__(self, folder: Path, every_n_steps: int | None = None):
        self.path, self.every_n_steps, self.saved_step = folder / "last.ckpt", every_n_steps, 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        due = self.every_n_steps and step != self.saved_step and step % self.every_n_steps == 0
        if due and not trainer.is_last_batch:  # the epoch's end saves it, validation included
            self._save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        self.saved_step = trainer.global_step
        trainer.save_checkpoint(self.path)
