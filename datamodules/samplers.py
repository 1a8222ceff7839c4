"""Which sample comes when. Training order depends on (seed, epoch) only, so a run can stop anywhere and go on with other processes."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class TrainSampler(Sampler[tuple[int, ...]]):
    """Items (index, epoch) of one rank: positions rank, rank + world_size, ... of the epoch's permutation.

    Each `global_batch_size` consecutive positions are one optimizer step whatever the number of ranks or the split into
    micro batches; the incomplete last global batch is dropped. The first pass starts at position `start` (samples of all ranks).

    `repeats` R is DeiT's repeated augmentation (Hoffer et al. 2020): each index of the permutation stands R times in a row, so its copies
    go to different ranks, and an epoch, as long as without, sees a part 1 / R of the pictures. Later copies are (index, epoch, copy).
    """

    def __init__(
        self,
        size: int,
        *,
        global_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
        start: int = 0,
        repeats: int = 1,
    ) -> None:
        if global_batch_size % world_size or start % world_size:
            raise ValueError(f"global_batch_size {global_batch_size} and start {start} must be multiples of world_size {world_size}")
        self.size, self.used = size, size // global_batch_size * global_batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch, self.start, self.repeats = epoch, start, repeats

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this after the first `iter()`, when workers may have prefetched: the same epoch changes nothing."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        order = epoch_order(self.size, self.seed, self.epoch)
        epoch, start, self.start = self.epoch, self.start, 0
        for position in range(start + self.rank, self.used, self.world_size):
            place, copy = divmod(position, self.repeats)
            index = int(order[place])
            yield (index, epoch, copy) if copy else (index, epoch)

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


def passes_per_step(global_batch_size: int, world_size: int, micro_batch_size: int | None, multiple: int = 1) -> int:
    """The smallest divisor k of the per-rank batch with per-rank batch / k at most `micro_batch_size` and a multiple of `multiple`.

    Raises:
        ValueError: global_batch_size is not a multiple of world_size, or there is no such k.
    """
    per_rank, left = divmod(global_batch_size, world_size)
    if left or not per_rank:
        near = max(1, per_rank) * world_size
        raise ValueError(f"--global_batch_size {global_batch_size} is not a multiple of the {world_size} processes; {near} would be")
    largest = micro_batch_size or per_rank
    for passes in range(1, per_rank + 1):
        if per_rank % passes == 0 and per_rank // passes <= largest and per_rank // passes % multiple == 0:
            return passes
    limit = f" of at most --micro_batch_size {largest}" if micro_batch_size else ""
    raise ValueError(
        f"--global_batch_size {global_batch_size} is {per_rank} pictures for each of {world_size} processes: they cannot be split into"
        f" passes of an even number{limit}, and --mixup and --cutmix mix pairs"
    )
