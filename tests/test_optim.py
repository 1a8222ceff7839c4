"""Learning rate, decay groups and metrics against code nobody here wrote."""
import numpy as np
import pytest
import timm
import torch
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

import models
from lightning_modules.evaluation import ClassificationMetrics
from lightning_modules.optim import adamw, warmup_cosine


def test_schedule_equals_timms_cosine_with_the_warm_up_before_it():
    peak, min_lr, warmup, total = 3e-3, 1e-5, 13, 120
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    theirs = CosineLRScheduler(optimizer, t_initial=total - warmup, lr_min=min_lr, warmup_t=warmup, warmup_lr_init=0.0, warmup_prefix=True,
                               t_in_epochs=False)
    for step in range(total):
        theirs.step_update(step)
        assert warmup_cosine(step, peak=peak, min_lr=min_lr, warmup_steps=warmup, total_steps=total) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-9), step


def test_schedule_without_warm_up_and_past_its_end():
    values = [warmup_cosine(step, peak=1.0, min_lr=0.1, warmup_steps=0, total_steps=10) for step in range(13)]
    assert values[0] == 1.0 and values[5] == pytest.approx(0.55) and values[10:] == pytest.approx([0.1] * 3)
    assert warmup_cosine(4, peak=1.0, min_lr=0.0, warmup_steps=8, total_steps=4) == 0.5  # a run shorter than its warm-up


def test_decay_groups_equal_timms_on_the_same_architecture():
    ours = adamw(models.create("vit_ti16"), lr=1.0, weight_decay=0.3)
    twin = timm.create_model("vit_tiny_patch16_224")
    theirs = param_groups_weight_decay(twin, 0.3, no_weight_decay_list=twin.no_weight_decay())
    assert [(group["weight_decay"], len(group["params"])) for group in ours.param_groups] == [
        (group["weight_decay"], len(group["params"])) for group in theirs]
    decayed = {id(parameter) for group in ours.param_groups if group["weight_decay"] for parameter in group["params"]}
    assert all(parameter.ndim > 1 for group in ours.param_groups for parameter in group["params"] if id(parameter) in decayed)


@pytest.mark.parametrize("split", [[13], [5, 8], [1, 4, 4, 4]])
def test_metrics_equal_scikit_learn_however_batched_and_padded(split):
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(13, 7)), rng.integers(0, 7, 13)
    metrics, start = ClassificationMetrics(7), 0
    for size in split:
        part = slice(start, start + size)
        padded = torch.tensor(np.concatenate([logits[part], rng.normal(size=(2, 7))]))
        metrics.update(padded, torch.tensor(np.concatenate([target[part], [3, 3]])), torch.tensor([True] * size + [False] * 2))
        start += size
    found = {name: float(metric.compute()) for name, metric in metrics.named("val").items()}
    probabilities = torch.tensor(logits).softmax(1).numpy()
    assert found["val/acc1"] == pytest.approx(accuracy_score(target, logits.argmax(1)), abs=1e-7)
    assert found["val/acc5"] == pytest.approx(top_k_accuracy_score(target, logits, k=5, labels=range(7)), abs=1e-7)
    assert found["val/loss"] == pytest.approx(log_loss(target, probabilities, labels=range(7)), rel=1e-5)


def test_a_batch_of_padding_alone_weighs_nothing():
    metrics = ClassificationMetrics(3)
    metrics.update(torch.eye(3), torch.arange(3), torch.tensor([True, True, False]))
    metrics.update(torch.randn(4, 3), torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.bool))
    assert float(metrics.metrics["acc1"].compute()) == 1.0
