"""Metrics that are exact over any number of samples, batches and ranks: counted or collected, never averaged over batches."""
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics import Metric as Counted
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.utilities import dim_zero_cat

from lightning_modules.metrics import EVERY_EPOCH, Metric, find, score
from lightning_modules.targets import predict

IGNORED = -1  # target or row of padding


class Metrics(nn.Module):
    """The mean loss (without smoothing) and the task's metrics over all valid rows that `update` has seen.

    classification: top-1 and top-5 accuracy, counted. Of other tasks, and for another metric that was chosen, the rows are collected, and each
    metric is one call of `metrics.score` on whole arrays in the data set's order.

    Args:
        spec: the data's specification.
        loss: logits (B, O), targets -> loss of each row (B,); None is the cross entropy of classes.
        chosen: a metric beside those of every epoch.
    """

    def __init__(self, spec: dict[str, Any], loss: Callable[[Tensor, Tensor], Tensor] | None = None, chosen: Metric | None = None):
        super().__init__()
        classes = spec["num_outputs"] if spec["task"] == "classification" else 0
        self.spec, self.loss = spec, loss or (lambda logits, target: F.cross_entropy(logits, target, reduction="none"))
        self.metrics, self.rows = nn.ModuleDict({"loss": MeanMetric()}), None
        for name, top_k in (("acc1", 1), ("acc5", 5)):
            if classes > top_k or top_k == 1 and classes:
                self.metrics[name] = MulticlassAccuracy(classes, top_k=top_k, average="micro", ignore_index=IGNORED, validate_args=False)
        wanted = [] if classes else [find(name, spec["task"]) for name in EVERY_EPOCH[spec["task"]]]
        if chosen is not None and chosen.name not in {*self.metrics, *(each.name for each in wanted)}:
            wanted.append(chosen)
        if wanted:
            self.rows = Rows(spec)
            self.metrics.update({each.name: Score(self.rows, each, spec) for each in wanted})

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor, valid: Tensor, index: Tensor) -> None:
        """logits (B, O), target as in the batch, valid (B,) bool: False rows are padding and weigh nothing, index (B,) int64."""
        logits = logits.float()
        self.metrics["loss"].update(self.loss(logits, target), weight=valid.float())
        if self.rows is not None:
            self.rows.update(logits, target, torch.where(valid, index, IGNORED))
        counted = torch.where(valid, target, IGNORED) if target.ndim == 1 else target
        for name in self.metrics.keys() - {"loss"}:
            self.metrics[name].update(logits, counted)

    def named(self, stage: str) -> dict[str, nn.Module]:
        """The metric objects under their logged names, as `val/acc1`: Lightning computes them over all ranks at the epoch's end."""
        return {f"{stage}/{name}": metric for name, metric in self.metrics.items()}


class Rows(Counted):
    """Targets and predictions of an epoch, of all ranks, each row once in the data set's order."""

    full_state_update = False

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self.spec = spec
        for name in ("logits", "target", "index"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, target: Tensor, index: Tensor) -> None:
        """(B, O) float32, targets of the batch, (B,) int64 with -1 for padding."""
        for values, new in ((self.logits, logits), (self.target, target), (self.index, index)):
            values.append(new)

    def compute(self) -> tuple[np.ndarray, np.ndarray]:
        """(targets, predictions): of all rows together, as the last bit of a sigmoid may follow its place in a batch."""
        logits, target, index = (dim_zero_cat(values).cpu() for values in (self.logits, self.target, self.index))
        order = index.argsort(stable=True)[(index == IGNORED).sum():]
        return target[order].numpy(), predict(logits[order], self.spec).numpy()


class Score(Counted):
    """One metric of the rows that another object collects; float64."""

    full_state_update = False

    def __init__(self, rows: Rows, metric: Metric, spec: dict[str, Any]):
        super().__init__(sync_on_compute=False)  # the rows are from all ranks already
        self.source = (rows, metric, spec)

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Nothing: `Rows` has it."""

    def compute(self) -> Tensor:
        rows, metric, spec = self.source
        return torch.tensor(score(metric, *rows.compute(), spec), dtype=torch.float64)

    def reset(self) -> None:
        super().reset()
        self.source[0].reset()
