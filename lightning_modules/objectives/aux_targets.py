"""Targets learned beside the target, through a linear head of their own on the pooled features. B batch, D features, A
such targets."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.heads import Mlp


class Aux(nn.Module):
    """Pooled features (B, D), targets (B, A) in 0 to 1 -> binary cross-entropy with logits, mean over batch and
    targets, in float32.

    It is of the task, not of the network: it shapes the features in training and is gone afterwards. It starts at 0.

    Args:
        model: whose features it learns from. count: A. weight: of its loss in the total.
    Raises ValueError for a network without a linear classifier or an `Mlp`.
    """

    def __init__(self, model: Any, count: int, weight: float):
        super().__init__()
        first = classifier_of(model)
        if not isinstance(first, nn.Linear | Mlp):
            raise ValueError(
                f"--data_args.aux_targets: {type(model).__name__} has a classifier of type {type(first).__name__}, "
                f"not one linear layer"
            )
        self.width, self.weight = model.head_hidden_size, weight
        with torch.random.fork_rng(devices=[]):  # the training draws the same with and without it
            self.head = nn.Linear(self.width, count)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, pooled: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.head(pooled).float(), target)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[list[Tensor]]:
        """Collects the pooled features (B, D) of the passes inside: what the classifier is given, without columns
        joined to them."""
        seen: list[Tensor] = []
        handle = classifier_of(model).register_forward_pre_hook(
            lambda module, given: seen.append(given[0][:, : self.width])
        )
        try:
            yield seen
        finally:
            handle.remove()


def classifier_of(model: Any) -> nn.Module:
    """The classifier; of two the first."""
    classifier = model.get_classifier()
    return classifier[0] if isinstance(classifier, tuple) else classifier
