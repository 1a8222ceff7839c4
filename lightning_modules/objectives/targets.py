"""Target encoding: the one place where targets are scaled for learning and predictions are scaled back to their own
units.

Pure torch, so that inference needs no more. Legend: B pictures, K classes or labels, T targets of a regression, O
outputs of each, N bins.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from models.spec import Spec

ENCODINGS = {
    "bce": "sigmoid",
    "mse": "linear",
    "l1": "linear",
    "huber": "linear",
    "ordinal": "ordinal",
    "distribution": "bins",
}  # by loss
BINS = 20  # of `ordinal` and `distribution`, unless --loss_args.bins says another number


def encoding_of(loss: str | None, bins: int = BINS) -> tuple[str, int]:
    """(encoding, outputs for each target) of a regression loss; of `bce`, the default, where none is given or it is not
    for regression."""
    encoding = ENCODINGS.get(loss or "bce", "sigmoid")
    return encoding, {"ordinal": bins - 1, "bins": bins}.get(encoding, 1)


def scale(target: Tensor, target_range: list[list[float]] | None) -> Tensor:
    """(B, T) in own units, float64 -> float32, 0-1 within each target's range; values outside of it go beyond 0-1."""
    low, high = torch.tensor(target_range, dtype=torch.float64, device=target.device).T
    return ((target - low) / (high - low)).float()


def predict(logits: Tensor, spec: Spec) -> Tensor:
    """Logits (B, num_outputs) -> predictions: classification (B, K) probabilities that sum to 1, multilabel (B,
    K) probabilities, both float32; regression (B, T) in the targets' own units, float64 since 32 bits hold no more than
    24 of an offset.

    Encodings of a regression: `sigmoid` and `linear` give the scaled target; `ordinal` the probabilities that it lies
    above each of N - 1 evenly spaced thresholds; `bins` the distribution over N evenly spaced values, of which the mean
    is taken.
    """
    logits = logits.float()
    if spec["task"] == "classification":
        return logits.softmax(1)
    if spec["task"] == "multilabel":
        return logits.sigmoid()
    low, high = torch.tensor(spec["target_range"], dtype=torch.float64, device=logits.device).T  # (T,)
    return torch.lerp(low, high, expectation(logits, spec["encoding"], len(low)).double())  # exact at both ends


def expectation(logits: Tensor, encoding: str | None, targets: int) -> Tensor:
    """Logits (B, T * O) of a regression -> scaled targets (B, T)."""
    if encoding == "linear":
        return logits
    if encoding == "sigmoid":
        return logits.sigmoid()
    each = logits.unflatten(1, (targets, -1))  # (B, T, O)
    if encoding == "ordinal":
        return each.sigmoid().mean(2)
    return (each.softmax(2) * torch.linspace(0, 1, each.shape[2], device=logits.device)).sum(2)


def ordinal_targets(scaled: Tensor, bins: int) -> Tensor:
    """(B, T) 0-1 -> (B, T, N - 1) 1 where the target lies above a threshold, 0 below, in between at the threshold next
    to it: its mean over the thresholds is the target, so that `expectation` inverts it."""
    place = scaled.clamp(0, 1)[..., None] * (bins - 1)
    return (place - torch.arange(bins - 1, device=scaled.device)).clamp(0, 1)


def bin_targets(scaled: Tensor, bins: int, sigma: float) -> Tensor:
    """(B, T) 0-1 -> (B, T, N) a Gaussian label distribution around the target, `sigma` in bins (Gao et al. 2017, arXiv
    1611.01731).

    The range cuts it off: within 2 sigma of an end the mean, which is predicted, lies further inside than the target,
    at the end itself by 0.52 of 19 steps with 20 bins and sigma 1 (2.7 % of the range).
    """
    place = scaled.clamp(0, 1)[..., None] * (bins - 1)
    return F.softmax(-(((place - torch.arange(bins, device=scaled.device)) / sigma) ** 2) / 2, dim=-1)
