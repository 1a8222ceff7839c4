"""`lightning_modules.create`: the task of any data, with and without a teacher, from one line."""

import subprocess
import sys

import lightning as L
import numbers_data
import pytest
import torch
from torch import nn

import datamodules
import lightning_modules
import models
from lightning_modules.distiller import Distiller
from lightning_modules.objectives.losses import PerTarget
from lightning_modules.task import Task

QUIET = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1)
SMALL = {"embed_dim": 32, "depth": 1}
IMAGES = dict(image_size=16, global_batch_size=8, workers=0)
KINDS = ["classification", "multilabel", "regression"]


def numbers(kind: str, **knobs):
    return numbers_data.DataModule(kind=kind, **IMAGES, **knobs)


@pytest.fixture(scope="module")
def digits():
    return datamodules.create("digits", image_size=8, global_batch_size=256, workers=0)


def fit(task, data, **flags):
    trainer = L.Trainer(max_epochs=1, enable_checkpointing=False, **QUIET, **flags)
    trainer.fit(task, datamodule=data)
    return trainer


def test_importing_the_package_imports_no_torch():
    code = "import sys, lightning_modules; assert 'create' in dir(lightning_modules) and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_names_are_those_that_the_knobs_take():
    names = lightning_modules.names()
    assert {"cross_entropy", "bce", "ordinal"} <= {*names["loss"]} and {"hard", "soft", "mse"} <= {*names["distill"]}
    assert {"acc1", "rmse", "map"} <= {*names["metric"]} and "adamw" in names["optimizer"]
    assert "cosine" in names["schedule"]


@pytest.mark.parametrize("kind, metric", [("classification", "acc1"), ("multilabel", "map"), ("regression", "rmse")])
@pytest.mark.parametrize("taught", [False, True])
def test_a_name_trains_on_data_of_each_task(kind, metric, taught):
    data = numbers(kind)
    teacher = models.create("vit_nano4", data.spec["num_outputs"], 16, **SMALL) if taught else None
    task = lightning_modules.create("vit_nano4", data, teacher, epochs=1, lr=1e-2, model_args=SMALL)
    assert type(task) is (Distiller if taught else Task) and task.monitor == f"val/{metric}"
    values = fit(task, data).callback_metrics
    assert torch.isfinite(values["train/loss"]) and torch.isfinite(values[f"val/{metric}"])
    assert ("train/distill_loss" in values) == taught


def test_knobs_reach_loss_schedule_optimizer_and_network(digits):
    network = models.create("vit_nano4", 10, 8, **SMALL)
    task = lightning_modules.create(
        network,
        digits,
        epochs=4,
        lr=0.5,
        warmup_steps=2,
        optimizer="sgd",
        weight_decay=0.0,
        loss="bce",
        label_smoothing=0.0,
        freeze="backbone",
        metric="log_loss",
        seed=3,
        ema_decay=0.9,
        clip_grad=None,
    )
    assert task.model is network and task.seed == 3 and task.monitor == "val_ema/log_loss" and task.clip_grad is None
    assert [task.schedule(step) for step in (0, 1, 2)] == [0, 0.25, 0.5] and task.schedule(4 * 5) == 0
    made = task.configure_optimizers()
    assert isinstance(made, torch.optim.SGD) and made.defaults["lr"] == 0.5
    assert sum(len(group["params"]) for group in made.param_groups) == 2  # the head's
    logits, target = torch.zeros(2, 10), torch.tensor([1, 2])
    assert task.loss(logits, target).item() == pytest.approx(torch.tensor(2.0).log().item())
    assert task.config["lr"] == 0.5 and task.config["model"] == "vit_nano4" and task.config["model_args"] == SMALL


def test_the_same_seed_makes_the_same_network(digits):
    weights = [
        lightning_modules.create("vit_nano4", digits, model_args=SMALL, seed=seed).model.state_dict()
        for seed in (0, 0, 1)
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not all(torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


@pytest.mark.parametrize("loss, encoding, outputs", [("mse", "linear", 1), ("ordinal", "ordinal", 10)])
def test_the_loss_of_a_regression_sets_the_encoding_of_its_data(loss, encoding, outputs):
    data = numbers("regression", targets=2)
    task = lightning_modules.create(
        "vit_nano4", data, loss=loss, loss_args={"bins": 11} if loss == "ordinal" else {}, model_args=SMALL
    )
    assert task.spec["encoding"] == data.spec["encoding"] == encoding and isinstance(task.loss, PerTarget)
    assert task.spec["num_outputs"] == 2 * outputs == task.model(torch.zeros(1, 3, 16, 16)).shape[1]


def test_the_smoothing_is_the_datas_and_of_a_regression_none(digits):
    loss = lightning_modules.create("vit_nano4", digits, model_args=SMALL).loss
    assert loss.keywords["smoothing"] == digits.label_smoothing
    assert lightning_modules.create("vit_nano4", numbers("regression"), model_args=SMALL).loss.smoothing == 0


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"learning_rate": 1}, "no knob 'learning_rate'"),
        ({"weigth_decay": 1}, "did you mean weight_decay"),
        ({"patience": 3}, "EarlyStopping"),
        ({"lr": "fast"}, "lr fast: must be a number"),
        ({"mixup": 0.2}, "it belongs to the data, datamodules.create takes it"),
        ({"teacher": "nope"}, "--teacher nope: there is no such run or file, and no model named 'nope'"),
        ({"lr": -1.0}, "lr -1.0: must not be negative"),
        ({"schedule": "cosin"}, "did you mean cosine"),
        ({"optimizer": "adam"}, "did you mean adamw"),
        ({"optimizer_args": {"beta": 1}}, "adamw takes"),
        ({"loss": "mse"}, "is for regression; for classification"),
        ({"metric": "acc2"}, "did you mean acc5, acc1"),
        ({"distill": "soft"}, "distill needs a teacher"),
        ({"teacher": nn.Identity(), "distill": "sofd"}, "did you mean soft"),
        ({"teacher": nn.Identity(), "distill_args": {"tao": 2}, "distill": "soft"}, "did you mean tau"),
    ],
)
def test_a_wrong_knob_is_named_with_the_closest(digits, knobs, message):
    with pytest.raises(ValueError, match=message):
        lightning_modules.create("vit_nano4", digits, model_args=SMALL, **knobs)


def test_what_is_no_data_and_no_teacher_is_named(digits):
    with pytest.raises(TypeError, match="data must be a data module of datamodules.create, not 'digits'"):
        lightning_modules.create("vit_nano4", "digits", model_args=SMALL)
    with pytest.raises(TypeError, match="several of them, not 3"):
        lightning_modules.create("vit_nano4", digits, teacher=3, model_args=SMALL)


def test_a_network_that_does_not_fit_the_data_is_refused(digits):
    with pytest.raises(ValueError, match="the network has 7 outputs, the data need 10"):
        lightning_modules.create(models.create("vit_nano4", 7, 8, **SMALL), digits)
    with pytest.raises(ValueError, match="model_args is for a model given by name"):
        lightning_modules.create(models.create("vit_nano4", 10, 8, **SMALL), digits, model_args={"depth": 2})


@pytest.fixture(scope="module")
def checkpoint(digits, tmp_path_factory):
    """A stock checkpoint of a task that has learned digits for an epoch."""
    task = lightning_modules.create("vit_nano4", digits, epochs=1, model_args=SMALL)
    file = tmp_path_factory.mktemp("stock") / "one.ckpt"
    fit(task, digits).save_checkpoint(file)
    return file


def test_a_teacher_may_be_a_checkpoint_a_teacher_or_several(digits, checkpoint):
    loaded = lightning_modules.Teacher.load(str(checkpoint), student=digits.spec)
    network, _ = models.load(checkpoint)
    image = torch.randn(4, 3, 8, 8)
    expected = network(image)
    for teacher in (str(checkpoint), checkpoint, loaded, network):
        task = lightning_modules.create("vit_nano4", digits, teacher, model_args=SMALL)
        assert torch.equal(task.teacher(image), expected)
    both = lightning_modules.create("vit_nano4", digits, [checkpoint, checkpoint], model_args=SMALL)
    torch.testing.assert_close(both.teacher(image).softmax(1), expected.softmax(1))
    with pytest.raises(FileNotFoundError, match="there is no such run or file"):
        lightning_modules.create("vit_nano4", digits, "runs/none", model_args=SMALL)


def test_features_of_a_teacher_are_learned(digits, checkpoint):
    task = lightning_modules.create(
        "vit_nano4", digits, checkpoint, epochs=1, distill="features", distill_args={"alpha": 0.5}, model_args=SMALL
    )
    assert task.weights == (0.5, 0.5)
    assert torch.isfinite(fit(task, digits, limit_train_batches=1).callback_metrics["train/distill_loss"])
