"""Meeting of the processes that torchrun or srun has started: a process group, the decision of rank 0, one shared disk.

A process that waits here for a missing rank exits at once on a signal (`signals`).
"""

import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment

from experiments.cli import launcher
from experiments.cli.errors import UsageError
from experiments.config import Config
from experiments.running import forecast
from lightning_modules.callbacks.preemption import COLLECTIVE_TIMEOUT

NOTICE_SECONDS = 5.0  # of waiting for the others before a line is printed
DISK_SECONDS = 10.0  # for a file to be seen on the other machines: NFS remembers for some seconds what was not there


def meet(place: ClusterEnvironment, cfg: Config) -> None:
    """Wait for all ranks in a process group, which Lightning uses later. Exits with 1 and a line when they do not
    come."""
    if dist.is_initialized():
        return
    os.environ.setdefault("MASTER_ADDR", place.main_address)
    os.environ.setdefault("MASTER_PORT", str(place.main_port))
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    line = f"rank {place.global_rank()} waits at {where} until all {place.world_size()} ranks are there"
    notice = threading.Timer(NOTICE_SECONDS, print, [line], {"flush": True})
    notice.daemon = True
    if launcher.prints():
        notice.start()
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if forecast.on_gpu(cfg) else "gloo",
            rank=place.global_rank(),
            world_size=place.world_size(),
            timeout=COLLECTIVE_TIMEOUT,
        )
    except RuntimeError as error:
        print(
            f"run.py: the {place.world_size()} ranks have not met at {where}: {str(error).splitlines()[0][:150]}",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(1) from None
    finally:
        notice.cancel()


def broadcast(value: Any, problem: Exception | None = None) -> Any:
    """Broadcast a value of rank 0, or a `problem`. Collective.

    Raises UsageError on rank 0 for a problem, SystemExit(2) on the others: one message is enough.
    """
    shared: list[tuple[Any, str | None]] = [(value, None if problem is None else str(problem))]
    _together(lambda: dist.broadcast_object_list(shared, device=torch.device("cpu")))
    return _value_or_exit(*shared[0])


def agree(problem: Exception | None) -> None:
    """End all ranks if one has a `problem`, as `broadcast` does. Collective."""
    _value_or_exit(
        None,
        next(filter(None, _gathered(problem and f"rank {dist.get_rank()} ({socket.gethostname()}): {problem}")), None),
    )


def one_disk(runs_dir: str) -> None:
    """Check that every rank sees what rank 0 writes in the folder of run directories. Collective; ends as
    `broadcast`."""
    folder, token, made, problem = Path(runs_dir), f".seen-{uuid.uuid4().hex}", [], None
    if dist.get_rank() == 0:
        try:
            made = [each for each in (folder, *folder.parents) if not each.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / token).touch()
        except OSError as error:
            problem = UsageError(f"--runs_dir {runs_dir} cannot be written: {error.strerror or error}")
    token = broadcast(token, problem)
    places = _gathered((_appears(folder, token), f"{socket.gethostname()}, {os.path.abspath(runs_dir)}"))
    blind = next((rank for rank, (seen, _) in enumerate(places) if not seen), None)
    if dist.get_rank() == 0:
        (folder / token).unlink(missing_ok=True)
        for each in made if blind is not None else ():
            each.rmdir()
    _value_or_exit(
        None,
        None
        if blind is None
        else f"--runs_dir {runs_dir} must lie on a disk that all machines see: rank {blind} ({places[blind][1]}) "
        f"does not find what rank 0 ({places[0][1]}) has written",
    )


def _appears(folder: Path, name: str) -> bool:
    """Whether a file is there, or comes within DISK_SECONDS. A listing asks the server of a network disk, where
    `exists` may not."""
    until = time.monotonic() + DISK_SECONDS
    while not (folder.is_dir() and name in os.listdir(folder)):
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def _gathered(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    _together(lambda: dist.all_gather_object(found, value))
    return found


def _together(collective: Callable[[], Any]) -> None:
    try:
        collective()
    except RuntimeError as error:
        print(
            f"rank {dist.get_rank()}: another rank has left before the run began ({str(error).splitlines()[0][:150]})",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(1) from None


def _value_or_exit(value: Any, problem: str | None) -> Any:
    if problem is None:
        return value
    if dist.get_rank():
        raise SystemExit(2)
    raise UsageError(problem)
