"""Metrics that are exact over any number of samples, batches and ranks: counted or collected, never averaged over
batches."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric as Counted
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.utilities import dim_zero_cat

from lightning_modules.objectives.metrics import EVERY_EPOCH, Metric, find, score
from lightning_modules.objectives.targets import predict
from models.spec import Spec

IGNORED = -1  # target or row of padding


class Metrics(nn.Module):
    """The mean loss (without smoothing) and the task's metrics over all valid rows that `update` has seen. All are NaN
    where an output is NaN or infinite.

    classification: top-1 and top-5 accuracy, counted. Of other tasks, and for another metric that was chosen, the rows
    are collected, and each metric is one call of `metrics.score` on whole arrays in the data set's order.

    Args:
        spec: the data's specification.
        loss: logits (B, O), targets -> loss of each row (B,); None is the cross entropy of classes.
        chosen: a metric beside those of every epoch.
    """

    def __init__(
        self, spec: Spec, loss: Callable[[Tensor, Tensor], Tensor] | None = None, chosen: Metric | None = None
    ):
        super().__init__()
        classes = spec["num_outputs"] if spec["task"] == "classification" else 0
        self.spec, self.loss = spec, loss or partial(F.cross_entropy, reduction="none")
        self.metrics, self.rows = nn.ModuleDict({"loss": MeanLoss(counts := Counts())}), None
        self.counts = counts
        for name, top_k in (("acc1", 1), ("acc5", 5)):
            if classes > top_k or top_k == 1 and classes:
                self.metrics[name] = Accuracy(
                    self.counts, classes, top_k=top_k, average="micro", ignore_index=IGNORED, validate_args=False
                )
        wanted = [] if classes else [find(name, spec["task"]) for name in EVERY_EPOCH[spec["task"]]]
        if chosen is not None and chosen.name not in {*self.metrics, *(each.name for each in wanted)}:
            wanted.append(chosen)
        if wanted:
            self.rows = Rows(spec)
            self.metrics.update({each.name: Score(self.rows, each, spec) for each in wanted})

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor, valid: Tensor, index: Tensor) -> None:
        """logits (B, O), target as in the batch, valid (B,) bool: False rows are padding and weigh nothing, index (B,)
        int64."""
        logits = logits.float()
        self.counts.update(logits, valid)
        metrics: dict[str, Any] = {**self.metrics}
        metrics["loss"].update(torch.where(valid, self.loss(logits, target), 0.0), weight=valid.float())
        if self.rows is not None:
            self.rows.update(logits, target, torch.where(valid, index, IGNORED))
        counted = torch.where(valid, target, IGNORED) if target.ndim == 1 else target
        for name in metrics.keys() - {"loss"}:
            metrics[name].update(logits, counted)

    def not_finite(self) -> tuple[int, int]:
        """(rows with an output that is NaN or infinite, rows) of an epoch, over all ranks. A collective."""
        bad, rows = self.counts.compute().tolist()
        return bad, rows

    def named(self, stage: str) -> dict[str, Any]:
        """The metric objects under their logged names, as `val/acc1`: Lightning computes them over all ranks at the
        epoch's end."""
        return {f"{stage}/{name}": metric for name, metric in self.metrics.items()}


class Counts(Counted):
    """Rows whose outputs are not finite, and rows."""

    full_state_update = False
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, valid: Tensor) -> None:
        """(B, O) and (B,) bool, False for padding."""
        self.counts += torch.stack([(valid & ~logits.isfinite().all(1)).sum(), valid.sum()])

    def compute(self) -> Tensor:
        """(2,) int64."""
        return self.counts.clone()


class Accuracy(MulticlassAccuracy):
    """NaN where an output was not finite: the likeliest of NaN is class 0."""

    def __init__(self, outputs: Counts, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.source = (outputs,)  # no part of this one

    def compute(self) -> Tensor:
        value = super().compute()
        return torch.where(self.source[0].compute()[0] > 0, torch.nan, value)


class MeanLoss(Counted):
    """The weighted mean, NaN where a loss is (torchmetrics' MeanMetric takes it out, or drops the weights). Every task
    has it, so the counts of outputs are reset with it."""

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self, outputs: Counts):
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("weight", torch.tensor(0.0), dist_reduce_fx="sum")
        self.source = (outputs,)

    def update(self, loss: Tensor, weight: Tensor) -> None:
        """(B,) and (B,)."""
        self.total += (loss * weight).sum()
        self.weight += weight.sum()

    def compute(self) -> Tensor:
        return self.total / self.weight

    def reset(self) -> None:
        super().reset()
        self.source[0].reset()


class Rows(Counted):
    """Targets and predictions of an epoch, of all ranks, each row once in the data set's order."""

    full_state_update = False
    logits: list[Tensor]
    target: list[Tensor]
    index: list[Tensor]

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        for name in ("logits", "target", "index"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, target: Tensor, index: Tensor) -> None:
        """(B, O) float32, targets of the batch, (B,) int64 with -1 for padding."""
        for values, new in ((self.logits, logits), (self.target, target), (self.index, index)):
            values.append(new)

    def compute(self) -> tuple[np.ndarray, np.ndarray]:
        """(targets, predictions): of all rows together, as the last bit of a sigmoid may follow its place in a
        batch."""
        logits, target, index = (dim_zero_cat(values).cpu() for values in (self.logits, self.target, self.index))
        order = index.argsort(stable=True)[(index == IGNORED).sum() :]
        return target[order].numpy(), predict(logits[order], self.spec).numpy()


class Score(Counted):
    """One metric of the rows that another object collects; float64."""

    full_state_update = False

    def __init__(self, rows: Rows, metric: Metric, spec: Spec):
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
