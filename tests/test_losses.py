"""Losses against timm's, torch's and numbers worked out by hand, and the refusal of what would learn from wrong targets."""
import math

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch.nn import functional as F

from lightning_modules import losses
from lightning_modules.losses import check_loss

LOSSES = losses.LOSSES["classification"]


@pytest.fixture
def logits():
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def soft():
    return torch.rand(6, 5, generator=torch.Generator().manual_seed(1)).softmax(1)


TARGET = torch.tensor([0, 4, 2, 2, 1, 3])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_numbers(logits, smoothing):
    def value(name):
        return float(LOSSES[name](logits, TARGET, smoothing))
    assert value("cross_entropy") == pytest.approx(float(LabelSmoothingCrossEntropy(smoothing)(logits, TARGET)), rel=1e-6)
    assert value("bce") == float(BinaryCrossEntropy(smoothing)(logits, TARGET))
    assert value("bce_rsb") == float(BinaryCrossEntropy(smoothing, target_threshold=0.2)(logits, TARGET))
    one_hot = F.one_hot(TARGET, 5).float()
    assert value("bce_rsb") == pytest.approx(float(F.binary_cross_entropy_with_logits(logits, one_hot)), rel=1e-6)  # smoothing is undone
    smooth = one_hot * (1 - smoothing) + smoothing / 5
    assert value("sigmoid") == pytest.approx(5 * float(F.binary_cross_entropy_with_logits(logits, smooth)), rel=1e-6)
    if not smoothing:
        assert value("bce_deit3") == value("bce_rsb")


def test_soft_targets(logits, soft):
    def value(name, target=soft):
        return float(LOSSES[name](logits, target, 0.1))
    assert value("cross_entropy") == float(SoftTargetCrossEntropy()(logits, soft))
    assert value("cross_entropy") == pytest.approx(float(F.cross_entropy(logits, soft)), rel=1e-6)
    assert value("bce") == pytest.approx(float(F.binary_cross_entropy_with_logits(logits, soft)), rel=1e-6)  # not smoothed twice
    assert value("bce_rsb") == float(BinaryCrossEntropy(target_threshold=0.2)(logits, soft))
    sparse = soft * (soft > 0.2)
    assert value("bce_deit3", sparse) == float(F.binary_cross_entropy_with_logits(logits, sparse.gt(0.0).type(sparse.dtype)))


def test_sigmoid_equals_big_visions_formula(logits, soft):
    x, labels = logits.double().numpy(), soft.double().numpy()
    log_p, log_not_p = -np.logaddexp(0, -x), -np.logaddexp(0, x)
    expected = -np.sum(labels * log_p + (1.0 - labels) * log_not_p, axis=-1)
    assert float(LOSSES["sigmoid"](logits, soft, 0.0)) == pytest.approx(expected.mean(), rel=1e-6)


def test_by_hand():
    """Logits 0 and ln 3: softmax 1/4, 3/4; sigmoid 1/2, 3/4."""
    logits, soft = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.1, 0.9]])
    first = math.log(2)
    right, wrong = -math.log(3 / 4), -math.log(1 / 4)
    expected = {"cross_entropy": 0.1 * math.log(4) + 0.9 * right, "bce": (first + 0.9 * right + 0.1 * wrong) / 2, "bce_rsb": (first + right) / 2,
                "bce_deit3": (first + right) / 2, "sigmoid": first + 0.9 * right + 0.1 * wrong}
    for name, loss in LOSSES.items():
        assert float(loss(logits, soft, 0.0)) == pytest.approx(expected[name], rel=1e-6), name


def test_deit3_counts_both_pictures_of_a_mixture_in_full():
    mixed = Mixup(mixup_alpha=1.0, label_smoothing=0.0, num_classes=5)(torch.zeros(6, 3, 4, 4), TARGET)[1]
    logits = torch.full((6, 5), -30.0)
    logits.scatter_(1, TARGET[:, None], 30.0).scatter_(1, TARGET.flip(0)[:, None], 30.0)
    assert float(LOSSES["bce_deit3"](logits, mixed, 0.0)) < 1e-6 < float(LOSSES["bce"](logits, mixed, 0.0))


@pytest.mark.parametrize("name, settings, says", [
    ("bce_deit3", {"smoothing": 0.1}, "--loss bce_deit3 .* --label_smoothing 0.1"),
    ("bce_rsb", {"smoothing": 0.5, "num_outputs": 2}, "--loss bce_rsb .* all would be right"),
    ("bce_rsb", {"smoothing": 0.9}, "--loss bce_rsb .* none would be right"),
    ("bce_rsb", {"smoothing": 0.7, "mixing": True}, "--loss bce_rsb .* none would be right"),
])
def test_wrong_combinations_are_refused(name, settings, says):
    with pytest.raises(ValueError, match=says):
        check_loss(name, **{"smoothing": 0.0, "mixing": False, "num_outputs": 1000} | settings)


def test_what_is_refused_would_have_had_wrong_targets(logits):
    """The targets that the losses would have seen: their gradient at 0 is 1/2 minus the target."""
    zero = torch.zeros(6, 5, requires_grad=True)

    def targets(name, smoothing):
        return 0.5 - torch.autograd.grad(LOSSES[name](zero, TARGET, smoothing), zero)[0] * zero.numel()
    assert (targets("bce_deit3", 0.1) == 1).all() and torch.equal(targets("bce_deit3", 0.0), F.one_hot(TARGET, 5).float())
    assert torch.equal(targets("bce_rsb", 0.1), F.one_hot(TARGET, 5).float())
    for name in LOSSES:
        check_loss(name, smoothing=0.0, mixing=True, num_outputs=2)
    for name in set(LOSSES) - {"bce_deit3"}:
        check_loss(name, smoothing=0.1, mixing=True, num_outputs=10)
