"""What a network said of every sample of a scored split: collected on each rank with its row, merged, checked complete, written once."""
import os
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
from lightning.pytorch.callbacks import Callback

MOST_COLUMNS = 100  # classes that get a column each; of more only the likeliest is written


class Predictions(Callback):
    """Writes `predictions.csv` after a test or a validation of its own (not those inside training).

    Columns: `id` (the picture's name in its split), `target`, and `prediction_<class>` with probabilities; for more than 100 classes
    `prediction` (the likeliest class) and its `probability`. Each rank leaves a shard beside the file; rank 0 merges them by row.
    Raises RuntimeError when a row is missing or there twice.
    """

    def __init__(self, folder: Path, class_names: list[str]):
        self.path, self.class_names = folder / "predictions.csv", class_names
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *place: int) -> None:
        valid = batch["valid"].cpu().numpy()
        rows = (batch["index"], batch["target"], outputs.float().softmax(1))
        self.parts.append(tuple(values.cpu().numpy()[valid] for values in rows))

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *place: int) -> None:
        if trainer.state.fn == "validate":
            self.on_test_batch_end(trainer, pl_module, outputs, batch)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._finish(trainer, "test")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._finish(trainer, "val")

    def _finish(self, trainer: L.Trainer, split: str) -> None:
        index, target, probability = (np.concatenate(values) for values in zip(*self.parts))
        self.parts = []
        with open(self._shard(trainer.global_rank), "wb") as file:
            np.savez(file, index=index, target=target, probability=probability)
        trainer.strategy.barrier("predictions")
        if trainer.is_global_zero:
            names = trainer.datamodule.splits[split].names
            merged = merge([self._shard(rank) for rank in range(trainer.world_size)], len(names))
            self._write([os.fsdecode(name) for name in names], *merged)
            for rank in range(trainer.world_size):
                self._shard(rank).unlink()

    def _shard(self, rank: int) -> Path:
        return self.path.with_name(f".predictions-{rank}.partial")

    def _write(self, names: list[str], target: np.ndarray, probability: np.ndarray) -> None:
        table = pd.DataFrame({"id": names, "target": [self.class_names[i] for i in target]})
        if len(self.class_names) <= MOST_COLUMNS:
            columns = [f"prediction_{name}" for name in self.class_names]
            table = pd.concat([table, pd.DataFrame(probability, columns=columns)], axis=1)
        else:
            table["prediction"] = [self.class_names[i] for i in probability.argmax(1)]
            table["probability"] = probability.max(1)
        partial = self.path.with_name(f".{self.path.name}.partial")
        table.to_csv(partial, index=False)
        os.replace(partial, self.path)


def merge(shards: list[Path], count: int) -> tuple[np.ndarray, np.ndarray]:
    """(targets (N,), probabilities (N, K)) by row, from the ranks' shards. Raises RuntimeError unless each of `count` rows is there once."""
    parts = []
    for shard in shards:
        with np.load(shard, allow_pickle=False) as content:
            parts.append({key: content[key] for key in ("index", "target", "probability")})
    index = np.concatenate([part["index"] for part in parts])
    order = index.argsort(kind="stable")
    if not np.array_equal(index[order], np.arange(count)):
        missing, twice = np.setdiff1d(np.arange(count), index), len(index) - len(np.unique(index))
        raise RuntimeError(f"predictions are not complete: {len(missing)} of {count} rows missing (first {missing[:5].tolist()}), "
                           f"{twice} there twice")
    return tuple(np.concatenate([part[key] for part in parts])[order] for key in ("target", "probability"))
