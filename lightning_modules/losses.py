"""Losses of classification: logits (B, K) against class numbers (B,) int64, or soft targets (B, K) with smoothing already in them."""
from collections.abc import Callable
from functools import partial

from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor
from torch.nn import functional as F

RSB_THRESHOLD = 0.2


def cross_entropy(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Softmax cross entropy, the mean over the batch."""
    if target.ndim == logits.ndim:
        return SoftTargetCrossEntropy()(logits, target)
    return F.cross_entropy(logits, target, label_smoothing=smoothing)


def binary(logits: Tensor, target: Tensor, smoothing: float, *, threshold: float | None = None, sum_classes: bool = False) -> Tensor:
    """Each class a question of its own (timm's BinaryCrossEntropy): the mean over batch and classes, or their sum averaged over the batch.

    Class numbers become smoothed one-hot rows first; `threshold` makes 1 of every target above it and 0 of the rest.
    """
    return BinaryCrossEntropy(smoothing, target_threshold=threshold, sum_classes=sum_classes)(logits, target)


LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "cross_entropy": cross_entropy,
    "bce": binary,
    "bce_rsb": partial(binary, threshold=RSB_THRESHOLD),  # ResNet strikes back (Wightman et al. 2021)
    "bce_deit3": partial(binary, threshold=0.0),  # DeiT III (engine.py:43-44): both pictures of a mixture count in full
    "sigmoid": partial(binary, sum_classes=True),  # big_vision's sigmoid_xent
}
TEXTS = {
    "cross_entropy": "softmax cross entropy with the targets, smoothed or mixed",
    "bce": "binary cross entropy a class with the targets as they are, mean over batch and classes (timm's --bce-loss)",
    "bce_rsb": "the same with 1 for every target above 0.2 (ResNet strikes back)",
    "bce_deit3": "the same with 1 for every target above 0 (DeiT III); not with --label_smoothing",
    "sigmoid": "binary cross entropy summed over classes, mean over the batch (big_vision)",
}


def check_loss(name: str, *, smoothing: float, mixing: bool, num_outputs: int) -> None:
    """Raise ValueError, naming the flags, for a loss that would learn from other targets than it says."""
    low, high = smoothing / num_outputs, 1 - smoothing + smoothing / num_outputs
    if name == "bce_deit3" and smoothing:
        raise ValueError(f"--loss bce_deit3 counts every target above 0: with --label_smoothing {smoothing} all classes would be right; set it to 0")
    if name == "bce_rsb" and low > RSB_THRESHOLD:
        raise ValueError(f"--loss bce_rsb counts every target above {RSB_THRESHOLD}: with --label_smoothing {smoothing} and {num_outputs} "
                         f"classes a wrong class has {low:.3g}, so all would be right; lower --label_smoothing")
    if name == "bce_rsb" and (high / 2 + low / 2 if mixing else high) <= RSB_THRESHOLD:
        raise ValueError(f"--loss bce_rsb counts only targets above {RSB_THRESHOLD}: with --label_smoothing {smoothing} and {num_outputs} "
                         f"classes a right class may have less, so none would be right; lower --label_smoothing")
