"""A data module and a task in a `L.Trainer` that nobody has set up for them: every row once, on any number of ranks,
with default flags."""

import csv
import json
import os
import pickle
from pathlib import Path

import conftest
import pytest

import datamodules
import lightning_modules

QUIET = dict(
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
    num_sanity_val_steps=0,
)
ROWS = dict(image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3, global_batch_size=64, workers=0, val_fraction=0.1005)


def made(**words):
    """(digits, a task of one linear layer that writes down the rows it is trained on)."""
    import torch
    from torch import nn

    from lightning_modules.task import Task

    class Recorded(Task):
        def __init__(self, *given, **knobs):
            super().__init__(*given, **knobs)
            self.rows = []

        def training_step(self, batch, batch_idx):
            self.rows.append(batch["index"].tolist())
            return super().training_step(batch, batch_idx)

    data = datamodules.create("digits", **{**ROWS, **words})
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
    return data, Recorded(
        network,
        data.spec,
        {},
        loss=nn.functional.cross_entropy,
        schedule=lambda step: 0.1,
        seed=0,
        make_optimizer=lambda model: torch.optim.SGD(model.parameters(), 0.1),
    )


def train(folder: str, rank: int, ranks: int, words: dict, flags: dict) -> None:
    """Fit one epoch, score val and predict it; leave what came of it in a file of the rank."""
    import lightning as L
    import torch

    torch.set_num_threads(1)
    data, task = made(**words)
    trainer = L.Trainer(accelerator="cpu", devices=ranks, max_epochs=1, default_root_dir=folder, **QUIET, **flags)
    trainer.fit(task, data)
    scores = {key: float(value) for key, value in trainer.callback_metrics.items()}
    (tested,) = trainer.test(task, datamodule=data, verbose=False)
    data.splits["predict"] = data.splits["val"]
    answers = torch.cat(trainer.predict(task, datamodule=data))
    with open(f"{folder}/{ranks}-{rank}.json", "w") as file:
        json.dump(
            {
                "steps": trainer.global_step,
                "rows": task.rows,
                "scores": scores | tested,
                "predicted": len(answers),
                "answers": answers.sum().item(),
                "val": data.sizes["val"],
                "passes": trainer.accumulate_grad_batches,
            },
            file,
        )


def _rank(folder: str, rank: int, port: int, words: dict, flags: dict) -> None:
    os.environ.update(
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",
        }
    )
    train(folder, rank, 2, words, flags)


def on_two_ranks(folder, words: dict, flags: dict) -> list[dict]:
    port = conftest.free_port()
    ranks = [
        conftest.FORKS.Process(target=_rank, args=(str(folder), rank, port, words, {"strategy": "ddp", **flags}))
        for rank in range(2)
    ]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(100)
    assert [each.exitcode for each in ranks] == [0, 0]
    return [json.loads((folder / f"2-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process with default flags does."""
    folder = tmp_path_factory.mktemp("alone")
    train(str(folder), 0, 1, {}, {})
    return json.loads((folder / "1-0.json").read_text())


@pytest.mark.parametrize(
    "words, flags",
    [({}, {}), ({"micro_batch_size": 16}, {"use_distributed_sampler": False})],
    ids=["default", "passes"],
)
def test_two_ranks_see_each_row_once(alone, tmp_path, words, flags):
    ranks = on_two_ranks(tmp_path, words, flags)
    passes = 2 if words else 1
    assert alone["steps"] == 20 and [(each["steps"], each["passes"]) for each in ranks] == [(20, passes)] * 2
    steps = [[sum(each["rows"][at : at + passes], []) for at in range(0, 20 * passes, passes)] for each in ranks]
    assert [sorted(one + other) for one, other in zip(*steps)] == [sorted(step) for step in alone["rows"]]
    assert alone["val"] == 145 and sum(each["predicted"] for each in ranks) == alone["predicted"] == alone["val"]
    for each in ranks:
        assert each["scores"] == pytest.approx(alone["scores"], rel=1e-4)
    assert sum(each["answers"] for each in ranks) == pytest.approx(alone["answers"], rel=1e-3)


def test_a_few_batches_can_be_learned_by_heart():
    import lightning as L

    data, task = made()
    trainer = L.Trainer(accelerator="cpu", devices=1, overfit_batches=2, max_epochs=3, **QUIET)
    trainer.fit(task, data)
    assert trainer.global_step == 6 and task.rows[:2] == task.rows[2:4] == task.rows[4:]
    assert trainer.callback_metrics["val/acc1"] >= 0


def test_another_accumulation_than_the_batch_needs_is_refused():
    import lightning as L

    data, task = made(micro_batch_size=16)
    with pytest.raises(
        ValueError, match=r"accumulate_grad_batches=3\), but global and micro batch size need 4: leave it out"
    ):
        L.Trainer(accelerator="cpu", devices=1, accumulate_grad_batches=3, max_epochs=1, **QUIET).fit(task, data)


def test_a_loader_made_before_the_processes_is_divided_by_them(monkeypatch):
    import torch.distributed as dist

    data, _ = made()
    train, val = data.train_dataloader().sampler, data.val_dataloader().sampler
    assert len(train) == 1280
    for name, value in (("is_initialized", True), ("get_world_size", 2), ("get_rank", 1)):
        monkeypatch.setattr(dist, name, lambda value=value: value)
    assert len(train) == 640 and next(iter(val)) == (1, True)


def created(**knobs):
    """(digits, the task of a small network on them)."""
    data = datamodules.create("digits", **ROWS | {"global_batch_size": 256})
    knobs = {"epochs": 3, "lr": 1e-2, "model_args": {"embed_dim": 32, "depth": 1}, **knobs}
    return data, lightning_modules.create("vit_nano4", data, **knobs)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A training of three epochs with Lightning's own logger and callbacks: (folder, data, task, trainer, best)."""
    import lightning as L
    from lightning.pytorch import callbacks, loggers

    folder = tmp_path_factory.mktemp("stock")
    data, task = created(ema_decay=0.5, layer_decay=0.5, warmup_steps=3)
    best = callbacks.ModelCheckpoint(folder, monitor="val/acc1", mode="max", filename="best")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=3,
        log_every_n_steps=1,
        logger=loggers.CSVLogger(folder, "", ""),
        callbacks=[
            best,
            callbacks.LearningRateMonitor(),
            callbacks.EarlyStopping("train/loss", patience=3, check_on_train_epoch_end=True),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, data)
    return folder, data, task, trainer, best


def cells(folder, name):
    """The cells of a column of metrics.csv that hold something, by step."""
    with open(folder / "metrics.csv", newline="") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def test_any_logger_gets_training_and_validation_values(stock):
    folder, _, task, trainer, best = stock
    assert [*cells(folder, "train/loss")] == [*cells(folder, "train/acc1")] == [*range(15)]
    for stage in ("val", "val_ema"):
        assert [*cells(folder, f"{stage}/acc1")] == [*cells(folder, f"{stage}/loss")] == [4, 9, 14]
    assert max(cells(folder, "val/acc1").values()) == pytest.approx(best.best_model_score.item())
    assert (folder / "hparams.yaml").read_text().count("weight_decay: 0.05") == 1


def test_the_learning_rate_is_that_of_the_step_at_which_it_is_logged(stock):
    folder, _, task, trainer, _ = stock
    scales = [group["lr_scale"] for group in trainer.optimizers[0].param_groups]
    assert len({*scales}) > 1
    for number, scale in enumerate(scales, 1):
        rates = cells(folder, f"lr-AdamW/pg{number}")
        assert rates == pytest.approx({step: task.schedule(step) * scale for step in range(15)})


def test_a_test_returns_its_scores(stock):
    _, data, task, trainer, _ = stock
    (scores,) = trainer.test(task, data, verbose=False)
    assert scores.keys() == {"test/loss", "test/acc1", "test/acc5"} and scores["test/acc1"] > 0.3


def test_a_stock_checkpoint_gives_its_network_back(stock):
    import torch

    import models
    from lightning_modules.task import Task

    _, data, task, trainer, best = stock
    saved = torch.load(best.best_model_path, weights_only=True)
    assert saved["hyper_parameters"] == saved["config"] and saved["spec"] == data.spec
    for use_ema, kept in ((False, "state_dict"), (True, "ema_state_dict"), (None, "ema_state_dict")):
        network, spec = models.load(best.best_model_path, use_ema)
        again = Task.load_from_checkpoint(best.best_model_path, use_ema=use_ema)
        weights = {key.removeprefix("model."): value for key, value in saved[kept].items()}
        for other in (network, again.model):
            assert not other.training and other.state_dict().keys() == weights.keys()
            assert all(torch.equal(value, weights[key]) for key, value in other.state_dict().items())
        assert spec == again.spec == data.spec and again.schedule(7) == task.schedule(7)
    assert trainer.validate(again, data, verbose=False)[0]["val/acc1"] > 0
    elsewhere = Task.load_from_checkpoint(best.best_model_path, map_location="meta", weights_only=True)
    assert {each.device.type for each in elsewhere.parameters()} == {"meta"}
    with pytest.raises(ValueError, match="could run code"):
        Task.load_from_checkpoint(best.best_model_path, weights_only=False)


def test_the_task_of_an_old_run_directory_loads_but_does_not_train():
    from lightning_modules.task import Task

    task = Task.load_from_checkpoint(Path(__file__).parents[1] / "fixtures" / "old_run" / "finished")
    assert task.monitor == "val/acc1" and not task.training and task.configure_optimizers().param_groups
    with pytest.raises(ValueError, match=r"lightning_modules\.create\(task\.model, data, epochs=\.\.\.\)"):
        task.schedule(0)


def test_a_network_of_ones_own_comes_back_into_itself(tmp_path):
    import lightning as L
    import torch

    import models
    from lightning_modules.task import Task

    data, _ = created()
    networks = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 10)) for _ in range(2)]
    task = lightning_modules.create(networks[0], data, epochs=1)
    trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=1, limit_train_batches=1, **QUIET)
    trainer.fit(task, data)
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    again = Task.load_from_checkpoint(tmp_path / "own.ckpt", model=networks[1])
    assert again.model is networks[1] and torch.equal(networks[0][1].weight, networks[1][1].weight)
    with pytest.raises(ValueError, match="models.create did not build"):
        models.load(tmp_path / "own.ckpt")


@pytest.mark.parametrize("flags, expected", [({}, (0.5, "value")), ({"gradient_clip_val": 2.0}, (2.0, None))])
def test_a_trainers_own_clipping_wins(monkeypatch, flags, expected):
    import lightning as L

    data, task = created(clip_grad=0.5, clip_mode="value", epochs=1)
    seen, clip = set(), task.clip_gradients
    monkeypatch.setattr(task, "clip_gradients", lambda *given: (seen.add(given[1:]), clip(*given)))
    trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=1, limit_train_batches=1, **flags, **QUIET)
    trainer.fit(task, data)
    assert seen == {expected}


def test_a_schedule_of_other_epochs_than_the_trainers_warns(capfd):
    import lightning as L

    data, task = created(epochs=5)
    L.Trainer(accelerator="cpu", devices=1, max_epochs=1, limit_train_batches=1, **QUIET).fit(task, data)
    assert "the schedule is for 5 epochs, the Trainer's max_epochs is 1" in "".join(capfd.readouterr())


def test_a_loader_without_its_data_module_is_normalised_or_refused():
    import lightning as L
    import torch

    data, task = created()
    trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=1, **QUIET)
    alone = torch.cat(trainer.predict(task, data.test_dataloader()))
    data.splits["predict"] = data.splits["test"]
    torch.testing.assert_close(alone, torch.cat(trainer.predict(task, datamodule=data)))
    with pytest.raises(ValueError, match="training images are uint8"):
        trainer.fit(task, data.train_dataloader())


def test_a_task_pickles():
    """What `ddp_spawn`, joblib and Ray do with it."""
    import torch

    data, task = created(model_args={"embed_dim": 32, "depth": 1, "dist_head": True})
    again = pickle.loads(pickle.dumps(task)).eval()
    image = torch.randn(2, 3, 8, 8)
    assert torch.equal(again(image), task.eval()(image)) and again.schedule(3) == task.schedule(3)


@pytest.mark.slow
def test_spawned_processes_train():
    import lightning as L

    data, task = created(epochs=1)
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", max_epochs=1, **QUIET)
    before = [parameter.detach().clone() for parameter in task.parameters()]
    trainer.fit(task, data)
    assert trainer.callback_metrics["val/acc1"] >= 0  # which, with the weights, is what comes back from them
    assert not any((old == new).all() for old, new in zip(before, task.parameters()))
