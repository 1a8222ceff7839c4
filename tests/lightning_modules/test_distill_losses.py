"""Distillation losses against DeiT's published code, timm's tasks and the papers' arithmetic written out in numpy."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_modules.objectives import distill_losses
from lightning_modules.objectives.distill_losses import LOSSES, create, default, keywords, names, weights

DEIT = json.loads((Path(__file__).parents[1] / "fixtures" / "deit_losses.json").read_text())
STUDENT = np.array([[1.0, 0.5, -1.0, 0.0], [0.2, -0.3, 2.0, 1.0], [-1.5, 0.4, 0.1, 0.7]])
TEACHER = np.array([[2.0, -1.0, 0.3, 0.1], [-0.5, 0.4, 1.2, 2.5], [0.3, 0.2, -2.0, 1.1]])
LABELS = np.array([0, 2, 3])
ON_LOGITS = [name for name in names() if not LOSSES[name].on_features]


def tensors(dtype=torch.float32):
    student, teacher = (
        torch.tensor(STUDENT, dtype=dtype).requires_grad_(),
        torch.tensor(TEACHER, dtype=dtype).requires_grad_(),
    )
    return student, teacher, torch.tensor(LABELS)


def softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("case", DEIT["cases"], ids=lambda c: "{distillation_type}-{alpha}-{tau}-{dtype}".format(**c))
def test_total_and_gradients_are_deits(case):
    dtype, kind = getattr(torch, case["dtype"]), case["distillation_type"]
    outputs, outputs_kd = (torch.tensor(DEIT[key], dtype=dtype).requires_grad_() for key in ("outputs", "outputs_kd"))
    total = F.cross_entropy(outputs.float(), labels := torch.tensor(DEIT["labels"]))
    if kind != "none":
        hyper = {"tau": case["tau"], "reduction": "numel"} if kind == "soft" else {}
        of_base, of_teacher = weights(kind, case["alpha"])
        total = of_base * total + of_teacher * create(kind, **hyper)(
            outputs_kd, torch.tensor(DEIT["teacher"], dtype=dtype), labels
        )
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(case["loss"], rel=2e-6)
    for ours, theirs in zip(torch.autograd.grad(total, (outputs, outputs_kd), allow_unused=True), case["grads"]):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(
                ours.float(), torch.tensor(theirs), rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-7
            )


class Network(nn.Module):
    """Logits that are its parameters, with what timm's tasks ask of a model."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = nn.ParameterList(outputs)
        self.pretrained_cfg, self.num_classes, self.in_chans, self.num_features = (
            {"mean": (0.5,) * 3, "std": (0.5,) * 3},
            4,
            3,
            4,
        )

    def forward(self, x):
        return tuple(self.outputs) if len(self.outputs) == 2 else self.outputs[0]

    def forward_features(self, x):
        return self.outputs[0]

    def forward_head(self, x, pre_logits=False):
        return x

    def set_distilled_training(self, enable=True):
        pass


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind, tau", [("soft", 1.0), ("soft", 3.0), ("hard", 1.0)])
def test_totals_are_those_of_timms_tasks(kind, tau, alpha):
    task = pytest.importorskip("timm.task")
    x, target = torch.zeros(3, 3, 8, 8), torch.tensor(LABELS)
    hyper = {"tau": tau} if kind == "soft" else {}
    of_base, of_teacher = weights(kind, alpha)
    given = {
        "teacher_model": Network(torch.tensor(TEACHER)),
        "criterion": nn.CrossEntropyLoss(),
        "task_loss_weight": 1 - alpha,
        "temperature": tau,
        "verbose": False,
    }

    def compare(theirs, base_logits, distilled_logits):
        ours = of_base * F.cross_entropy(base_logits, target) + of_teacher * create(kind, **hyper)(
            distilled_logits, torch.tensor(TEACHER), target
        )
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-7)
        for a, b in zip(*(torch.autograd.grad(each, (base_logits, distilled_logits)) for each in (ours, theirs))):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)

    student = Network(torch.tensor(STUDENT), torch.tensor(STUDENT[:, ::-1].copy()))
    compare(task.TokenDistillationTask(student, distill_type=kind, **given)(x, target)["loss"], *student.outputs)
    if kind == "soft":
        student = Network(torch.tensor(STUDENT))
        compare(task.LogitDistillationTask(student, **given)(x, target)["loss"], student.outputs[0], student.outputs[0])


def test_features_are_timms_task():
    task = pytest.importorskip("timm.task")
    student, teacher = Network(torch.tensor(STUDENT).float()), Network(torch.randn(3, 6))
    peer = task.FeatureDistillationTask(
        student,
        teacher_model=teacher,
        criterion=nn.CrossEntropyLoss(),
        distill_loss_weight=1.0,
        student_feature_dim=4,
        teacher_feature_dim=6,
        verbose=False,
    )
    ours = create("features", widths=(4, 6))
    ours.projection.load_state_dict(peer.trainable_module.projection.state_dict())
    of_base, of_teacher = weights("features")
    total = of_base * F.cross_entropy(student.outputs[0], torch.tensor(LABELS)) + of_teacher * ours(
        student.outputs[0], teacher.outputs[0]
    )
    torch.testing.assert_close(total, peer(torch.zeros(3, 3, 8, 8), torch.tensor(LABELS))["loss"])


def test_features_by_cosine_and_by_numbers():
    a, b = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[6.0, 8.0], [0.0, 5.0]])
    assert create("features", widths=(2, 2), metric="cosine")(a, b).item() == pytest.approx((0 + 1) / 2)
    assert create("features", widths=(2, 2))(a, b).item() == pytest.approx((9 + 16 + 1 + 25) / 4)
    assert [p.shape for p in create("features", widths=(2, 5)).parameters()] == [(5, 2), (5,)]


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_binary_is_soft_on_each_label_as_two_classes(tau):
    student, teacher, labels = tensors()
    expected = [
        create("soft", tau=tau)(
            *(torch.stack([torch.zeros(3), logits[:, k]], 1) for logits in (student, teacher)), labels
        )
        for k in range(4)
    ]
    assert create("binary", "multilabel", tau=tau)(student, teacher, labels).item() == pytest.approx(
        float(sum(expected) / 4), rel=1e-5
    )
    assert create("binary", "multilabel")(teacher, teacher, labels).item() == 0


@pytest.mark.parametrize("tau, target_weight, beta", [(1.0, 1.0, 0.5), (4.0, 1.0, 8.0), (2.0, 0.3, 2.0)])
def test_dkd_is_the_papers(tau, target_weight, beta):
    s, t, expected = softmax(STUDENT / tau), softmax(TEACHER / tau), 0.0
    for i, label in enumerate(LABELS):
        ps, pt = s[i, label], t[i, label]
        tckd = pt * np.log(pt / ps) + (1 - pt) * np.log((1 - pt) / (1 - ps))
        qs, qt = (np.delete(p[i], label) / (1 - p[i, label]) for p in (s, t))
        expected += tau**2 * (target_weight * tckd + beta * (qt * np.log(qt / qs)).sum()) / 3
    loss = create("dkd", tau=tau, target_weight=target_weight, beta=beta)
    assert loss(*tensors()).item() == pytest.approx(expected, rel=1e-5)


def test_dkd_couples_again_to_plain_distillation():
    """The paper's equation 6: KL = TCKD + (1 - p_t) NCKD, for a single picture."""
    student, teacher, labels = (each[:1] for each in tensors())
    rest = 1 - teacher.softmax(1)[0, labels[0]].item()
    assert create("dkd", beta=rest)(student, teacher, labels).item() == pytest.approx(
        create("soft")(student, teacher, labels).item(), rel=1e-5
    )


@pytest.mark.parametrize("tau, beta, gamma", [(1.0, 2.0, 2.0), (4.0, 1.0, 0.5)])
def test_dist_is_the_papers(tau, beta, gamma):
    s, t = softmax(STUDENT / tau), softmax(TEACHER / tau)
    rows = np.mean([1 - np.corrcoef(s[i], t[i])[0, 1] for i in range(3)])
    columns = np.mean([1 - np.corrcoef(s[:, k], t[:, k])[0, 1] for k in range(4)])
    expected = tau**2 * (beta * rows + gamma * columns)
    assert create("dist", tau=tau, beta=beta, gamma=gamma)(*tensors()).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("tau, gamma", [(1.0, 1.5), (2.0, 0.7)])
def test_nkd_is_the_papers(tau, gamma):
    expected = 0.0
    for s, t, label in zip(STUDENT, TEACHER, LABELS):
        expected -= softmax(t[None])[0, label] * np.log(softmax(s[None])[0, label]) / 3
        others_s, others_t = (softmax(np.delete(each, label)[None] / tau)[0] for each in (s, t))
        expected -= gamma * tau**2 * (others_t * np.log(others_s)).sum() / 3
    assert create("nkd", tau=tau, gamma=gamma)(*tensors()).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["dkd", "nkd"])
def test_a_mixed_picture_has_the_class_it_shows_most_of(name):
    student, teacher, labels = tensors()
    mixed = 0.6 * F.one_hot(labels, 4) + 0.4 * F.one_hot(labels.roll(1), 4)
    assert torch.equal(create(name)(student, teacher, mixed), create(name)(student, teacher, labels))
    assert not torch.equal(create(name)(student, teacher, mixed), create(name)(student, teacher, labels.roll(1)))


@pytest.mark.parametrize("name", ["soft", "dkd", "dist", "mse"])
def test_nothing_is_left_to_learn_from_an_equal(name):
    _, teacher, labels = tensors()
    student = teacher.detach().clone().requires_grad_()
    loss = create(name)(student, teacher, labels)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-6
    assert create("features", widths=(4, 4))(teacher, teacher).item() == 0
    assert create("features", widths=(4, 4), metric="cosine")(teacher, teacher).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ON_LOGITS)
def test_gradients_reach_the_student_alone_and_are_computed_in_float32(name):
    student, teacher, labels = tensors(torch.bfloat16)
    loss = create(name, LOSSES[name].tasks[0])(student, teacher, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and student.grad.abs().max() > 0 and teacher.grad is None
    plain = create(name, LOSSES[name].tasks[0])(student.detach().float(), teacher.detach().float(), labels)
    assert torch.equal(loss, plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(create(name, LOSSES[name].tasks[0])(student, teacher, labels), plain)


def test_features_gradients_reach_the_student_and_the_projection_alone():
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    loss = create("features", widths=(4, 6))
    loss(student, teacher).backward()
    assert student.grad is not None and teacher.grad is None and all(p.grad is not None for p in loss.parameters())


@pytest.mark.parametrize("name", ON_LOGITS)
def test_extreme_logits_stay_finite(name):
    student = torch.tensor([[300.0, -300.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    loss = create(name, LOSSES[name].tasks[0])(
        student, torch.tensor([[-300.0, 300.0, 0.0], [500.0, 0.0, 0.0]]), torch.tensor([0, 1])
    )
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_weights_without_alpha_are_the_published_ones():
    assert {name: weights(name) for name in ("soft", "hard", "dkd", "dist", "nkd", "features")} == {
        "soft": (0.5, 0.5),
        "hard": (0.5, 0.5),
        "dkd": (1, 1),
        "dist": (1, 1),
        "nkd": (1, 1),
        "features": (1, 1),
    }
    assert weights("dkd", 0.2) == (0.8, 0.2)
    with pytest.raises(ValueError, match="alpha 1.5"):
        weights("hard", 1.5)


def test_mistakes_are_named_before_training():
    for name, hyper, said in [
        ("sotf", {}, "did you mean soft"),
        ("soft", {"tua": 1.0}, "did you mean tau"),
        ("hard", {"tau": 1.0}, "takes none"),
        ("soft", {"tau": 0.0}, "tau 0.0"),
        ("dkd", {"tau": -1.0}, "tau"),
        ("dist", {"tau": float("nan")}, "tau"),
        ("nkd", {"tau": 0}, "tau"),
        ("soft", {"reduction": "mean"}, "batchmean or numel"),
    ]:
        with pytest.raises(ValueError, match=said):
            create(name, **hyper)
    with pytest.raises(ValueError, match="metric is mse or cosine"):
        create("features", widths=(2, 2), metric="l1")
    with pytest.raises(ValueError, match="for regression there are mse, features"):
        create("hard", "regression")
    assert (
        create(default("regression"), "regression")
        and create(default("multilabel"), "multilabel")
        and default("classification") == "hard"
    )


@pytest.mark.parametrize("name", names())
def test_every_loss_says_its_reduction_and_takes_its_own_keywords(name):
    build = LOSSES[name].build
    said = inspect.getdoc(build)
    assert "mean over" in said or "batchmean" in said
    defaults = {key: inspect.signature(build).parameters[key].default for key in keywords(name)}
    assert create(name, LOSSES[name].tasks[0], (3, 3), **defaults)


def test_a_new_loss_is_one_decorated_function(monkeypatch):
    monkeypatch.setattr(distill_losses, "LOSSES", dict(LOSSES))

    @distill_losses.distill_loss("halved")
    def halved(student_logits, teacher_logits, target, *, by: float = 2.0):
        return F.mse_loss(student_logits, teacher_logits) / by

    assert "halved" in names() and keywords("halved") == ["by"]
    assert create("halved", by=4.0)(*tensors()).item() == pytest.approx(((STUDENT - TEACHER) ** 2).mean() / 4)
    with pytest.raises(KeyError, match="registered twice"):
        distill_losses.distill_loss("halved")(halved)
