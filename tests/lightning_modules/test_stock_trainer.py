"""A data module and a task in a `L.Trainer` that nobody has set up for them: every row once, on any number of ranks,
with default flags."""

import json
import os

import conftest
import pytest

import datamodules

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
    data.splits["predict"] = data.splits["val"]
    answers = torch.cat(trainer.predict(task, datamodule=data))
    with open(f"{folder}/{ranks}-{rank}.json", "w") as file:
        json.dump(
            {
                "steps": trainer.global_step,
                "rows": task.rows,
                "scores": scores,
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
