"""Losses against timm's, torch's and numbers worked out by hand, and the refusal of what would learn from wrong
targets."""

import math

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch.nn import functional as F

from lightning_modules.objectives import losses
from lightning_modules.objectives.losses import check_loss
from lightning_modules.objectives.targets import encoding_of, predict

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

    assert value("cross_entropy") == pytest.approx(
        float(LabelSmoothingCrossEntropy(smoothing)(logits, TARGET)), rel=1e-6
    )
    assert value("bce") == float(BinaryCrossEntropy(smoothing)(logits, TARGET))
    assert value("bce_rsb") == float(BinaryCrossEntropy(smoothing, target_threshold=0.2)(logits, TARGET))
    one_hot = F.one_hot(TARGET, 5).float()
    assert value("bce_rsb") == pytest.approx(
        float(F.binary_cross_entropy_with_logits(logits, one_hot)), rel=1e-6
    )  # smoothing is undone
    smooth = one_hot * (1 - smoothing) + smoothing / 5
    assert value("sigmoid") == pytest.approx(5 * float(F.binary_cross_entropy_with_logits(logits, smooth)), rel=1e-6)
    if not smoothing:
        assert value("bce_deit3") == value("bce_rsb")


def test_soft_targets(logits, soft):
    def value(name, target=soft):
        return float(LOSSES[name](logits, target, 0.1))

    assert value("cross_entropy") == float(SoftTargetCrossEntropy()(logits, soft))
    assert value("cross_entropy") == pytest.approx(float(F.cross_entropy(logits, soft)), rel=1e-6)
    assert value("bce") == pytest.approx(
        float(F.binary_cross_entropy_with_logits(logits, soft)), rel=1e-6
    )  # not smoothed twice
    assert value("bce_rsb") == float(BinaryCrossEntropy(target_threshold=0.2)(logits, soft))
    sparse = soft * (soft > 0.2)
    assert value("bce_deit3", sparse) == float(
        F.binary_cross_entropy_with_logits(logits, sparse.gt(0.0).type(sparse.dtype))
    )


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
    expected = {
        "cross_entropy": 0.1 * math.log(4) + 0.9 * right,
        "bce": (first + 0.9 * right + 0.1 * wrong) / 2,
        "bce_rsb": (first + right) / 2,
        "bce_deit3": (first + right) / 2,
        "sigmoid": first + 0.9 * right + 0.1 * wrong,
    }
    for name, loss in LOSSES.items():
        assert float(loss(logits, soft, 0.0)) == pytest.approx(expected[name], rel=1e-6), name


def test_deit3_counts_both_pictures_of_a_mixture_in_full():
    mixed = Mixup(mixup_alpha=1.0, label_smoothing=0.0, num_classes=5)(torch.zeros(6, 3, 4, 4), TARGET)[1]
    logits = torch.full((6, 5), -30.0)
    logits.scatter_(1, TARGET[:, None], 30.0).scatter_(1, TARGET.flip(0)[:, None], 30.0)
    assert float(LOSSES["bce_deit3"](logits, mixed, 0.0)) < 1e-6 < float(LOSSES["bce"](logits, mixed, 0.0))


@pytest.mark.parametrize(
    "name, settings, says",
    [
        ("bce_deit3", {"smoothing": 0.1}, "--loss bce_deit3 .* --label_smoothing 0.1"),
        ("bce_rsb", {"smoothing": 0.5, "num_outputs": 2}, "--loss bce_rsb .* all would be right"),
        ("bce_rsb", {"smoothing": 0.9}, "--loss bce_rsb .* none would be right"),
        ("bce_rsb", {"smoothing": 0.7, "mixing": True}, "--loss bce_rsb .* none would be right"),
    ],
)
def test_wrong_combinations_are_refused(name, settings, says):
    with pytest.raises(ValueError, match=says):
        check_loss(name, **{"smoothing": 0.0, "mixing": False, "num_outputs": 1000} | settings)


def test_what_is_refused_would_have_had_wrong_targets(logits):
    """The targets that the losses would have seen: their gradient at 0 is 1/2 minus the target."""
    zero = torch.zeros(6, 5, requires_grad=True)

    def targets(name, smoothing):
        return 0.5 - torch.autograd.grad(LOSSES[name](zero, TARGET, smoothing), zero)[0] * zero.numel()

    assert (targets("bce_deit3", 0.1) == 1).all() and torch.equal(
        targets("bce_deit3", 0.0), F.one_hot(TARGET, 5).float()
    )
    assert torch.equal(targets("bce_rsb", 0.1), F.one_hot(TARGET, 5).float())
    for name in LOSSES:
        check_loss(name, smoothing=0.0, mixing=True, num_outputs=2)
    for name in set(LOSSES) - {"bce_deit3"}:
        check_loss(name, smoothing=0.1, mixing=True, num_outputs=10)


LABELS = {"task": "multilabel", "class_names": list("abc"), "num_outputs": 3}
ONE = {"task": "regression", "class_names": None, "target_names": ["y"], "target_range": [[10.0, 110.0]]}
TWO = ONE | {"target_names": ["y", "z"], "target_range": [[10.0, 110.0], [-1.0, 1.0]]}


def numbers(outputs=1, targets=2, seed=3):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, targets * outputs, generator=rng)
    scaled = torch.rand(8, targets, generator=rng)
    low, high = torch.tensor(TWO["target_range"][:targets]).T
    return logits, scaled, low + scaled * (high - low)


def test_multilabel_is_torchs_binary_cross_entropy():
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(3))
    target = (torch.rand(8, 3, generator=torch.Generator().manual_seed(1)) > 0.6).float()
    loss = losses.create("bce", LABELS)
    assert float(loss(logits, target)) == pytest.approx(
        float(F.binary_cross_entropy_with_logits(logits, target)), rel=1e-6
    )
    each = [
        F.cross_entropy(torch.stack([0 * column, column], 1), labels.long(), label_smoothing=0.2)
        for column, labels in zip(logits.T, target.T)
    ]
    smooth = losses.create("bce", LABELS, 0.2)  # torch's smoothing of two classes, of which the other has logit 0
    assert float(smooth(logits, target)) == pytest.approx(float(torch.stack(each).mean()), rel=1e-6)
    assert torch.equal(smooth.rows(logits, target), loss.rows(logits, target)) and loss.rows(logits, target).shape == (
        8,
    )
    assert float(loss(logits, target)) == pytest.approx(float(BinaryCrossEntropy(0.0)(logits, target)), rel=1e-6)
    mixed = 0.3 * target + 0.7 * target.flip(0)
    assert float(loss(logits, mixed)) == pytest.approx(
        float(F.binary_cross_entropy_with_logits(logits, mixed)), rel=1e-6
    )


@pytest.mark.parametrize(
    "name, theirs, given",
    [
        ("bce", F.binary_cross_entropy_with_logits, {}),
        ("mse", F.mse_loss, {}),
        ("l1", F.l1_loss, {}),
        ("huber", lambda logits, scaled: F.huber_loss(logits, scaled, delta=0.1), {}),
        ("huber", lambda logits, scaled: F.huber_loss(logits, scaled, delta=0.5), {"delta": 0.5}),
    ],
)
def test_regression_losses_are_torchs_on_targets_scaled_to_0_1(name, theirs, given):
    logits, scaled, target = numbers()
    assert float(losses.create(name, TWO, **given)(logits, target)) == pytest.approx(
        float(theirs(logits, scaled)), rel=1e-5
    )
    first = losses.create(name, ONE, **given)(logits[:, :1], target[:, :1])
    assert float(first) == pytest.approx(float(theirs(logits[:, :1], scaled[:, :1])), rel=1e-5)


def test_target_weights():
    logits, scaled, target = numbers()
    a, b = F.mse_loss(logits, scaled, reduction="none").mean(0)
    for weights in ([1, 3], [0.5, 1.5]):
        found = losses.create("mse", TWO, target_weights=weights)(logits, target)
        assert float(found) == pytest.approx(float((a + 3 * b) / 4), rel=1e-5)
    assert float(losses.create("mse", TWO, target_weights=[7, 7])(logits, target)) == pytest.approx(
        float((a + b) / 2), rel=1e-5
    )


def test_ordinal_and_distribution_by_hand():
    """Three bins of 0-1 stand at 0, 1/2, 1; the thresholds between them are passed at 1/4's half, ... : the target 3/4
    is 1 above the first, half above the second."""
    logits, target = torch.tensor([[0.3, -0.2]]), torch.tensor([[85.0]])
    expected = F.binary_cross_entropy_with_logits(logits, torch.tensor([[1.0, 0.5]]))
    assert float(losses.create("ordinal", ONE, bins=3)(logits, target)) == pytest.approx(float(expected), rel=1e-6)
    logits, place = torch.tensor([[0.3, -0.2, 0.9]]), np.array([0.0, 1.0, 2.0])
    gauss = np.exp(-(((1.5 - place) / 0.7) ** 2) / 2)
    expected = F.cross_entropy(logits, torch.tensor((gauss / gauss.sum())[None], dtype=torch.float32))
    assert float(losses.create("distribution", ONE, bins=3, sigma=0.7)(logits, target)) == pytest.approx(
        float(expected), rel=1e-6
    )
    for name, outputs in (("ordinal", 4), ("distribution", 5)):
        logits, _, target = numbers(outputs)
        both = losses.create(name, TWO, bins=5)(logits, target)
        alone = [losses.create(name, {**ONE, "target_range": [limits]}, bins=5) for limits in TWO["target_range"]]
        apart = [loss(logits.unflatten(1, (2, -1))[:, t], target[:, t : t + 1]) for t, loss in enumerate(alone)]
        assert float(both) == pytest.approx(float(sum(apart) / 2), rel=1e-6)


@pytest.mark.parametrize(
    "name, given",
    [
        ("bce", {}),
        ("mse", {}),
        ("l1", {}),
        ("huber", {}),
        ("ordinal", {"bins": 9}),
        ("distribution", {"bins": 21, "sigma": 0.5}),
    ],
)
def test_the_best_logits_give_the_target_back_in_its_units(name, given):
    """What minimises the loss is what `predict` turns into the target."""
    target = torch.tensor([[20.0, -0.5], [60.0, 0.0], [100.0, 0.9]])
    encoding, outputs = encoding_of(name, given.get("bins", 20))
    logits = torch.zeros(3, 2 * outputs, requires_grad=True)
    loss, learner = losses.create(name, TWO, **given), torch.optim.Adam([logits], 0.05)
    for step in range(1500):
        learner.param_groups[0]["lr"] = 0.05 * (1 - step / 1500)
        learner.zero_grad()
        loss(logits, target).backward()
        learner.step()
    found = predict(logits.detach(), TWO | {"encoding": encoding})
    assert torch.allclose(found, target.double(), atol=0.02, rtol=0.02), found


def test_targets_out_of_the_range_count_as_its_end_where_the_loss_is_bounded():
    logits, ends, beyond = torch.full((2, 1), 0.7), torch.tensor([[10.0], [110.0]]), torch.tensor([[-50.0], [200.0]])
    for name, given in (("bce", {}), ("ordinal", {"bins": 2}), ("distribution", {"bins": 3})):
        outputs = {"distribution": 3}.get(name, 1)
        loss = losses.create(name, ONE, **given)
        assert torch.equal(loss.rows(logits.expand(2, outputs), beyond), loss.rows(logits.expand(2, outputs), ends))
    assert losses.create("mse", ONE)(logits, beyond) > losses.create("mse", ONE)(logits, ends)


def test_keyword_only_arguments_of_a_loss_of_classes_are_reached(monkeypatch):
    def scaled(logits, target, smoothing, *, by=1.0):
        return by * losses.cross_entropy(logits, target, smoothing)

    monkeypatch.setitem(losses.LOSSES["classification"], "scaled", scaled)
    spec, logits, target = {"task": "classification"}, torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    plain = losses.create("cross_entropy", spec, 0.1)(logits, target)
    assert torch.equal(losses.create("scaled", spec, 0.1, by=2.0)(logits, target), 2 * plain)
    for name in ("cross_entropy", "bce", "bce_rsb", "bce_deit3", "sigmoid"):
        with pytest.raises(ValueError, match="takes none"):
            losses.create(name, spec, threshold=0.5)


@pytest.mark.parametrize(
    "name, spec, given, says",
    [
        ("mse", LABELS, {}, "--loss mse is for regression; for multilabel there are bce"),
        ("mse", ONE, {"delta": 1}, "--loss_args.delta: --loss mse of a regression takes target_weights"),
        ("huber", ONE, {"dleta": 1}, "did you mean delta"),
        ("huber", ONE, {"delta": 0}, "--loss_args.delta 0: must be a positive number"),
        ("ordinal", ONE, {"bins": 1}, "at least 2"),
        ("distribution", ONE, {"bins": 2.5}, "whole number"),
        ("distribution", ONE, {"sigma": "x"}, "positive"),
        ("bce", TWO, {"target_weights": [1]}, "has 1 numbers, the data 2 targets .y, z."),
        ("bce", TWO, {"target_weights": [1, -1]}, "positive number for each"),
        ("bce", TWO, {"target_weights": 3}, "positive number for each"),
    ],
)
def test_what_a_loss_does_not_take(name, spec, given, says):
    with pytest.raises(ValueError, match=says):
        losses.create(name, spec, **given)
    with pytest.raises(ValueError, match="--label_smoothing 0.1 is for classes and labels"):
        losses.create("bce", ONE, 0.1)
