"""Distillation losses: one decorated function each, found by its name; keyword-only arguments are hyper-parameters.

Every function is pure: student_logits (B, K), teacher_logits (B, K), target (B,) int64 or (B, K) soft -> a scalar,
computed in float32, with gradients to the student only. Of a regression both are predictions (B, T), scaled to the
range of the student's targets. Where a loss needs the true class of a mixed picture, it is the argmax of the soft
target.
Legend: B pictures, K classes, D width, tau temperature.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import closest

TASKS = ("classification", "multilabel", "regression")
SHARED = ("alpha", "warmup_epochs")  # what --distill_args may hold for every loss


@dataclass(frozen=True)
class Entry:
    """A registered loss: what computes it, the published weights of (base loss, this loss) in the total, the tasks it
    is made for."""

    build: Callable[..., Any]
    weights: tuple[float, float]
    tasks: tuple[str, ...]
    on_features: bool


LOSSES: dict[str, Entry] = {}


def distill_loss(
    name: str, *, weights: tuple[float, float] = (0.5, 0.5), tasks: tuple[str, ...] = TASKS[:1]
) -> Callable:
    """Register the decorated loss under its name on the command line. Raises KeyError when the name is taken."""

    def register(build: Callable[..., Any]) -> Callable[..., Any]:
        if name in LOSSES:
            raise KeyError(f"distillation loss {name} is registered twice")
        LOSSES[name] = Entry(build, weights, tasks, on_features=inspect.isclass(build))
        return build

    return register


def names() -> list[str]:
    return list(LOSSES)


def default(task: str) -> str:
    """The loss that a teacher alone means: DeiT's hard labels for classification, else the squared error."""
    return "hard" if task == "classification" else "mse"


def check_name(name: str, task: str) -> Entry:
    """Raises ValueError for an unknown loss, with the closest names, and for one that is not made for the task."""
    if name not in LOSSES:
        raise ValueError(
            f"no distillation loss named {name!r}{closest(name, names())} (there are {', '.join(names())})"
        )
    if task not in LOSSES[name].tasks:
        fit = [each for each, entry in LOSSES.items() if task in entry.tasks]
        raise ValueError(
            f"distillation loss {name} is for {' and '.join(LOSSES[name].tasks)}; for {task} there are {', '.join(fit)}"
        )
    return LOSSES[name]


def keywords(name: str) -> list[str]:
    """The hyper-parameters of a loss, as in `--distill_args.tau 4`."""
    return [
        key for key, each in inspect.signature(LOSSES[name].build).parameters.items() if each.kind is each.KEYWORD_ONLY
    ]


def create(
    name: str, task: str = "classification", widths: tuple[int, int] | None = None, **hyper: Any
) -> Callable[..., Tensor]:
    """A loss with its hyper-parameters, tried once on zeros. For `features` a module on the (student's, teacher's)
    `widths`.

    Raises ValueError for an unknown name or keyword, a loss that is not for the task, or a value out of range.
    """
    entry = check_name(name, task)
    for key in hyper:
        if key not in keywords(name):
            raise ValueError(
                f"distillation loss {name} has no argument {key!r}{closest(key, keywords(name))} (it takes "
                f"{', '.join(keywords(name)) or 'none'})"
            )
    if entry.on_features:
        return entry.build(*(widths or ()), **hyper)
    loss = partial(entry.build, **hyper)
    loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
    return loss


def weights(name: str, alpha: float | None = None) -> tuple[float, float]:
    """Weights of (base loss, distillation loss): (1 - alpha, alpha), or without alpha those the loss was published
    with.

    Raises ValueError for an alpha outside 0 to 1.
    """
    if alpha is None:
        return LOSSES[name].weights
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha}: must be from 0 (no teacher) to 1 (the teacher alone)")
    return 1 - alpha, alpha


def check_warmup(epochs: float) -> None:
    """Raises ValueError for a warm-up of the distillation loss that is no number of epochs."""
    if isinstance(epochs, bool) or not isinstance(epochs, int | float) or not 0 <= epochs < math.inf:
        raise ValueError(f"warmup_epochs {epochs}: must be a number of epochs, 0 (no warm-up) or more")


def warmup(epoch: int, epochs: float) -> float:
    """Factor of the distillation loss in an epoch (from 0 on): min((epoch + 1) / epochs, 1), a step an epoch; 1 without
    a warm-up.

    megvii-research/mdistiller has it so (distillers/DKD.py, its epochs from 1 on; 20 epochs on CIFAR-100, 1 on
    ImageNet).
    """
    return min((epoch + 1) / epochs, 1.0) if epochs else 1.0


def _check_tau(tau: float) -> None:
    if not (tau > 0 and math.isfinite(tau)):
        raise ValueError(f"tau {tau}: must be a positive number")


def _labels(target: Tensor) -> Tensor:
    """(B,) int64, or (B, K) soft -> (B, 1) the class of each row."""
    return (target.argmax(1) if target.ndim == 2 else target)[:, None]


def _others(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, K) without each row's own class: (B, K - 1)."""
    place = torch.arange(logits.shape[1] - 1, device=logits.device)[None]
    return logits.gather(1, place + (place >= labels))  # no boolean mask: a GPU would wait for its count


def _divergence(student_log: Tensor, teacher_log: Tensor) -> Tensor:
    """KL(teacher || student) of log-probabilities (B, K): summed over classes, mean over the batch."""
    return F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)


@distill_loss("soft")
def soft(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, tau: float = 1.0, reduction: str = "batchmean"
) -> Tensor:
    """tau^2 KL(teacher || student) of the softened probabilities (Hinton et al. 2015, arXiv 1503.02531).

    reduction: `batchmean` sums over classes and takes the mean over the batch (timm); `numel` divides by K too, as DeiT
        does (losses.py).
    """
    _check_tau(tau)
    if reduction not in ("batchmean", "numel"):
        raise ValueError(f"reduction is batchmean or numel, not {reduction!r}")
    student, teacher = student_logits.float() / tau, teacher_logits.detach().float() / tau
    loss = tau**2 * _divergence(student.log_softmax(1), teacher.log_softmax(1))
    return loss / student.shape[1] if reduction == "numel" else loss


@distill_loss("hard")
def hard(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy with the teacher's decision (Touvron et al. 2021, arXiv 2012.12877, section 4): mean over the
    batch, no smoothing."""
    return F.cross_entropy(student_logits.float(), teacher_logits.argmax(1))


@distill_loss("dkd", weights=(1.0, 1.0))
def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    target_weight: float = 1.0,
    beta: float = 0.5,
    tau: float = 1.0,
) -> Tensor:
    """Decoupled distillation (Zhao et al. 2022, arXiv 2203.08679): the KL of (true class, all others) and that among
    the others.

    tau^2 (target_weight TCKD + beta NCKD), each summed over classes, mean over the batch; target_weight is the paper's
    alpha. Defaults are those for ImageNet, ResNet-34 to 18 (megvii-research/mdistiller); for ResNet-50 to MobileNet
    beta is 2, for CIFAR-100 8 with tau 4 and warmup_epochs 20.
    """
    _check_tau(tau)
    student, teacher, labels = student_logits.float() / tau, teacher_logits.detach().float() / tau, _labels(target)

    def decoupled(logits: Tensor) -> tuple[Tensor, Tensor]:
        others, total = _others(logits, labels), logits.logsumexp(1, keepdim=True)
        binary = (
            torch.cat([logits.gather(1, labels), others.logsumexp(1, keepdim=True)], 1) - total
        )  # (B, 2) log-probabilities
        return binary, others.log_softmax(1)

    (student_binary, student_others), (teacher_binary, teacher_others) = decoupled(student), decoupled(teacher)
    return tau**2 * (
        target_weight * _divergence(student_binary, teacher_binary) + beta * _divergence(student_others, teacher_others)
    )


@distill_loss("dist", weights=(1.0, 1.0))
def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 2.0,
    tau: float = 1.0,
) -> Tensor:
    """DIST (Huang et al. 2022, arXiv 2205.10536): probabilities should correlate with the teacher's, not equal them.

    tau^2 (beta mean over pictures of 1 - r along classes + gamma mean over classes of 1 - r along the batch), r
    Pearson's correlation. The columns are of this rank's batch. Gradients grow as 1 / spread of the student's logits: a
    head that starts at zero wants --clip_grad.
    """
    _check_tau(tau)
    student, teacher = ((logits.float() / tau).softmax(1) for logits in (student_logits, teacher_logits.detach()))
    return tau**2 * (
        beta * (1 - _pearson(student, teacher).mean()) + gamma * (1 - _pearson(student.T, teacher.T).mean())
    )


def _pearson(a: Tensor, b: Tensor, eps: float = 1e-8) -> Tensor:
    """Correlation of each row of a with that of b; eps where the authors have it (hunto/DIST_KD)."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + eps)


@distill_loss("nkd", weights=(1.0, 1.0))
def nkd(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, gamma: float = 1.5, tau: float = 1.0
) -> Tensor:
    """Normalised distillation (Yang et al. 2023, arXiv 2303.13005): the true class, and the distribution over the
    others, each by cross entropy.

    mean over the batch of -p_t log p_s at the true class (without tau) and of gamma tau^2 times the others' cross
    entropy. Not zero for equal logits. gamma is 1.5 from ResNet-34 to 18, 1 for ViTs, and for CIFAR-100 3.5 with tau 3
    (yzd-v/cls_KD).
    """
    _check_tau(tau)
    student, teacher, labels = student_logits.float(), teacher_logits.detach().float(), _labels(target)
    true = teacher.softmax(1).gather(1, labels) * student.log_softmax(1).gather(1, labels)
    others = (_others(teacher, labels) / tau).softmax(1) * (_others(student, labels) / tau).log_softmax(1)
    return -true.mean() - gamma * tau**2 * others.sum(1).mean()


@distill_loss("binary", tasks=("multilabel",))
def binary(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, tau: float = 1.0) -> Tensor:
    """tau^2 KL(teacher || student) of the two probabilities of each label, the mean over batch and labels: `soft`,
    label by label."""
    _check_tau(tau)
    student, teacher = student_logits.float() / tau, teacher_logits.detach().float() / tau
    yes, no = (F.logsigmoid(sign * teacher) - F.logsigmoid(sign * student) for sign in (1, -1))
    return tau**2 * (teacher.sigmoid() * yes + (-teacher).sigmoid() * no).mean()


@distill_loss("mse", tasks=TASKS)
def mse(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    """Squared difference of the logits, of a regression of the predictions scaled to the student's range; mean over
    batch and outputs."""
    return F.mse_loss(student_logits.float(), teacher_logits.detach().float())


@distill_loss("features", weights=(1.0, 1.0), tasks=TASKS)
class Features(nn.Module):
    """Distance of the student's pooled features, projected linearly where the widths differ, to the teacher's (timm's
    FeatureDistillationTask).

    (B, student_width), (B, teacher_width) -> scalar in float32. Its parameters belong to the student's optimizer.
    metric: `mse`, mean over batch and features, or `cosine`, 1 - cosine, mean over the batch. Raises ValueError for
        another word.
    """

    def __init__(self, student_width: int, teacher_width: int, *, metric: str = "mse"):
        super().__init__()
        if metric not in ("mse", "cosine"):
            raise ValueError(f"metric is mse or cosine, not {metric!r}")
        self.metric = metric
        self.projection = nn.Identity() if student_width == teacher_width else nn.Linear(student_width, teacher_width)

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        student, teacher = self.projection(student_features).float(), teacher_features.detach().float()
        return (
            F.mse_loss(student, teacher) if self.metric == "mse" else (1 - F.cosine_similarity(student, teacher)).mean()
        )
