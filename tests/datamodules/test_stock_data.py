"""A data module in a `L.Trainer` with default flags and a LightningModule of someone else's, on one rank and two: every
row once, whatever part of the data the flags leave."""

import json
import os
import pickle

import conftest
import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

import datamodules

QUIET = dict(
    accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False
)
DIGITS = dict(image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3, global_batch_size=64, workers=0, val_fraction=0.1005)


class Rows(L.LightningModule):
    """Any module: a linear layer, that writes down the rows of each stage as (batch) lists."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 8 * 8, 10)
        self.rows = {stage: [] for stage in ("train", "val", "test", "predict")}

    def _see(self, stage, batch):
        assert batch["image"].dtype == torch.float32
        valid = batch.get("valid", torch.ones_like(batch["index"], dtype=torch.bool))
        self.rows[stage].append(batch["index"][valid].tolist())
        return torch.nn.functional.cross_entropy(self.layer(batch["image"].flatten(1)), batch["target"])

    def on_train_start(self):
        self.rows["val"].clear()  # of the sanity check

    def training_step(self, batch, batch_idx):
        return self._see("train", batch)

    def validation_step(self, batch, batch_idx):
        self._see("val", batch)

    def test_step(self, batch, batch_idx):
        self._see("test", batch)

    def predict_step(self, batch, batch_idx):
        self._see("predict", batch)
        return batch["index"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit_and_score(folder: str, rank: int, ranks: int, flags: dict, words: dict) -> None:
    """Fit, test and predict; the rows of each stage go into a file of the rank."""
    torch.set_num_threads(1)
    data, module = datamodules.create("digits", **DIGITS, **words), Rows()
    trainer = L.Trainer(devices=ranks, default_root_dir=folder, **{"max_epochs": 1, **QUIET, **flags})
    trainer.fit(module, data)
    steps = trainer.global_step
    trainer.test(module, data, verbose=False)
    trainer.predict(module, data)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump({"rows": module.rows, "sizes": data.sizes, "steps": steps}, file)


def _rank(folder: str, rank: int, port: int, flags: dict, words: dict) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in place.items()})
    fit_and_score(folder, rank, 2, {"strategy": "ddp", **flags}, words)


@pytest.fixture
def seen(tmp_path):
    """seen(ranks, flags, words) -> the files of the ranks."""

    def run(ranks, flags, **words):
        if ranks == 1:
            fit_and_score(str(tmp_path), 0, 1, flags, words)
        else:
            port = conftest.free_port()
            both = [
                conftest.FORKS.Process(target=_rank, args=(str(tmp_path), rank, port, flags, words)) for rank in (0, 1)
            ]
            for each in both:
                each.start()
            for each in both:
                each.join(100)
            assert [each.exitcode for each in both] == [0, 0]
        return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]

    return run


def rows(files, stage):
    """All rows of a stage, over batches and ranks, sorted."""
    return sorted(row for each in files for batch in each["rows"][stage] for row in batch)


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_row_is_trained_on_scored_and_predicted_once(seen, ranks):
    files = seen(ranks, {})
    sizes = files[0]["sizes"]
    assert sizes == {"train": 1292, "val": 145, "test": 360}  # 1292 = 20 batches of 64 and a rest; 145 is odd
    assert [each["steps"] for each in files] == [20] * ranks
    assert len(trained := rows(files, "train")) == len(set(trained)) == 1280
    for stage, size in (("val", 145), ("test", 360), ("predict", 360)):
        assert rows(files, stage) == list(range(size))


@pytest.mark.parametrize("ranks", [1, 2])
def test_flags_that_leave_a_part_of_the_data(seen, ranks):
    files = seen(ranks, {"limit_train_batches": 3, "limit_val_batches": 1, "limit_test_batches": 0.5})
    assert [each["steps"] for each in files] == [3] * ranks and len(set(rows(files, "train"))) == 3 * 64
    assert rows(files, "val") == list(range(64))
    assert len(set(rows(files, "test"))) == len(rows(files, "test")) == 3 * 64  # 6 batches


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("flags", [{"overfit_batches": 2}, {"fast_dev_run": True}], ids=["overfit", "fast"])
def test_a_few_batches_again_and_again(seen, ranks, flags):
    files = seen(ranks, {"max_epochs": 2, **flags})
    batches, epochs = (2, 2) if "overfit_batches" in flags else (1, 1)
    assert [each["steps"] for each in files] == [batches * epochs] * ranks
    assert len(set(rows(files, "train"))) == len(rows(files, "train")) // epochs == 64 * batches
    for each in files:
        assert each["rows"]["train"][:batches] * epochs == each["rows"]["train"]


def test_accumulated_passes_are_one_step(seen):
    (alone,) = seen(1, {"limit_train_batches": 8}, micro_batch_size=16)
    assert alone["steps"] == 2 and [len(batch) for batch in alone["rows"]["train"]] == [16] * 8


def test_what_is_predicted_where_nothing_lacks_labels(tmp_path):
    """The test split, else val, as predict.py has it."""
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(3):
                Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(tmp_path / split / label / f"{number}.png")
    data = datamodules.create("folder", data_dir=str(tmp_path), **{**DIGITS, "global_batch_size": 2})
    module = Rows()
    L.Trainer(devices=1, **QUIET).predict(module, data)
    assert sum(module.rows["predict"], []) == list(range(6)) == sorted(range(data.sizes["val"]))


@pytest.mark.parametrize("words", [{}, {"mixup": 0.8, "random_erasing": 0.5, "rand_augment": "rand-m9"}])
def test_a_data_module_pickles_for_spawned_ranks(words):
    data = datamodules.create("digits", **DIGITS, **words)
    again = pickle.loads(pickle.dumps(data))
    assert again.spec == data.spec and again.identity == data.identity
    first, second = (next(iter(each.train_dataloader())) for each in (data, again))
    assert torch.equal(first["image"], second["image"])
