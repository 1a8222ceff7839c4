"""Metrics against scikit-learn, SciPy, NumPy and torchmetrics; over batches and ranks of any size; a function of one's
own."""

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import free_port
from scipy.stats import spearmanr
from sklearn import metrics as sk
from torchmetrics.functional.classification import multilabel_auroc, multilabel_average_precision, multilabel_f1_score
from torchmetrics.functional.regression import mean_squared_error, r2_score

from lightning_modules.loggers.formats import format_metric
from lightning_modules.objectives import losses
from lightning_modules.objectives.evaluation import Metrics
from lightning_modules.objectives.metrics import DEFAULTS, EVERY_EPOCH, METRICS, find, score
from lightning_modules.objectives.targets import predict

CLASSES = {"task": "classification", "num_outputs": 7, "class_names": list("abcdefg"), "target_names": None}
TWO = CLASSES | {"num_outputs": 2, "class_names": ["no", "yes"]}
LABELS = {"task": "multilabel", "num_outputs": 4, "class_names": list("abcd"), "target_names": None}
NUMBER = {
    "task": "regression",
    "num_outputs": 1,
    "class_names": None,
    "target_names": ["y"],
    "target_range": [[1.0, 100.0]],
    "encoding": "sigmoid",
}
NUMBERS = NUMBER | {"num_outputs": 2, "target_names": ["y", "z"], "target_range": [[1.0, 100.0], [-3.0, 2.0]]}


def rows(spec, count=57, seed=0):
    """Logits (N, O) float32 and targets that they have something to do with."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, spec["num_outputs"])).astype(np.float32)
    if spec["task"] == "classification":
        return logits, np.where(rng.random(count) < 0.5, logits.argmax(1), rng.integers(0, spec["num_outputs"], count))
    if spec["task"] == "multilabel":
        return logits, (logits + rng.normal(size=logits.shape) > 0).astype(np.float32)
    noisy = torch.tensor(logits + rng.normal(size=logits.shape).astype(np.float32))
    return logits, predict(noisy, spec).numpy().round(1)


def whole(spec, **given):
    logits, target = rows(spec, **given)
    return target, predict(torch.tensor(logits), spec).numpy().astype(np.float64)


def test_of_classes():
    target, p = whole(CLASSES)
    expected = {
        "acc1": sk.accuracy_score(target, p.argmax(1)),
        "acc5": sk.top_k_accuracy_score(target, p, k=5, labels=range(7)),
        "loss": sk.log_loss(target, p, labels=range(7)),
        "log_loss": sk.log_loss(target, p, labels=range(7)),
        "f1": sk.f1_score(target, p.argmax(1), average="macro"),
        "auroc": sk.roc_auc_score(target, p, multi_class="ovr", average="macro"),
        "qwk": sk.cohen_kappa_score(target, p.argmax(1), weights="quadratic", labels=range(7)),
    }
    assert {name: score(name, target, p, CLASSES) for name in expected} == pytest.approx(expected, rel=1e-7)
    assert expected.keys() == {name for name, entry in METRICS.items() if "classification" in entry.tasks}
    target, p = whole(TWO)
    assert score("auroc", target, p, TWO) == sk.roc_auc_score(target, p[:, 1])
    assert score("log_loss", target, p, TWO) == pytest.approx(sk.log_loss(target, p[:, 1]), rel=1e-7)


def test_classes_at_the_ends_of_float32():
    """Sure predictions: of the first class 1.0 to float32, while those of the second differ; and equal ones."""
    rng = np.random.default_rng(0)
    target = rng.integers(0, 2, 2000)
    logits = np.stack([np.zeros(2000), rng.normal(0, 6, 2000) - 14 + 4 * target], 1)
    p = predict(torch.tensor(logits), TWO).numpy()
    assert len(np.unique(p[:, 0])) < len(np.unique(p[:, 1])) and score("auroc", target, p, TWO) == sk.roc_auc_score(
        target, p[:, 1]
    )
    target, even = np.arange(70) % 7, np.full((70, 7), 1 / 7)
    assert score("acc5", target, even, CLASSES) == 5 / 7 and score("acc1", target, even, CLASSES) == 1 / 7


@pytest.mark.parametrize("top", [6, 400])
def test_kappa_is_scikit_learns(top):
    rng = np.random.default_rng(top)
    target, p = rng.integers(0, 5, 300), rng.normal(2, top / 4, (300, 1))
    expected = sk.cohen_kappa_score(
        target, np.rint(p[:, 0]).astype(int), weights="quadratic", labels=range(-2 * top, 2 * top)
    )
    assert score("qwk", target, p, NUMBER) == pytest.approx(expected, rel=1e-9)
    assert abs(score("qwk", target, p * 1e9, NUMBER)) < 1e-6  # no table of all values in between


def test_of_labels():
    target, p = whole(LABELS)
    expected = {
        "map": sk.average_precision_score(target, p, average="macro"),
        "f1": sk.f1_score(target, p > 0.5, average="macro"),
        "auroc": sk.roc_auc_score(target, p, average="macro"),
        "loss": np.mean([sk.log_loss(target[:, k], p[:, k]) for k in range(4)]),
    }
    expected["log_loss"] = expected["loss"]
    assert {name: score(name, target, p, LABELS) for name in expected} == pytest.approx(expected, rel=1e-7)
    assert expected.keys() == {name for name, entry in METRICS.items() if "multilabel" in entry.tasks}
    tensors = torch.tensor(p), torch.tensor(target).long(), 4
    for name, theirs in (
        ("map", multilabel_average_precision),
        ("auroc", multilabel_auroc),
        ("f1", multilabel_f1_score),
    ):
        assert score(name, target, p, LABELS) == pytest.approx(float(theirs(*tensors)), rel=1e-6)
    target[:, 2] = 0  # a label that no picture has: of no weight in map and auroc
    assert score("map", target, p, LABELS) == pytest.approx(
        sk.average_precision_score(target[:, [0, 1, 3]], p[:, [0, 1, 3]])
    )
    assert score("auroc", target, p, LABELS) == pytest.approx(sk.roc_auc_score(target[:, [0, 1, 3]], p[:, [0, 1, 3]]))
    assert np.isnan(score("map", 0 * target, p, LABELS)) and np.isnan(score("auroc", 0 * target, p, LABELS))


@pytest.mark.parametrize("spec", [NUMBER, NUMBERS])
def test_of_numbers(spec):
    target, p = whole(spec)
    target[3] = target[9]  # equal ranks
    expected = {
        "rmse": np.mean(sk.root_mean_squared_error(target, p, multioutput="raw_values")),
        "mae": sk.mean_absolute_error(target, p),
        "r2": sk.r2_score(target, p),
        "spearman": np.mean([spearmanr(target[:, t], p[:, t]).statistic for t in range(target.shape[1])]),
        "qwk": np.mean(
            [
                sk.cohen_kappa_score(
                    np.rint(target[:, t]).astype(int),
                    np.rint(p[:, t]).astype(int),
                    weights="quadratic",
                    labels=range(-3, 101),
                )
                for t in range(target.shape[1])
            ]
        ),
    }
    assert {name: score(name, target, p, spec) for name in expected} == pytest.approx(expected, rel=1e-7)
    assert expected.keys() == {name for name, entry in METRICS.items() if "regression" in entry.tasks}
    assert score("rmse", target, p, spec) == np.sqrt(((target.astype(np.float64) - p) ** 2).mean(0)).mean()
    assert score("r2", target, p, spec) == pytest.approx(
        float(r2_score(torch.tensor(p), torch.tensor(target))), rel=1e-5
    )
    if spec is NUMBER:
        assert score("rmse", target, p, spec) == pytest.approx(
            float(mean_squared_error(torch.tensor(p), torch.tensor(target), squared=False))
        )
        assert score("rmse", target[:, 0], p[:, 0], spec) == score("rmse", target, p, spec)


def test_ends_of_the_scale():
    target, p = whole(NUMBER)
    assert score("rmse", target, target, NUMBER) == 0 and score("r2", target, target, NUMBER) == 1
    assert score("spearman", target, target**3, NUMBER) == pytest.approx(1) and np.isnan(
        score("spearman", target, 0 * p, NUMBER)
    )
    assert score("qwk", target, target, NUMBER) == 1 and np.isnan(score("r2", target[:1], p[:1], NUMBER))
    p[4] = np.nan
    assert all(np.isnan(score(name, target, p, NUMBER)) for name in EVERY_EPOCH["regression"])
    certain = np.eye(7)[[0, 1, 2]]
    assert (
        score("log_loss", np.array([0, 1, 2]), certain, CLASSES) == 0
        and score("qwk", np.array([3, 3]), np.eye(7)[[3, 3]], CLASSES) == 1
    )
    assert 30 < score("log_loss", np.array([1, 2, 0]), certain, CLASSES) < 40  # bounded, as scikit-learn's
    with pytest.raises(ValueError, match=r"targets \(57, 1\) and predictions \(56, 1\)"):
        score("rmse", target, p[1:], NUMBER)


def of_an_epoch(spec, logits, target, sizes, metric=None):
    """Batches of these sizes, their rows not in order, each with two rows of padding at its end."""
    loss = losses.create(losses.default(spec["task"]), spec)
    metrics, order, start = (
        Metrics(spec, getattr(loss, "rows", None), metric),
        np.random.default_rng(1).permutation(len(logits)),
        0,
    )
    for size in sizes:
        part = order[start : start + size].tolist()
        padded = [*part, 0, 0]
        metrics.update(
            torch.tensor(logits[padded]),
            torch.tensor(target[padded]),
            torch.tensor([True] * len(part) + [False] * 2),
            torch.tensor(padded),
        )
        start += size
    assert start >= len(order)
    return metrics


@pytest.mark.parametrize("spec", [CLASSES, TWO, LABELS, NUMBER, NUMBERS])
def test_an_epoch_is_the_score_of_all_rows_however_batched(spec):
    logits, target = rows(spec)
    for name in (name for name, entry in METRICS.items() if spec["task"] in entry.tasks):
        found = {}
        for sizes in ([57], [56, 1], [8] * 8, [1] * 57):
            epoch = of_an_epoch(spec, logits, target, sizes, find(name, spec["task"]))
            found[len(sizes)] = float(epoch.metrics[name].compute())
        expected = score(name, *whole(spec), spec)
        counted = name in ("loss", "acc1", "acc5") and spec["task"] != "regression"
        for value in found.values():
            assert value == (pytest.approx(expected, rel=1e-6) if counted else expected), (
                name
            )  # the rest to the last bit


def test_rmse_is_not_a_mean_over_batches():
    logits, target = rows(NUMBER)
    prediction = predict(torch.tensor(logits), NUMBER).numpy().astype(np.float64)
    of_batches = np.mean([np.sqrt(((target[i : i + 8] - prediction[i : i + 8]) ** 2).mean()) for i in range(0, 57, 8)])
    epoch = of_an_epoch(NUMBER, logits, target, [8] * 8)
    assert abs(float(epoch.metrics["rmse"].compute()) - of_batches) > 0.1
    assert float(epoch.metrics["loss"].compute()) == pytest.approx(
        float(losses.create("bce", NUMBER)(torch.tensor(logits), torch.tensor(target)))
    )


def test_a_second_epoch_starts_anew():
    logits, target = rows(NUMBERS)
    epoch = of_an_epoch(NUMBERS, logits, target, [57])
    first = {name: float(metric.compute()) for name, metric in epoch.metrics.items()}
    for metric in epoch.metrics.values():
        metric.reset()
    epoch.update(torch.tensor(logits[:5]), torch.tensor(target[:5]), torch.ones(5, dtype=torch.bool), torch.arange(5))
    assert (
        float(epoch.metrics["rmse"].compute())
        == score("rmse", target[:5], predict(torch.tensor(logits[:5]), NUMBERS).numpy(), NUMBERS)
        != first["rmse"]
    )


def _rank(rank, port, answers, spec, shares):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(shares))
    logits, target = rows(spec)
    own = np.split(np.arange(57), np.cumsum(shares)[:-1])[rank][::-1]
    metrics = Metrics(
        spec,
        losses.create(losses.default(spec["task"]), spec).rows if spec is not CLASSES else None,
        find("qwk", spec["task"]),
    )
    for part in np.array_split(own, 3):
        valid = torch.tensor([True] * len(part) + [False])
        part = [*part.tolist(), 0]
        metrics.update(torch.tensor(logits[part]), torch.tensor(target[part]), valid, torch.tensor(part))
    answers.put((rank, {name: float(metric.compute()) for name, metric in metrics.metrics.items()}))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("spec, shares", [(NUMBERS, (29, 28)), (CLASSES, (56, 1))])
def test_two_ranks_are_one(spec, shares):
    context = mp.get_context("fork")
    answers, port = context.Queue(), free_port()
    ranks = [context.Process(target=_rank, args=(rank, port, answers, spec, shares)) for rank in range(2)]
    for each in ranks:
        each.start()
    found = dict(answers.get(timeout=60) for _ in ranks)
    for each in ranks:
        each.join()
    assert found[0] == found[1]
    target, prediction = whole(spec)
    for name in found[0].keys() - {"loss", "acc1", "acc5"}:
        assert found[0][name] == score(name, target, prediction, spec), name
    if spec is CLASSES:
        assert found[0]["acc1"] == pytest.approx(score("acc1", target, prediction, spec), rel=1e-6)


def test_names_and_modes():
    assert (
        all(find(None, task).name == name for task, name in DEFAULTS.items()) and find(None, "regression").mode == "min"
    )
    assert {name for name, entry in METRICS.items() if entry.mode == "min"} == {"loss", "log_loss", "rmse", "mae"}
    for name, task, words in (
        ("rmsee", "regression", "did you mean rmse"),
        ("rmse", "classification", "is for regression; for classification"),
        ("loss", "regression", "is for classification and multilabel"),
    ):
        with pytest.raises(ValueError, match=words):
            find(name, task)
    assert format_metric("val/accepted_error", 0.5) == "val/accepted_error 0.5"
    assert (
        format_metric("val/acc1", 0.5) == "val/acc1 50.00 %"
        and format_metric("val/rmse", 17.35612) == "val/rmse 17.356"
    )


MINE = """
import numpy as np
def worst(target, prediction):
    assert isinstance(target, np.ndarray) and target.shape == prediction.shape == (57,)
    return np.abs(target - prediction).max()
worst.mode = "min"
def top(target, prediction):
    assert target.shape == (57,) and target.dtype == np.int64 and prediction.shape == (57, 7)
    return (prediction.argmax(1) == target).mean()
def rmse(target, prediction): return 0
def odd(target, prediction): return 0
odd.mode = "best"
def pair(target, prediction): return np.zeros(2)
"""


def test_a_function_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(MINE)
    worst, top = find("my.py:worst", "regression"), find(f"{tmp_path}/my.py:top", "classification")
    assert (worst.name, worst.mode, top.name, top.mode) == ("worst", "min", "top", "max")
    target, prediction = whole(NUMBER)
    assert (
        score("my.py:worst", target, prediction, NUMBER)
        == score(worst, target, prediction, NUMBER)
        == np.abs(target - prediction).max()
    )
    assert score(top, *whole(CLASSES), CLASSES) == score("acc1", *whole(CLASSES), CLASSES)
    epoch = of_an_epoch(NUMBER, *rows(NUMBER), [20, 37], worst)
    assert float(epoch.metrics["worst"].compute()) == np.abs(target - prediction).max()
    with pytest.raises(ValueError, match=r"gives \(2,\) numbers, not one"):
        score("my.py:pair", target, prediction, NUMBER)


@pytest.mark.parametrize(
    "name, words",
    [
        ("no.py:f", "there is no file no.py"),
        ("my.py:worts", "did you mean worst"),
        ("my.py:np", "has no function 'np'"),
        ("my.py:rmse", "give the function another name"),
        ("my.py:odd", "'max' or 'min'"),
        ("broken.py:f", "cannot be loaded .NameError"),
    ],
)
def test_mistakes_in_it(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("undefined\n")
    with pytest.raises(ValueError, match=f"--metric {name}: .*{words}"):
        find(name, "regression")
