"""Samplers. Training order depends on (seed, epoch) only, so a run can stop anywhere and go on with
other processes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.utils.data import DistributedSampler


class RankSampler(DistributedSampler):
    """Base of the samplers that divide `size` samples among ranks themselves.

    A `DistributedSampler`, because Lightning wraps any other sampler in one more division by the ranks. `world_size`
    None means the process group's at the time of use: of a loader that is made before there is one.
    """

    def __init__(self, size: int, rank: int | None, world_size: int | None) -> None:
        rows: Any = range(size)
        super().__init__(rows, num_replicas=world_size or 1, rank=rank or 0, shuffle=False)
        self.size, self._given = size, None if world_size is None else (rank or 0, world_size)

    @property
    def place(self) -> tuple[int, int]:
        """(rank, world size)."""
        if self._given is not None:
            return self._given
        return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


class TrainSampler(RankSampler):
    """Items (index, epoch) of one rank: positions rank, rank + world_size, ... of the epoch's permutation.

    Each `global_batch_size` consecutive positions are one optimizer step whatever the number of ranks or the split into
    micro batches; the incomplete last global batch is dropped. The first pass starts at position `start` (samples of
    all ranks).

    `repeats` R is DeiT's repeated augmentation (Hoffer et al. 2020): each index of the permutation stands R times in a
    row, so its copies go to different ranks, and an epoch, as long as without, sees a part 1 / R of the images. Later
    copies are (index, epoch, copy).
    """

    def __init__(
        self,
        size: int,
        *,
        global_batch_size: int,
        seed: int,
        rank: int | None = 0,
        world_size: int | None = 1,
        epoch: int = 0,
        start: int = 0,
        repeats: int = 1,
    ) -> None:
        super().__init__(size, rank, world_size)
        ranks = self.place[1]
        if global_batch_size % ranks or start % ranks:
            raise ValueError(
                f"global_batch_size {global_batch_size} and start {start} must be multiples of world_size {ranks}"
            )
        self.used, self.seed = size // global_batch_size * global_batch_size, seed
        self.epoch, self.start, self.repeats = epoch, start, repeats

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this after the first `iter()`, when workers may have prefetched: the same epoch changes
        nothing."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        order, (rank, world_size) = epoch_order(self.size, self.seed, self.epoch), self.place
        epoch, start, self.start = self.epoch, self.start, 0
        for position in range(start + rank, self.used, world_size):
            place, copy = divmod(position, self.repeats)
            index = int(order[place])
            yield (index, epoch, copy) if copy else (index, epoch)

    def __len__(self) -> int:
        """Samples of this rank in a whole epoch; Lightning counts from the epoch's beginning after a resume too."""
        return self.used // self.place[1]


class EvalSampler(RankSampler):
    """Items (index, valid) of one rank: each sample once over the ranks, each rank the same number.

    Padding repeats index 0 with valid False.
    """

    def __init__(self, size: int, *, rank: int | None = 0, world_size: int | None = 1) -> None:
        super().__init__(size, rank, world_size)

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        rank, world_size = self.place
        for position in range(rank, len(self) * world_size, world_size):
            valid = position < self.size
            yield (position if valid else 0), valid

    def __len__(self) -> int:
        return -(-self.size // self.place[1])


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation (size,) of one epoch. `RandomState`, because NumPy has frozen its stream (NEP 19): the order survives
    upgrades."""
    bits = np.random.MT19937(np.random.SeedSequence(seed, spawn_key=(epoch,)))
    return np.random.RandomState(bits).permutation(size)


def passes_per_step(global_batch_size: int, world_size: int, micro_batch_size: int | None, even: bool = False) -> int:
    """The smallest divisor k of the per-rank batch with per-rank batch / k at most `micro_batch_size`, and even where
    that is asked.

    Raises:
        ValueError: global_batch_size is not a multiple of world_size, or there is no such k.
    """
    per_rank, left = divmod(global_batch_size, world_size)
    if left or not per_rank:
        near = max(1, per_rank) * world_size
        raise ValueError(
            f"--global_batch_size {global_batch_size} is not a multiple of the {world_size} processes; {near} would be"
        )
    largest = micro_batch_size or per_rank
    for passes in range(1, per_rank + 1):
        if per_rank % passes == 0 and per_rank // passes <= largest and not (even and per_rank // passes % 2):
            return passes
    limit = f" of at most --micro_batch_size {largest}" if micro_batch_size else ""
    raise ValueError(
        f"--global_batch_size {global_batch_size} is {per_rank} pictures for each of {world_size} processes: they "
        f"cannot be split into"
        f" passes of an even number{limit}, and --mixup and --cutmix mix pairs"
    )
