"""Worker processes of a loader and the signals that are meant for their run."""
import os
import signal
import threading


def heed_only_the_parent(worker_id: int) -> None:
    """`worker_init_fn`: signals sent to every process of a job (torchrun to a process group, SLURM to a step, Ctrl-C to a terminal) stop no
    worker. PyTorch's workers die of them and take the run along, which then cannot save; its own end, or its SIGTERM, still ends them.
    """
    for each in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # a handler in Python does not learn who sent it
    threading.Thread(target=_leave_when_the_parent_says_so, daemon=True).start()


def _leave_when_the_parent_says_so() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def worker_count(asked: int | None, in_memory: bool, local_ranks: int) -> int:
    """Worker processes of a loader: as asked, or else none for data in memory, or else the cores over the local ranks, 1 to 12."""
    if asked is not None:
        return asked
    if in_memory:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(12, max(1, cores // local_ranks))
