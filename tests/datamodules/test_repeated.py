"""Repeated augmentation: the indices of DeiT's and timm's samplers for every rank and epoch, sharded once, each copy
seen differently."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from timm.data.distributed_sampler import RepeatAugSampler

import datamodules
from datamodules.loading import samplers
from datamodules.loading.samplers import TrainSampler, epoch_order

# RASampler of facebookresearch/deit 7e160fe, samplers.py: sha256 over the ranks' index lists as JSON, 1000 pictures, by
# (world size, epoch)
DEIT = {
    (1, 0): "fbe70828394b379f",
    (1, 1): "5a2b56f3e68827f6",
    (1, 5): "b1657960f643dad9",
    (2, 0): "709d711d3609216b",
    (2, 1): "5c07162831617b4c",
    (2, 5): "31189118bce428e4",
    (4, 0): "649e5ad4e4e95f0c",
    (4, 1): "c3b51fc80fd7c6d8",
    (4, 5): "9ceb8f1ec8dca6d5",
}


def deits_permutation(size: int, seed: int, epoch: int):
    return torch.randperm(size, generator=torch.Generator().manual_seed(epoch)).numpy()


def indices(sampler) -> list[int]:
    return [key[0] for key in sampler]


@pytest.mark.parametrize("world, epoch", DEIT)
def test_indices_are_deits(monkeypatch, world, epoch):
    monkeypatch.setattr(samplers, "epoch_order", deits_permutation)
    words, digest = dict(global_batch_size=256, seed=0, world_size=world, epoch=epoch, repeats=3), hashlib.sha256()
    for rank in range(world):
        digest.update(json.dumps(indices(TrainSampler(1000, rank=rank, **words))).encode())
    assert digest.hexdigest()[:16] == DEIT[world, epoch]


@pytest.mark.parametrize("repeats, size, batch", [(3, 300, 256), (2, 50, 8), (4, 50, 8), (1, 50, 8)])
def test_indices_are_timms(monkeypatch, repeats, size, batch):
    monkeypatch.setattr(samplers, "epoch_order", deits_permutation)
    for world in (1, 2, 4):
        for rank in range(world):
            theirs = RepeatAugSampler(
                range(size), num_replicas=world, rank=rank, num_repeats=repeats, selected_round=batch
            )
            ours = TrainSampler(size, global_batch_size=batch, seed=0, rank=rank, world_size=world, repeats=repeats)
            for epoch in range(3):
                theirs.set_epoch(epoch), ours.set_epoch(epoch)
                assert indices(ours) == list(map(int, theirs)) and len(ours) == len(theirs)


def test_copies_have_names_of_their_own():
    words = dict(global_batch_size=8, seed=1, epoch=2)
    keys = list(TrainSampler(50, **words, repeats=3))
    assert len(keys) == 48 == len(set(keys)) and keys[:4] == [
        (keys[0][0], 2),
        (keys[0][0], 2, 1),
        (keys[0][0], 2, 2),
        (keys[3][0], 2),
    ]
    plain = list(TrainSampler(50, **words))
    assert keys[::3] == plain[:16]  # the first copy is augmented as without repeats


def test_it_goes_on_in_the_middle_of_an_epoch():
    whole = [
        list(TrainSampler(50, global_batch_size=8, seed=1, rank=rank, world_size=2, epoch=3, repeats=3))
        for rank in range(2)
    ]
    for rank in range(2):
        resumed = TrainSampler(50, global_batch_size=8, seed=1, rank=rank, world_size=2, epoch=3, start=16, repeats=3)
        assert list(resumed) == whole[rank][8:] and list(resumed) == whole[rank]
    assert [key for pair in zip(*whole) for key in pair] == list(
        TrainSampler(50, global_batch_size=8, seed=1, epoch=3, repeats=3)
    )


def test_copies_look_different():
    data = datamodules.create(
        "digits",
        image_size=16,
        global_batch_size=60,
        seed=3,
        workers=0,
        repeated_augment=3,
        rand_augment="rand-m9-n2-p1.0",
    )
    assert (
        data.steps_per_epoch == datamodules.create("digits", global_batch_size=60).steps_per_epoch
        and data.identity["repeated_augment"] == 3
    )
    for batch in list(data.train_dataloader())[:3]:
        index, image = batch["index"].view(20, 3), batch["image"].view(20, 3, -1)
        assert (index == index[:, :1]).all() and len(index[:, 0].unique()) == 20
        same = [(image[:, a] == image[:, b]).all(dim=1).sum() for a, b in ((0, 1), (0, 2), (1, 2))]
        assert max(same) <= 1


def repeat_and_record() -> None:
    """In a launched process: three copies of each digit; every pass appends (epoch, indices) to `seen-<rank>.jsonl`."""
    import datamodules
    from lightning_modules.task import Task

    create, step = datamodules.create, Task.training_step

    def training_step(self, batch, batch_idx):
        with open(f"seen-{os.environ.get('RANK', 0)}.jsonl", "a") as file:
            file.write(json.dumps([self.current_epoch, batch["index"].tolist()]) + "\n")
        return step(self, batch, batch_idx)

    datamodules.create = lambda name, **kwargs: create(name, **{**kwargs, "repeated_augment": 3})
    Task.training_step = training_step


def test_two_processes_of_a_run_share_the_order_once(launch, tmp_path: Path):
    line = (
        "--data digits --model vit_nano4 --model_args.embed_dim 32 --model_args.depth 1 --image_size 16 --recipe none "
        "--global_batch_size 128 "
        "--micro_batch_size 64 --seed 5 --epochs 2 --workers 0 --accelerator cpu --devices 2 --logger csv --name "
        "repeated"
    )
    ended = launch(line, ranks=2, before=repeat_and_record)
    assert ended.code == 0, "\n".join(ended.outs)
    for rank in range(2):
        seen = [json.loads(text) for text in (tmp_path / f"seen-{rank}.jsonl").read_text().splitlines()]
        assert len(seen) == 2 * 10 and all(len(batch) == 64 for _, batch in seen)
        for epoch in range(2):
            order = [int(index) for index in epoch_order(1293, 5, epoch) for _ in range(3)][:1280]
            assert sum((batch for at, batch in seen if at == epoch), []) == order[rank::2]
