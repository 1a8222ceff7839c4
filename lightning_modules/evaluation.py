"""Metrics that are exact over any number of samples, batches and ranks: counted, never averaged over batches."""
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

IGNORED = -1  # target of padding rows


class ClassificationMetrics(nn.Module):
    """Mean cross entropy (without smoothing) and top-1, top-5 accuracy as fractions, over all valid rows that `update` has seen."""

    def __init__(self, num_outputs: int):
        super().__init__()
        def accuracy(top_k: int) -> MulticlassAccuracy:
            return MulticlassAccuracy(num_outputs, top_k=top_k, average="micro", ignore_index=IGNORED, validate_args=False)
        self.metrics = nn.ModuleDict({"loss": MeanMetric(), "acc1": accuracy(1)})
        if num_outputs > 5:
            self.metrics["acc5"] = accuracy(5)

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor, valid: Tensor) -> None:
        """logits (B, num_outputs), target (B,) int64, valid (B,) bool: False rows are padding and weigh nothing."""
        logits = logits.float()
        self.metrics["loss"].update(F.cross_entropy(logits, target, reduction="none"), weight=valid.float())
        target = torch.where(valid, target, IGNORED)
        for name in self.metrics.keys() - {"loss"}:
            self.metrics[name].update(logits, target)

    def named(self, stage: str) -> dict[str, nn.Module]:
        """The metric objects under their logged names, as `val/acc1`: Lightning computes them over all ranks at the epoch's end."""
        return {f"{stage}/{name}": metric for name, metric in self.metrics.items()}
