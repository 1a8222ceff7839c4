"""Which sample comes when. Training order depends on (seed, epoch) only, so a run can stop anywhere and go on with other processes."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class TrainSampler(Sampler[tuple[int, int]]):
    """Items (index, epoch) of one rank: positions rank, rank + world_size, ... of the epoch's permutation.

    Each `global_batch_size` consecutive positions are one optimizer step whatever the number of ranks or the split into
    micro batches; the incomplete last global batch is dropped. The first pass starts at position `start` (samples of all ranks).
    """

    def __init__(
        self, size: int, *, global_batch_size: int, seed: int, rank: int = 0, world_size: int = 1, epoch: int = 0, start: int = 0
    ) -> None:
        if global_batch_size % world_size or start % world_size:
            raise ValueError(f"global_batch_size {global_batch_size} and start {start} must be multiples of world_size {world_size}")
        self.size, self.used = size, size // global_batch_size * global_batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch, self.start = epoch, start

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this after the first `iter()`, when workers may have prefetched: the same epoch changes nothing."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = epoch_order(self.size, self.seed, self.epoch)[: self.used]
        epoch, start, self.start = self.epoch, self.start, 0
        for index in order[start + self.rank :: self.world_size]:
            yield int(index), epoch

    def __len__(self) -> int:
        """Samples of this rank in a whole epoch; Lightning counts from the epoch's beginning after a resume too."""
        return self.used // self.world_size


class EvalSampler(Sampler[tuple[int, bool]]):
    """Items (index, valid) of one rank: each sample once over the ranks, each rank the same number.

    Padding repeats index 0 with valid False.
    """

    def __init__(self, size: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.size, self.rank, self.world_size = size, rank, world_size

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        for position in range(self.rank, len(self) * self.world_size, self.world_size):
            valid = position < self.size
            yield (position if valid else 0), valid

    def __len__(self) -> int:
        return -(-self.size // self.world_size)


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation (size,) of one epoch. `RandomState`, because NumPy has frozen its stream (NEP 19): the order survives upgrades."""
    bits = np.random.MT19937(np.random.SeedSequence(seed, spawn_key=(epoch,)))
    return np.random.RandomState(bits).permutation(size)
