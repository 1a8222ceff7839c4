"""Loaders, their worker processes, and the signals that are meant for their run."""

import contextlib
import ctypes
import os
import signal
import threading

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from datamodules.loading.cores import cores
from datamodules.loading.images import collate

TIMEOUT_SECONDS = 300
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def loader(pictures: Dataset, sampler: Sampler, batch_size: int, workers: int, seed: int) -> DataLoader:
    """Batches in the sampler's order from `workers` processes, none: from this one."""
    return DataLoader(
        pictures,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        timeout=TIMEOUT_SECONDS if workers else 0,
        collate_fn=collate,
        worker_init_fn=ignore_terminal_signals,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),  # its own: iter() would draw from the global one
    )


def ignore_terminal_signals(worker_id: int) -> None:
    """`worker_init_fn`: signals sent to every process of a job (torchrun to a process group, SLURM to a step, Ctrl-C to
    a terminal) stop no worker. PyTorch's workers die of them and take the run along, which then cannot save; its own
    end, or its SIGTERM, still ends them.
    """
    for each in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # a handler in Python does not learn who sent it
    threading.Thread(target=_leave_when_the_parent_says_so, daemon=True).start()
    keep_memory()


def _leave_when_the_parent_says_so() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def keep_memory() -> None:
    """Keep freed memory in this process for its next images. glibc hands arrays of 128 kB and more back to the system,
    and the pages of new ones then take as long as the images on them. Elsewhere nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        for parameter, size in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**28)):
            ctypes.CDLL(None).mallopt(parameter, size)


def worker_count(asked: int | None, in_memory: bool, local_ranks: int) -> int:
    """Worker processes of a loader: as asked, or else none for data in memory, or else the cores of this rank
    (`cores`), 12 at most."""
    if asked is not None:
        return asked
    if in_memory:
        return 0
    return min(12, cores(local_ranks))
