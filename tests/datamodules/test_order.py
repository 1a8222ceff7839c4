"""Order, augmentation and resume are functions of (seed, epoch, index): the same for any ranks, workers and
interruptions."""

import random
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

import datamodules
from datamodules.loading.images import keyed_rng
from datamodules.loading.samplers import EvalSampler, TrainSampler

PLAIN = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear", crop_pct=1.0)


def digits(**kwargs):
    return datamodules.create("digits", **{**PLAIN, "image_size": 8, "global_batch_size": 256, "seed": 3, **kwargs})


def as_rank(data, rank: int, world: int):
    data.trainer = SimpleNamespace(
        global_rank=rank, world_size=world, num_devices=world, state=SimpleNamespace(fn=None)
    )
    return data


@pytest.fixture
def photos(tmp_path):
    """13 pictures of 2 classes, every one different."""
    for i in range(13):
        folder = tmp_path / "train" / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.RandomState(i).randint(0, 256, (40, 50, 3), np.uint8)).save(folder / f"{i:02d}.png")

    def create(**kwargs):
        words = dict(image_size=16, val_fraction=0, global_batch_size=4, data_dir=str(tmp_path))
        return datamodules.create("folder", **{**PLAIN, **words, **kwargs})

    return create


def test_ranks_share_one_order():
    size, batch = 50, 8
    alone = [index for index, _ in TrainSampler(size, global_batch_size=batch, seed=1, epoch=2)]
    assert len(alone) == len(set(alone)) == 48
    for world in (2, 4):
        words = dict(global_batch_size=batch, seed=1, epoch=2, world_size=world)
        ranks = [[index for index, _ in TrainSampler(size, rank=rank, **words)] for rank in range(world)]
        assert [list(step) for step in zip(*ranks)] == [alone[i : i + world] for i in range(0, 48, world)]
    with pytest.raises(ValueError, match="multiples of world_size 3"):
        TrainSampler(size, global_batch_size=batch, seed=1, world_size=3)


def test_order_is_fixed_and_changes_with_seed_and_epoch():
    def order(**kwargs):
        return [i for i, _ in TrainSampler(10, **{"global_batch_size": 5, "seed": 0, **kwargs})]

    assert (
        order() == order() == [4, 8, 3, 1, 5, 7, 2, 0, 6, 9]
    )  # written down: another order would break resume of old runs
    assert order() != order(seed=1) != order(epoch=1) != order()


def test_sampler_goes_on_where_it_stopped():
    def sampler(**kwargs):
        return TrainSampler(50, global_batch_size=8, seed=1, rank=1, world_size=2, **kwargs)

    whole = list(sampler(epoch=3))
    resumed = sampler(epoch=3, start=16)
    first = iter(resumed)
    head = next(first)
    resumed.set_epoch(3)  # Lightning's call comes after the first samples were drawn
    assert [head, *first] == whole[8:] and len(resumed) == len(whole) == 24
    assert list(resumed) == whole
    fresh = sampler(epoch=3, start=16)
    fresh.set_epoch(4)
    assert list(fresh) == list(sampler(epoch=4)) and {epoch for _, epoch in fresh} == {4}


@pytest.mark.parametrize("size, world", [(13, 2), (1, 3), (12, 4), (7, 1)])
def test_evaluation_sees_each_sample_once(size, world):
    ranks = [list(EvalSampler(size, rank=rank, world_size=world)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1 and sum(map(len, ranks)) < size + world
    assert sorted(index for rank in ranks for index, valid in rank if valid) == list(range(size))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_loaders(photos, world):
    loaders = [
        as_rank(photos(val_fraction=0.4, global_batch_size=6, workers=0), rank, world).val_dataloader()
        for rank in range(world)
    ]
    ranks = [list(loader) for loader in loaders]
    assert [len(rank) for rank in ranks] == [len(loader) for loader in loaders] == [len(ranks[0])] * world
    seen = torch.cat([batch["index"][batch["valid"]] for rank in ranks for batch in rank])
    assert sorted(seen.tolist()) == list(range(6)) and ranks[0][0]["valid"].dtype == torch.bool


@pytest.mark.parametrize("micro", [None, 2])
def test_two_ranks_train_on_the_batches_of_one(photos, micro):
    def steps(rank, world):
        data = as_rank(photos(workers=0, micro_batch_size=micro), rank, world)
        passes, batches = data.accumulation(world), list(data.train_dataloader())
        assert len(batches) == data.steps_per_epoch * passes == 3 * passes
        return [
            torch.cat([batch["index"] for batch in batches[i : i + passes]]).tolist()
            for i in range(0, len(batches), passes)
        ]

    alone, first, second = steps(0, 1), steps(0, 2), steps(1, 2)
    assert [sorted(step) for step in alone] == [sorted(a + b) for a, b in zip(first, second)]
    assert len(set(sum(alone, []))) == 12


def test_accumulation():
    data = digits(global_batch_size=96, micro_batch_size=20)
    assert [data.accumulation(world) for world in (1, 2, 4, 8)] == [6, 3, 2, 1]  # 16, 16, 12, 12 a pass
    assert digits(global_batch_size=96).accumulation(2) == 1
    with pytest.raises(ValueError, match="--global_batch_size 96 is not a multiple of the 5 processes; 95 would be"):
        data.accumulation(5)


def epoch_of(data, epoch: int) -> list[dict]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_augmentation_is_the_same_in_workers_and_whatever_was_drawn_before(photos):
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    here = epoch_of(photos(workers=0), 1)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    there = epoch_of(photos(workers=2), 1)
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one["image"], other["image"]) and torch.equal(one["index"], other["index"])
    by_index = {int(i): image for batch in here for i, image in zip(batch["index"], batch["image"])}
    for changed in (epoch_of(photos(workers=0), 2), epoch_of(photos(workers=0, seed=1), 1)):
        pairs = [
            (image, by_index[int(i)])
            for batch in changed
            for i, image in zip(batch["index"], batch["image"])
            if int(i) in by_index
        ]
        assert len(pairs) > 8 and not any(torch.equal(*pair) for pair in pairs)


def draws() -> tuple:
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_loading_leaves_global_generators_alone(photos):
    loaders = photos(workers=0).train_dataloader(), photos(eval_only=True, val_fraction=0.2, workers=0).val_dataloader()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    undisturbed = draws()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    assert all(list(loader) for loader in loaders)
    assert draws() == undisturbed
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    with pytest.raises(KeyError), keyed_rng(0, 0, 0):
        raise KeyError(draws())
    assert draws() == undisturbed
    with keyed_rng(0, 1, 2):
        keyed = draws()
    with keyed_rng(0, 1, 2):
        assert draws() == keyed and not set(keyed) & set(undisturbed)


class Recorder(L.LightningModule):
    """Writes down (step, epoch, indices, a number of the pictures) of every training batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 1), []

    def training_step(self, batch, _):
        assert batch["image"].dtype == torch.float32
        self.seen.append(
            (
                self.global_step,
                self.current_epoch,
                batch["index"].tolist(),
                round(batch["image"].double().sum().item(), 3),
            )
        )
        return self.layer(batch["image"].mean().view(1, 1)).sum()

    def validation_step(self, batch, _):
        assert "valid" in batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def fit(folder, data, resume: str | None = None) -> list:
    module, save = Recorder(), dict(save_top_k=-1, dirpath=folder, filename="{step}")
    callbacks = [
        ModelCheckpoint(every_n_train_steps=1, **save),
        ModelCheckpoint(every_n_epochs=1, **{**save, "filename": "epoch{epoch}"}),
    ]
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1)
    passes = data.accumulation(1)
    trainer = L.Trainer(
        max_epochs=3, use_distributed_sampler=False, accumulate_grad_batches=passes, callbacks=callbacks, **quiet
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return module.seen


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Three epochs of five steps of two passes, with a checkpoint after each step and each epoch."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(folder, digits(micro_batch_size=128))


SAVED = [("step=3", 3, 0), ("step=7", 7, 2), ("step=5", 5, 1), ("step=10", 10, 0), ("epochepoch=0", 5, 1)]


@pytest.mark.parametrize("name, step, workers", SAVED)
def test_resume_goes_on_exactly(uninterrupted, tmp_path, name, step, workers):
    folder, whole = uninterrupted
    assert len(whole) == 30 and [epoch for _, epoch, *_ in whole] == [0] * 10 + [1] * 10 + [2] * 10
    assert torch.load(folder / f"{name}.ckpt", weights_only=True)["DataModule"]["epoch"] == step // 5
    assert fit(tmp_path, digits(micro_batch_size=128, workers=workers), folder / f"{name}.ckpt") == whole[2 * step :]


def test_position_means_the_same_for_other_ranks():
    state = {"epoch": 1, "samples": 512, "accumulation": 2} | digits().identity
    whole = epoch_of(digits(), 1)
    ranks = [as_rank(digits(micro_batch_size=64), rank, 2) for rank in range(2)]
    parts = []
    for data in ranks:
        data.trainer.state.fn = "fit"
        data.load_state_dict(state)
        parts.append(torch.cat([batch["index"] for batch in data.train_dataloader()]))
    assert torch.equal(torch.stack(parts, dim=1).flatten(), torch.cat([batch["index"] for batch in whole])[512:])


def test_resume_refuses_another_order(uninterrupted, tmp_path):
    folder, _ = uninterrupted
    with pytest.raises(ValueError, match="accumulation was 2, is 1"):
        fit(tmp_path, digits(), folder / "step=3.ckpt")
    with pytest.raises(ValueError, match="seed was 3, is 4"):
        fit(tmp_path, digits(seed=4, micro_batch_size=128), folder / "step=5.ckpt")
    with pytest.raises(ValueError, match="fingerprint was"):
        fit(tmp_path, digits(split_seed=4, micro_batch_size=128), folder / "step=5.ckpt")
