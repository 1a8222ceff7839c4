"""Checkpoints: written whole or not at all, sealed with their sha256, plain data; `best.ckpt` by the monitored metric,
`last.ckpt` the last step saved, `last-1.ckpt` the one before it. A disk that takes none stops no training."""

import hashlib
import math
import os
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from lightning_modules.loggers.messages import warn
from lightning_modules.objectives.metrics import MetricError
from models.pretrained import LAST, SEAL, read_checkpoint

DATA = "DataModule"  # the class of every data set: the name under which Lightning keeps its state
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file, flushes to disk, renames: a kill or a full disk leaves the previous file whole.

    A write that fails (full, read-only, gone) is a warning and training goes on; `error` says what failed in the last
    call (None: nothing), `failures` how many have. `last.ckpt` becomes `last-1.ckpt` before it is replaced.

    Args:
        passes: forward and backward passes in an optimizer step now. Lightning counts passes, so a checkpoint saved
            with another number (other ranks, another micro batch) is counted anew when it is loaded.
    """

    def __init__(self, passes: int = 1):
        self.passes, self.failures = passes, 0
        self.error: str | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        """Raises TypeError for content that weights_only=True would not load, by its place."""
        path, content = Path(path), plain(checkpoint)
        self.error = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(content, path)
        except OSError as error:
            self.failures += 1
            self.error = f"{path} could not be saved at step {checkpoint.get('global_step')}: {error.strerror or error}"
            warn(f"{self.error}. Training goes on; it is tried again at the next save.")

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Always with weights_only=True, and to the CPU. Raises ValueError for a damaged or unsafe file, and for an
        address."""
        checkpoint = read_checkpoint(Path(path))
        recount(checkpoint, self.passes)
        return checkpoint


def recount(checkpoint: dict[str, Any], passes: int) -> None:
    """Bring Lightning's counts of passes in a loaded checkpoint to `passes` in an optimizer step; counts of steps stay
    as they are."""
    data = checkpoint.get(DATA) or {}
    before = data.get("accumulation", passes)
    if before == passes:
        return
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for part in (progress["total"], progress["current"]):
        ready = part["ready"]
        if ready % before:
            raise ValueError(
                f"the checkpoint was saved inside an optimizer step, after {ready} passes of {before} each"
            )
        part.update({key: ready // before * passes - (ready - count) for key, count in part.items()})
    data["accumulation"] = passes


def _write(content: dict[str, Any], path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            sealed: Any = _Digested(file)  # all that torch asks of a file is `write`
            try:
                torch.save(content, sealed)
            except RuntimeError:  # what torch makes of a full disk
                if sealed.error:
                    raise sealed.error from None
                raise
            file.seek(-2, os.SEEK_END)  # the length of the archive's comment, 0
            comment = SEAL + sealed.digest.hexdigest().encode()
            file.write(len(comment).to_bytes(2, "little") + comment)
            file.flush()
            os.fsync(file.fileno())
        if path.name == LAST[0] and path.is_file():
            os.replace(path, path.with_name(LAST[1]))
        os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class _Digested:
    """A file that digests what goes through it and keeps the reason when a write fails."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def plain(value: Any, place: str = "checkpoint") -> Any:
    """The same content as weights_only=True loads it: paths as text, NumPy's scalars as Python's, data classes as
    dicts.

    Raises TypeError, with the place, for anything else that is no tensor and no plain value.
    """
    if (
        isinstance(value, Tensor)
        or type(value) in PLAIN
        or place in ("checkpoint.state_dict", "checkpoint.ema_state_dict")
    ):
        return value
    if isinstance(value, dict):
        return {plain(key, f"{place}'s key"): plain(inner, f"{place}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        inner = [plain(each, f"{place}[{number}]") for number, each in enumerate(value)]
        return inner if isinstance(value, list) else tuple(inner) if isinstance(value, tuple) else set(inner)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, np.generic | np.ndarray):
        return value.item() if isinstance(value, np.generic) else value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value), place)
    raise TypeError(f"{place} is a {type(value).__name__}: a checkpoint holds tensors and plain data only")


def save(trainer: L.Trainer, path: Path) -> bool:
    """Save on all ranks. Whether the file is on disk, the same answer on every rank."""
    trainer.save_checkpoint(path)
    return trainer.strategy.broadcast(getattr(trainer.strategy.checkpoint_io, "error", None) is None)


def validation_to_do(checkpoint: dict[str, Any]) -> None:
    """Let a state saved in validation be what Lightning calls restarted in the middle of its first batch: it validates
    again, from the start."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    for count in ("total", "current"):
        progress[count] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}


class BestCheckpoint(Checkpoint):
    """`best.ckpt`: saved whenever the monitored validation metric is better than in every epoch before; of equals the
    first stays, as in timm and Lightning. NaN and infinity never win; nor does an epoch that could not be saved."""

    def __init__(self, folder: Path, monitor: str, mode: str):
        self.path, self.monitor, self.sign = folder / "best.ckpt", monitor, {"max": 1, "min": -1}[mode]
        self.best: float | None = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.training and trainer.state.fn != "fit":
            return
        value, before = float(trainer.callback_metrics.get(self.monitor, float("nan"))), self.best
        if math.isfinite(value) and (before is None or self.sign * value > self.sign * before):
            self.best = value  # before saving, as it stands in the file
            if not save(trainer, self.path):
                self.best = before

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"] if self.path.is_file() else None  # another run's state: its best weights are not here


class LastCheckpoint(Checkpoint):
    """`last.ckpt`: at every epoch's end, after validation, and every `every_n_steps` optimizer steps inside it; also
    where the metric of an epoch fails, with its validation still to do. `unsaved`: the last attempt failed; after the
    last step it is made once more."""

    before_validation = False

    def __init__(self, folder: Path, every_n_steps: int | None = None):
        self.path, self.every_n_steps, self.saved_step, self.unsaved = folder / LAST[0], every_n_steps, 0, False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.saved_step = (
            trainer.global_step
        )  # else the first pass after a resume, inside an optimizer step, would save again

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = self.every_n_steps and step != self.saved_step and step % self.every_n_steps == 0
        if due and not trainer.is_last_batch:  # the epoch's end saves it, validation included
            self._save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.unsaved:
            self._save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if (
            isinstance(exception, MetricError) and trainer.state.fn == "fit"
        ):  # the same on all ranks, which score the same rows
            self.before_validation = True
            self._save(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.before_validation:
            validation_to_do(checkpoint)

    def _save(self, trainer: L.Trainer) -> None:
        self.saved_step = trainer.global_step
        self.unsaved = not save(trainer, self.path)
