"""Losses by task.

classification: logits (B, K) against class numbers (B,) int64, or soft targets (B, K) with smoothing already in them ->
a scalar, the mean.
multilabel, regression: logits (B, T * O) against targets (B, T), 0-1 labels or scaled to 0-1, -> (B, T), a loss for
each (`create` does the scaling, the smoothing and the mean). Keyword-only arguments are what `--loss_args` takes.
Legend: B pictures, K classes, T labels or targets, O
outputs of each.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.objectives.targets import BINS, bin_targets, ordinal_targets, scale
from models import closest
from models.spec import Spec

RSB_THRESHOLD = 0.2


def cross_entropy(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Softmax cross entropy, the mean over the batch."""
    if target.ndim == logits.ndim:
        return SoftTargetCrossEntropy()(logits, target)
    return F.cross_entropy(logits, target, label_smoothing=smoothing)


def binary(
    logits: Tensor, target: Tensor, smoothing: float, threshold: float | None = None, sum_classes: bool = False
) -> Tensor:
    """Binary cross entropy of each class (timm's BinaryCrossEntropy): the mean over batch and classes, or their sum
    averaged over the batch.

    Class numbers become smoothed one-hot rows first; `threshold` makes 1 of every target above it and 0 of the rest.
    """
    return BinaryCrossEntropy(smoothing, target_threshold=threshold, sum_classes=sum_classes)(logits, target)


def bce(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross entropy; a target outside 0-1 (out of the range the training set has) counts as its end."""
    return F.binary_cross_entropy_with_logits(logits, target.clamp(0, 1), reduction="none")


def mse(logits: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(logits, target, reduction="none")


def l1(logits: Tensor, target: Tensor) -> Tensor:
    return F.l1_loss(logits, target, reduction="none")


def huber(logits: Tensor, target: Tensor, *, delta: float = 0.1) -> Tensor:
    """Squared up to `delta`, a share of the target's range, and straight beyond (torch's, halved)."""
    return F.huber_loss(logits, target, delta=delta, reduction="none")


def ordinal(logits: Tensor, target: Tensor, *, bins: int = BINS) -> Tensor:
    """Binary cross entropy of `above this threshold?`, the mean over bins - 1 evenly spaced thresholds."""
    each = logits.unflatten(1, (target.shape[1], bins - 1))  # (B, T, O)
    return F.binary_cross_entropy_with_logits(each, ordinal_targets(target, bins), reduction="none").mean(2)


def distribution(logits: Tensor, target: Tensor, *, bins: int = BINS, sigma: float = 1.0) -> Tensor:
    """Cross entropy with a Gaussian around the target over evenly spaced bins, `sigma` bins wide (label distribution
    learning)."""
    each = logits.unflatten(1, (target.shape[1], bins))  # (B, T, O)
    return -(bin_targets(target, bins, sigma) * each.log_softmax(2)).sum(2)


LOSSES: dict[str, dict[str, Callable[..., Tensor]]] = {
    "classification": {
        "cross_entropy": cross_entropy,
        "bce": binary,
        "bce_rsb": partial(binary, threshold=RSB_THRESHOLD),  # ResNet strikes back (Wightman et al. 2021)
        "bce_deit3": partial(
            binary, threshold=0.0
        ),  # DeiT III (engine.py:43-44): both pictures of a mixture count in full
        "sigmoid": partial(binary, sum_classes=True),
    },  # big_vision's sigmoid_xent
    "multilabel": {"bce": bce},
    "regression": {"bce": bce, "mse": mse, "l1": l1, "huber": huber, "ordinal": ordinal, "distribution": distribution},
}
TEXTS = {
    "cross_entropy": "softmax cross entropy with the targets, smoothed or mixed",
    "bce": "binary cross entropy a class, a label or a target scaled to 0-1, the mean over batch and outputs (of "
    "classes timm's --bce-loss)",
    "bce_rsb": "the same with 1 for every target above 0.2 (ResNet strikes back)",
    "bce_deit3": "the same with 1 for every target above 0 (DeiT III); not with --label_smoothing",
    "sigmoid": "binary cross entropy summed over classes, mean over the batch (big_vision)",
    "mse": "squared error of the target scaled to 0-1",
    "l1": "absolute error of the target scaled to 0-1",
    "huber": "squared up to delta (0.1 of the target's range), straight beyond",
    "ordinal": "binary cross entropy of `above this threshold?` over bins (20) - 1 thresholds; the prediction is "
    "their mean",
    "distribution": "cross entropy with a Gaussian of width sigma (1 bin) over bins (20); the prediction is the mean "
    "of the distribution, "
    "which cannot come near an end of the range (sigma 1 of 20 bins: 2.7 % of it)",
}


def default(task: str) -> str:
    return "cross_entropy" if task == "classification" else "bce"


def tasks_of(name: str) -> list[str]:
    return [task for task, known in LOSSES.items() if name in known]


def keywords(name: str, task: str) -> list[str]:
    """The keywords that `--loss_args` may have."""
    function = LOSSES[task][name]
    own = inspect.signature(getattr(function, "func", function)).parameters.values()  # not what a partial has settled
    weights = [] if task == "classification" else ["target_weights"]
    return [each.name for each in own if each.kind is each.KEYWORD_ONLY] + weights


class PerTarget:
    """The mean loss over batch and targets (B, T) in own units -> scalar; `rows` gives that of each picture.

    Args:
        each: (logits, targets 0-1) -> (B, T).
        spec: of a regression its target_range scales the targets.
        smoothing: of labels, y (1 - smoothing) + smoothing / 2, as torch smooths two classes; evaluation does without.
        target_weights: of the T columns, relative to their mean; None weighs all alike.
    """

    def __init__(
        self, each: Callable[[Tensor, Tensor], Tensor], spec: Spec, smoothing: float, target_weights: list[float] | None
    ):
        self.each, self.smoothing = each, smoothing
        self.target_range = spec["target_range"] if spec["task"] == "regression" else None
        self.weights = None if target_weights is None else torch.tensor(target_weights, dtype=torch.float32)

    def rows(self, logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
        target = target.float() if self.target_range is None else scale(target, self.target_range)
        each = self.each(logits, target * (1 - smoothing) + smoothing / 2 if smoothing else target)  # (B, T)
        if self.weights is not None:
            weights = self.weights.to(each.device)
            each = each * (weights / weights.mean())
        return each.mean(1)

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.rows(logits, target, self.smoothing).mean()


def create(name: str, spec: Spec, smoothing: float = 0.0, **loss_args: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """(logits (B, num_outputs), targets of a batch) -> the mean loss, a scalar. Of multilabel and regression it is a
    `PerTarget`.

    Raises ValueError, naming the flags, for a loss or a keyword that is not for the task, and for a value that cannot
    be.
    """
    task = spec["task"]
    if name not in LOSSES[task]:
        raise ValueError(
            f"--loss {name} is for {' and '.join(tasks_of(name)) or 'nothing'}; for {task} there are "
            f"{', '.join(LOSSES[task])}"
        )
    known = keywords(name, task)
    for key in loss_args:
        if key not in known:
            raise ValueError(
                f"--loss_args.{key}: --loss {name} of a {task} takes {', '.join(known) or 'none'}{closest(key, known)}"
            )
    check_values(loss_args)
    if task == "classification":
        return partial(LOSSES[task][name], smoothing=smoothing, **loss_args)
    if smoothing and task == "regression":
        raise ValueError(
            f"--label_smoothing {smoothing} is for classes and labels; of a regression --label_smoothing 0"
        )
    names = spec["class_names"] or spec["target_names"] or []
    weights = loss_args.get("target_weights")
    if weights is not None and len(weights) != len(names):
        raise ValueError(
            f"--loss_args.target_weights has {len(weights)} numbers, the data {len(names)} targets "
            f"({', '.join(names[:5])})"
        )
    each = partial(LOSSES[task][name], **{key: value for key, value in loss_args.items() if key != "target_weights"})
    return PerTarget(each, spec, smoothing, weights)


def check_values(loss_args: dict[str, Any]) -> None:
    """Raises ValueError for a value of a known keyword that cannot be."""

    def positive(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and math.isfinite(value)

    bins, weights = loss_args.get("bins", BINS), loss_args.get("target_weights", [1])
    if not isinstance(bins, int) or isinstance(bins, bool) or bins < 2:
        raise ValueError(f"--loss_args.bins {bins}: must be a whole number, at least 2")
    for key in ("sigma", "delta"):
        if key in loss_args and not positive(loss_args[key]):
            raise ValueError(f"--loss_args.{key} {loss_args[key]}: must be a positive number")
    if not isinstance(weights, list | tuple) or not weights or not all(map(positive, weights)):
        raise ValueError(f"--loss_args.target_weights {weights}: give a positive number for each target, as [1,2]")


def check_loss(name: str, *, smoothing: float, mixing: bool, num_outputs: int) -> None:
    """Raise ValueError, naming the flags, for a loss of classes that would learn from other targets than it says."""
    low, high = smoothing / num_outputs, 1 - smoothing + smoothing / num_outputs
    if name == "bce_deit3" and smoothing:
        raise ValueError(
            f"--loss bce_deit3 counts every target above 0: with --label_smoothing {smoothing} all classes would be "
            f"right; set it to 0"
        )
    if name == "bce_rsb" and low > RSB_THRESHOLD:
        raise ValueError(
            f"--loss bce_rsb counts every target above {RSB_THRESHOLD}: with --label_smoothing {smoothing} and "
            f"{num_outputs} "
            f"classes a wrong class has {low:.3g}, so all would be right; lower --label_smoothing"
        )
    if name == "bce_rsb" and (high / 2 + low / 2 if mixing else high) <= RSB_THRESHOLD:
        raise ValueError(
            f"--loss bce_rsb counts only targets above {RSB_THRESHOLD}: with --label_smoothing {smoothing} and "
            f"{num_outputs} "
            f"classes a right class may have less, so none would be right; lower --label_smoothing"
        )
