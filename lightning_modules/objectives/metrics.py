"""Metrics: one decorated function each, found by its name, of whole arrays and never of batches.

Legend: N pictures, K classes or labels, T targets. `target` (N,) int64 class numbers, (N, K) 0 or 1, (N, T) own units;
`prediction` (N, K) probabilities, or (N, T) own units (lightning_modules/objectives/targets.py `predict`). A user's own
function is `my.py:function` (`find`).
"""

import importlib.util
import inspect
import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ALL = CLASSIFICATION, MULTILABEL, REGRESSION = ("classification", "multilabel", "regression")
DEFAULTS = {CLASSIFICATION: "acc1", MULTILABEL: "map", REGRESSION: "rmse"}
EVERY_EPOCH = {
    CLASSIFICATION: ("acc1", "acc5"),
    MULTILABEL: ("map", "f1", "auroc"),
    REGRESSION: ("rmse", "mae", "r2", "spearman"),
}
TINY = np.finfo(np.float64).eps


@dataclass(frozen=True)
class Metric:
    """A metric: its name in logs (after `val/`), whether `max` or `min` of it is better, its tasks, (target,
    prediction) -> float."""

    name: str
    mode: str
    tasks: tuple[str, ...]
    compute: Callable[[np.ndarray, np.ndarray], float]


METRICS: dict[str, Metric] = {}


class MetricError(ValueError):
    """A user's metric function fails or does not return a number; the message has the reason and the line."""


def metric(mode: str, *tasks: str) -> Callable:
    """Register the decorated function under its name; raises KeyError when it is taken."""

    def register(compute: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[np.ndarray, np.ndarray], float]:
        name = compute.__name__.rstrip("_")
        if name in METRICS:
            raise KeyError(f"metric {name} is registered twice")
        METRICS[name] = Metric(name, mode, tasks, compute)
        return compute

    return register


def find(name: str | None, task: str) -> Metric:
    """The metric of a name, of `my.py:function`, or the task's default for None.

    A user's function takes (target, prediction), whole arrays as in the legend ((N,) each of a single target),
    and returns a number: larger is better, unless the function has an attribute `mode = "min"`. Its own name is the
    metric's. Raises ValueError for an unknown name (with the closest), a metric of another task, or a function that is
    not there.
    """
    name = name or DEFAULTS[task]
    if ".py:" in name:
        return _own(name)
    fitting = [each for each, entry in METRICS.items() if task in entry.tasks]
    if name not in METRICS:
        from models import closest  # torch: seconds

        raise ValueError(
            f"--metric {name}: there is no such metric{closest(name, fitting)} (for {task}: {', '.join(fitting)}; or "
            f"my.py:function)"
        )
    if name not in fitting:
        raise ValueError(
            f"--metric {name} is for {' and '.join(METRICS[name].tasks)}; for {task} there are {', '.join(fitting)}, "
            f"or my.py:function"
        )
    return METRICS[name]


def score(name: str | Metric, target: np.ndarray, prediction: np.ndarray, spec: Mapping[str, Any]) -> float:
    """One metric over all rows, which is what an epoch's validation gives, whatever its batches and ranks. NaN for
    predictions that are not finite. Raises ValueError for arrays that do not fit each other or the spec, and as
    `find`."""
    chosen = name if isinstance(name, Metric) else find(name, spec["task"])
    target, prediction = np.asarray(target), np.asarray(prediction, dtype=np.float64)
    if spec["task"] != CLASSIFICATION:
        target, prediction = (each.reshape(len(each), -1).astype(np.float64) for each in (target, prediction))
    fits = len(target) == len(prediction) and (
        prediction.ndim == 2 and target.ndim == 1
        if spec["task"] == CLASSIFICATION
        else target.shape == prediction.shape
    )
    if not fits or not len(target):
        raise ValueError(
            f"metric {chosen.name}: targets {target.shape} and predictions {prediction.shape} are no pair for "
            f"{spec['task']}"
        )
    if not np.isfinite(prediction).all():
        return float("nan")
    if chosen.name not in METRICS and spec["task"] == REGRESSION and target.shape[1] == 1:
        target, prediction = target[:, 0], prediction[:, 0]
    if chosen.name in METRICS:
        return float(chosen.compute(target, prediction))
    try:
        value = chosen.compute(target, prediction)
        if np.ndim(value):
            raise ValueError(f"it gives {np.shape(value)} numbers, not one")
        return float(value)
    except Exception as error:  # a user's code
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
        own = [frame for frame in frames if frame.filename == inspect.getfile(chosen.compute)] or frames
        where = f" ({os.path.relpath(own[-1].filename)}, line {own[-1].lineno})" if own else ""
        raise MetricError(
            f"--metric {chosen.name} fails on {len(target)} rows: {type(error).__name__}: {error}{where}"
        ) from error


def attempt(chosen: Metric, spec: Mapping[str, Any], target: np.ndarray) -> None:
    """Score made predictions, drawn at random, of up to 1,000 real targets, so that a user's function fails
    before a training and not after its first epoch. Raises MetricError."""
    target = target[np.linspace(0, len(target) - 1, min(len(target), 1000)).astype(int)].copy()
    rng = np.random.default_rng(0)
    if spec["task"] == REGRESSION:
        prediction = rng.permutation(target) + rng.normal(size=target.shape) * (target.std(0) + TINY)
    else:
        prediction = rng.random((len(target), spec["num_outputs"]))
        prediction /= prediction.sum(1, keepdims=True) if spec["task"] == CLASSIFICATION else 1
    score(chosen, target, prediction, spec)


def _own(name: str) -> Metric:
    """The metric of a function in a user's file."""
    file, _, function = name.rpartition(":")
    if not Path(file).is_file():
        raise ValueError(f"--metric {name}: there is no file {file} (looked in {Path.cwd()})")
    place = importlib.util.spec_from_file_location(f"vitlab_metric_{Path(file).stem}", file)
    assert place is not None and place.loader is not None
    module = importlib.util.module_from_spec(place)
    try:
        place.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"--metric {name}: {file} cannot be loaded ({type(error).__name__}: {error})") from error
    compute = getattr(module, function, None)
    if not callable(compute):
        from models import closest  # torch: seconds

        there = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        raise ValueError(
            f"--metric {name}: {file} has no function {function!r}{closest(function, there)} (it has "
            f"{', '.join(there) or 'none'})"
        )
    mode = getattr(compute, "mode", "max")
    if mode not in ("max", "min"):
        raise ValueError(f"--metric {name}: {function}.mode is {mode!r}; 'max' or 'min' is better")
    if function in METRICS or function == "loss":
        raise ValueError(f"--metric {name}: {function} is a metric of vitlab's own; give the function another name")
    return Metric(function, mode, ALL, compute)


def _columns(value: Callable[[np.ndarray, np.ndarray], float], target: np.ndarray, prediction: np.ndarray) -> float:
    """The mean over columns."""
    return float(np.mean([value(target[:, k], prediction[:, k]) for k in range(target.shape[1])]))


@metric("max", CLASSIFICATION)
def acc1(target: np.ndarray, prediction: np.ndarray) -> float:
    """share of pictures whose class is the likeliest"""
    return float((prediction.argmax(1) == target).mean())


@metric("max", CLASSIFICATION)
def acc5(target: np.ndarray, prediction: np.ndarray) -> float:
    """share of pictures whose class is among the five likeliest; of more than five classes"""
    own, before = prediction[np.arange(len(target)), target][:, None], np.arange(prediction.shape[1]) < target[:, None]
    return float(
        (((prediction > own) | (prediction == own) & before).sum(1) < 5).mean()
    )  # of equals the first, as in acc1


@metric("min", CLASSIFICATION, MULTILABEL)
def log_loss(target: np.ndarray, prediction: np.ndarray) -> float:
    """mean cross entropy of the probabilities; of labels the mean over pictures and labels"""
    if target.ndim == 2:
        right = np.where(target > 0.5, prediction, 1 - prediction)
    else:
        right = prediction[np.arange(len(target)), target] / prediction.sum(1)
    return float(-np.log(right.clip(TINY, 1)).mean())


@metric("min", CLASSIFICATION, MULTILABEL)
def loss(target: np.ndarray, prediction: np.ndarray) -> float:
    """the same, without smoothing, as each epoch logs it; of a regression each epoch logs its own --loss"""
    return log_loss(target, prediction)


@metric("max", CLASSIFICATION, MULTILABEL)
def f1(target: np.ndarray, prediction: np.ndarray) -> float:
    """F1 of each class or label (those above 0.5), and their mean"""
    from sklearn.metrics import f1_score

    if target.ndim == 1:
        return f1_score(target, prediction.argmax(1), average="macro", zero_division=0)
    return f1_score(target > 0.5, prediction > 0.5, average="macro", zero_division=0)


@metric("max", CLASSIFICATION, MULTILABEL)
def auroc(target: np.ndarray, prediction: np.ndarray) -> float:
    """area under the ROC curve: of the second of two classes, else the mean of each class against the rest, or of each
    label"""
    from sklearn.metrics import roc_auc_score

    if target.ndim == 1 and prediction.shape[1] == 2:
        target, prediction = (
            target[:, None],
            prediction[:, 1:],
        )  # the first class's are rounded to 1 where the second's are tiny
    elif target.ndim == 1:
        target = target[:, None] == np.arange(prediction.shape[1])
    both = [
        k for k in range(target.shape[1]) if 0 < target[:, k].sum() < len(target)
    ]  # a label of one kind only has no curve
    return float(np.mean([roc_auc_score(target[:, k], prediction[:, k]) for k in both])) if both else float("nan")


@metric("max", MULTILABEL)
def map_(target: np.ndarray, prediction: np.ndarray) -> float:
    """average precision of each label that any picture has, and their mean"""
    each = average_precisions(target, prediction)
    return float(each[~np.isnan(each)].mean()) if not np.isnan(each).all() else float("nan")


def average_precisions(target: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """(K,) average precision of each label, by scikit-learn; NaN of a label that no row has."""
    from sklearn.metrics import average_precision_score

    there = target > 0.5
    return np.array(
        [
            average_precision_score(there[:, k], prediction[:, k]) if there[:, k].any() else np.nan
            for k in range(there.shape[1])
        ]
    )


@metric("max", CLASSIFICATION, REGRESSION)
def qwk(target: np.ndarray, prediction: np.ndarray) -> float:
    """Cohen's kappa with quadratic weights, of classes in their order, or of whole numbers (predictions are rounded)"""
    if target.ndim == 1:
        return _kappa(target, prediction.argmax(1))
    return _columns(_kappa, np.rint(target), np.rint(prediction))


def _kappa(target: np.ndarray, prediction: np.ndarray) -> float:
    """1 - mean squared difference over that of independent pairs with these two distributions. scikit-learn's number
    without its table of all values between smallest and largest, which a first epoch's wild predictions would blow
    up."""
    chance = target.var() + prediction.var() + (target.mean() - prediction.mean()) ** 2
    return (
        1 - ((target - prediction) ** 2).mean() / chance if chance else 1.0
    )  # every prediction is right, and all targets are equal


@metric("min", REGRESSION)
def rmse(target: np.ndarray, prediction: np.ndarray) -> float:
    """root of the mean squared error, in the target's own units; of several targets the mean of theirs, as all of
    these"""
    return float(np.sqrt(((target - prediction) ** 2).mean(0)).mean())


@metric("min", REGRESSION)
def mae(target: np.ndarray, prediction: np.ndarray) -> float:
    """mean absolute error, in the target's own units"""
    return float(np.abs(target - prediction).mean())


@metric("max", REGRESSION)
def r2(target: np.ndarray, prediction: np.ndarray) -> float:
    """share of the targets' variance that is explained"""
    from sklearn.metrics import r2_score

    return r2_score(target, prediction) if len(target) > 1 else float("nan")


@metric("max", REGRESSION)
def spearman(target: np.ndarray, prediction: np.ndarray) -> float:
    """correlation of the ranks"""
    from scipy.stats import rankdata

    def of_ranks(one: np.ndarray, other: np.ndarray) -> float:
        one, other = (rankdata(each) - (len(each) + 1) / 2 for each in (one, other))
        size = np.sqrt((one**2).sum() * (other**2).sum())
        return (one * other).sum() / size if size else float("nan")

    return _columns(of_ranks, target, prediction)
