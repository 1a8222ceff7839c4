"""Checkpoint averaging: the mean of the weights after the last k epochs, or the best k, as the network a run ends
with."""

import math
import re
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_modules.callbacks.ema import Ema
from models.pretrained import AVERAGED, check_finite, read_checkpoint


def parse(text: str) -> tuple[str, int]:
    """("last", 5) of `last-5`, ("best", 3) of `best-3`. Raises ValueError."""
    found = re.fullmatch(r"(last|best)-(\d+)", text)
    if not found or int(found[2]) < 1:
        raise ValueError(f"--average_checkpoints {text}: give last-5 or best-3, the last or the best so many epochs")
    return found[1], int(found[2])


def _error(trainer: L.Trainer) -> str | None:
    """The error of AtomicCheckpointIO's last save; None where it succeeded."""
    return getattr(trainer.strategy.checkpoint_io, "error", None)


def mean(states: Any) -> dict[str, Tensor]:
    """The mean of state dicts, by name, as timm's avg_checkpoints.py takes it: in float64, buffers and whole numbers
    (cut off, as when timm's file is loaded) included. `states` is any iterable; one of them is held at a time. Raises
    ValueError for other names, and for NaN."""
    total, dtypes, count = {}, {}, 0
    for state in states:
        check_finite(state, "weights to average")
        if not count:
            dtypes = {name: value.dtype for name, value in state.items()}
            total = {name: value.to(torch.float64, copy=True) for name, value in state.items()}
        elif state.keys() != total.keys():
            raise ValueError(
                f"weights of other networks cannot be averaged: {sorted(state.keys() ^ total.keys())[:3]} are not in "
                f"all"
            )
        else:
            for name, value in state.items():
                total[name] += value.to(torch.float64)
        count += 1
    return {name: (value / count).to(dtypes[name]) for name, value in total.items()}


class Averaging(Callback):
    """Keeps `weights-<epoch>.ckpt` of the last or best k epochs; `finish`, after training, makes `averaged.ckpt` of
    them.

    A file that falls out is removed two epochs later, or when the training ends: until then last-1.ckpt may still name
    it. Comes before every other callback that saves.

    Args:
        folder: of the checkpoints.
        rule: `last-5`, `best-3`. Of equals the earlier is better; NaN and infinity are never among the best.
        monitor, mode: the metric of `best`, and whether `max` or `min` of it is.
        use_ema: average the EMA weights instead of the raw ones.
    """

    def __init__(self, folder: Path, rule: str, monitor: str, mode: str, use_ema: bool):
        self.folder, (self.kind, self.count), self.monitor, self.use_ema = folder, parse(rule), monitor, use_ema
        self.sign = {"max": 1, "min": -1}[mode]
        self.kept: dict[int, float] = {}  # epoch -> its rank among them
        self.fallen: dict[int, int] = {}  # epoch -> the one it fell out in

    def file(self, epoch: int) -> Path:
        return self.folder / f"weights-{epoch:04d}.ckpt"

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch = trainer.current_epoch
        value = (
            epoch
            if self.kind == "last"
            else self.sign * float(trainer.callback_metrics.get(self.monitor, float("nan")))
        )
        if math.isfinite(value):
            after = dict(
                sorted({**self.kept, epoch: value}.items(), key=lambda item: (item[1], -item[0]))[-self.count :]
            )
            if epoch in after and self._write(trainer, pl_module, epoch):
                self.fallen |= {out: epoch for out in self.kept.keys() - after.keys()}
                self.kept = after
        for out in [out for out, since in self.fallen.items() if since <= epoch - 2]:
            del self.fallen[out]
            if trainer.is_global_zero:
                self.file(out).unlink(missing_ok=True)

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int) -> bool:
        """Write the file. Returns whether it is on disk, the same answer on every rank."""
        content = {"state_dict": self._weights(trainer, pl_module), "epoch": epoch, "global_step": trainer.global_step}
        trainer.strategy.save_checkpoint(content, self.file(epoch))
        return trainer.strategy.broadcast(_error(trainer) is None)

    def _weights(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Tensor]:
        if self.use_ema:
            return next(callback for callback in getattr(trainer, "callbacks", ()) if isinstance(callback, Ema)).state()
        return pl_module.state_dict()

    def finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any] | None:
        """The averaged checkpoint, written to `averaged.ckpt`; None when no epoch was kept. A collective. Raises
        ValueError for a damaged file of weights, OSError when the average cannot be written."""
        if not self.kept:
            return None
        epochs, path = sorted(self.kept), self.folder / AVERAGED
        if trainer.is_global_zero:
            content = {
                "state_dict": mean(read_checkpoint(self.file(epoch))["state_dict"] for epoch in epochs),
                "use_ema": self.use_ema,
                "averaged_epochs": epochs,
                "epoch": epochs[-1],
                "global_step": trainer.global_step,
                "config": pl_module.config,
                "spec": pl_module.spec,
                "fingerprint": getattr(getattr(trainer, "datamodule", None), "fingerprint", None),
            }
            trainer.strategy.checkpoint_io.save_checkpoint(content, path)
            if _error(trainer) is None:
                for file in {*self.folder.glob("weights-*.ckpt")} - {self.file(epoch) for epoch in epochs}:
                    file.unlink()
        error = trainer.strategy.broadcast(_error(trainer))
        if error is not None:
            raise OSError(error)
        return read_checkpoint(path)

    def clear(self) -> None:
        """Remove the weights that averaged.ckpt was made of; when the run has finished."""
        for epoch in self.kept:
            self.file(epoch).unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept, "fallen": self.fallen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of another run's state the files are not here, and are left out."""
        self.kept = {epoch: value for epoch, value in state["kept"].items() if self.file(epoch).is_file()}
        self.fallen = dict(state["fallen"])
