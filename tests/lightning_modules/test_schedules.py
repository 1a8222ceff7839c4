"""Learning rates of every step against timm's schedulers and against numbers that the published trainers' code gave."""

import json
from pathlib import Path

import pytest
import torch
from timm.scheduler import CosineLRScheduler, create_scheduler_v2
from torch import nn

from lightning_modules.optimization.schedules import SCHEDULES

PUBLISHED = json.loads((Path(__file__).parents[1] / "fixtures" / "schedules.json").read_text())
SETTINGS = {
    "peak": 3e-3,
    "min_lr": 1e-5,
    "warmup_lr": 1e-6,
    "warmup_steps": 12,
    "total_steps": 120,
    "steps_per_epoch": 4,
}


def sgd(lr):
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


@pytest.mark.parametrize(
    "run", PUBLISHED, ids=[f"{run['repo']}-{run['settings']['warmup_steps']}" for run in PUBLISHED]
)
def test_every_step_equals_the_authors_code(run):
    ours = [SCHEDULES[run["schedule"]](step, **run["settings"]) for step in range(len(run["rates"]))]
    assert ours == pytest.approx(run["rates"], rel=1e-9, abs=1e-15)
    assert len(ours) == run["settings"]["total_steps"]


@pytest.mark.parametrize("warmup", [0, 1, 13])
@pytest.mark.parametrize("warmup_lr", [0.0, 1e-6])
def test_cosine_equals_timms_with_the_warm_up_before_it(warmup, warmup_lr):
    settings = SETTINGS | {"warmup_steps": warmup, "warmup_lr": warmup_lr}
    optimizer = sgd(settings["peak"])
    theirs = CosineLRScheduler(
        optimizer,
        t_initial=120 - warmup,
        lr_min=1e-5,
        warmup_t=warmup,
        warmup_lr_init=warmup_lr,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    for step in range(125):
        theirs.step_update(step)
        assert SCHEDULES["cosine"](step, **settings) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step


@pytest.mark.parametrize("warmup_epochs", [0, 1, 3])
def test_timm_equals_the_loop_of_timms_train_script(warmup_epochs):
    optimizer = sgd(3e-3)
    theirs, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=30, min_lr=1e-5, warmup_lr=1e-6, warmup_epochs=warmup_epochs
    )
    assert epochs == 30
    settings = SETTINGS | {"warmup_steps": warmup_epochs * 4}
    for epoch in range(epochs):
        for batch in range(4):
            ours = SCHEDULES["timm"](epoch * 4 + batch, **settings)
            assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), epoch
        theirs.step(epoch + 1)  # train.py, after the epoch


def test_deits_lag_in_numbers():
    """DeiT's defaults, 300 epochs: two epochs at the lowest rate, and a peak that the cosine has already left by 0.07
    %."""
    settings = {
        "peak": 1e-3,
        "min_lr": 1e-5,
        "warmup_lr": 1e-6,
        "warmup_steps": 50,
        "total_steps": 3000,
        "steps_per_epoch": 10,
    }
    by_epoch = {name: [SCHEDULES[name](epoch * 10, **settings) for epoch in range(300)] for name in ("timm", "deit")}
    assert by_epoch["deit"][:3] == pytest.approx([1e-6, 1e-6, 2.008e-4]) and by_epoch["timm"][:3] == pytest.approx(
        [1e-6, 2.008e-4, 4.006e-4]
    )
    assert max(by_epoch["deit"]) == pytest.approx(0.99932e-3, rel=1e-5)
    assert by_epoch["deit"][1:] == by_epoch["timm"][:-1]


@pytest.mark.parametrize("name", SCHEDULES)
def test_past_the_end_without_warm_up_and_shorter_than_the_warm_up(name):
    end = SCHEDULES[name](10_000, **SETTINGS)
    assert end == 1e-5
    assert SCHEDULES[name](0, **SETTINGS | {"warmup_steps": 0}) == 3e-3
    short = [SCHEDULES[name](step, **SETTINGS | {"total_steps": 8, "warmup_steps": 16}) for step in range(8)]
    assert short == sorted(short) and short[0] == 1e-6 and short[-1] < 3e-3
    for odd in (
        {"total_steps": 1},
        {"total_steps": 0},
        {"warmup_steps": 1},
        {"warmup_steps": 120},
        {"steps_per_epoch": 1},
        {"warmup_steps": 3},
    ):
        assert all(0 <= SCHEDULES[name](step, **SETTINGS | odd) <= 3e-3 for step in range(130)), odd
