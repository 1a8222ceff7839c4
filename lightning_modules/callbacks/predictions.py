"""Predictions for every sample of a split: collected on each rank with its row, merged, checked for completeness,
written once."""

import os
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_modules.callbacks.finite import NotFinite
from lightning_modules.callbacks.prediction_table import fixed_rows, table, write
from lightning_modules.objectives.targets import predict
from models.spec import Spec


class Predictions(Callback):
    """Writes `predictions.csv` after a test, a prediction, or a validation of its own (not those inside training); of a
    table's validation `oof.csv`. The last one with targets is told on rank 0 in `shown` too: id -> all it predicted, of
    its `fixed_rows`.

    Columns: see `prediction_table.table`; the id of what is no table is the picture's name in its split, and `fold` is
    in oof.csv. Each rank leaves a shard beside the file; rank 0 merges them by row. Raises RuntimeError when a row is
    missing or there twice, NotFinite for NaN.
    """

    def __init__(self, folder: Path, spec: Spec, fold: int | None = None):
        self.folder, self.spec, self.fold = folder, spec, fold or 0
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.shown: dict[str, np.ndarray] = {}

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *place: int
    ) -> None:
        self._collect(batch, outputs[batch["valid"]])

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *place: int
    ) -> None:
        self._collect(batch, outputs)

    def _collect(self, batch: dict[str, Tensor], logits: Tensor) -> None:
        """Keep the rows of a batch; `logits` (V, O) are those of its valid rows."""
        index, target = batch["index"][batch["valid"]], batch["target"][batch["valid"]]
        self.parts.append((index.cpu().numpy(), target.cpu().numpy(), predict(logits, self.spec).cpu().numpy()))

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *place: int
    ) -> None:
        if trainer.state.fn == "validate":
            self.on_test_batch_end(trainer, pl_module, outputs, batch)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._finish(trainer, "test")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._finish(trainer, "predict")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._finish(trainer, "val")

    def _finish(self, trainer: L.Trainer, name: str) -> None:
        index, target, prediction = (np.concatenate(values) for values in zip(*self.parts))
        self.parts = []
        counts = torch.tensor(
            [(~np.isfinite(prediction).all(1)).sum(), len(prediction)], device=trainer.strategy.root_device
        )
        bad, rows = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        if bad:
            raise NotFinite(
                f"{name}: the predictions of {bad} of {rows} pictures are NaN or infinite, so they are not written"
            )
        with open(self._shard(trainer.global_rank), "wb") as file:
            np.savez(file, index=index, target=target, prediction=prediction)
        trainer.strategy.barrier("predictions")
        if trainer.is_global_zero:
            split = getattr(trainer, "datamodule").splits[name]  # noqa: B009  (Lightning does not declare it)
            target, prediction = merge([self._shard(rank) for rank in range(trainer.world_size)], len(split))
            ids = [os.fsdecode(each) for each in split.names] if split.ids is None else split.ids
            of_table = self.spec.get("id_column") and name == "val"
            content = table(
                ids, self.spec, prediction, None if name == "predict" else target, self.fold if of_table else None
            )
            write(content, self.folder / ("oof.csv" if of_table else "predictions.csv"))
            if name != "predict":
                self.shown = {str(ids[row]): prediction[row].copy() for row in fixed_rows(ids)}
            for rank in range(trainer.world_size):
                self._shard(rank).unlink()

    def _shard(self, rank: int) -> Path:
        return self.folder / f".predictions-{rank}.partial"


def merge(shards: list[Path], count: int) -> tuple[np.ndarray, np.ndarray]:
    """(targets, predictions), (N, ...) each by row, from the ranks' shards. Raises RuntimeError unless each of `count`
    rows is there once."""
    parts = []
    for shard in shards:
        with np.load(shard, allow_pickle=False) as content:
            parts.append({key: content[key] for key in ("index", "target", "prediction")})
    index = np.concatenate([part["index"] for part in parts])
    order = index.argsort(kind="stable")
    if not np.array_equal(index[order], np.arange(count)):
        missing, twice = np.setdiff1d(np.arange(count), index), len(index) - len(np.unique(index))
        raise RuntimeError(
            f"predictions are not complete: {len(missing)} of {count} rows missing (first {missing[:5].tolist()}), "
            f"{twice} there twice"
        )
    target, prediction = (np.concatenate([part[key] for part in parts])[order] for key in ("target", "prediction"))
    return target, prediction
