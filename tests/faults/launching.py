"""Ranks as real processes with a fault planted in some of them: a signal, a kill or an error at a chosen step or
phase."""

import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

import conftest
import pytest

TINY = (
    "--data_dir pics --image_size 16 --model vit_nano4 --model_args.embed_dim 32 --model_args.depth 2 "
    "--model_args.drop_path 0.2 "
    "--recipe none --global_batch_size 8 --lr 2e-3 --workers 0 --logger csv --micro_batch_size 4 --accelerator cpu"
)


@dataclass
class Fault:
    """What happens, once, in the processes of `ranks`: when `phase` ("step", "validation", "test", "save", "setup",
    "decide") comes for the `after`-th time. `signals` are sent to the process itself, or with `group` to its process
    group, `apart` seconds one after the other."""

    phase: str
    after: int = 0
    signals: tuple[int, ...] = ()
    ranks: tuple[int, ...] = (0,)
    group: bool = False
    late: float = 0.0
    apart: float = 0.0
    error: str = ""
    kind: type[Exception] = RuntimeError
    passed: int = field(default=0, init=False)

    def strike(self, folder: Path) -> None:
        self.passed += 1
        if self.passed != self.after + 1:
            return
        time.sleep(self.late * int(os.environ.get("RANK", "0")))
        with open(folder / "struck", "a") as file:
            file.write(f"{time.time()}\n")
        for signum in self.signals:
            if self.group:  # from a process apart, as loader workers obey their parent
                subprocess.run(["kill", f"-{int(signum)}", "--", f"-{os.getpid()}"], start_new_session=True, check=True)
            else:
                os.kill(os.getpid(), signum)
            time.sleep(self.apart)
        if self.error:
            raise self.kind(self.error)

    def plant(self, folder: Path) -> None:
        from experiments.running import objects
        from lightning_modules.callbacks.checkpoints import AtomicCheckpointIO
        from lightning_modules.task import Task

        owner, name = {
            "step": (Task, "training_step"),
            "validation": (Task, "validation_step"),
            "test": (Task, "test_step"),
            "save": (AtomicCheckpointIO, "save_checkpoint"),
            "setup": (Task, "configure_optimizers"),
            "decide": (objects, "datamodule"),
        }[self.phase]
        original = getattr(owner, name)

        def struck(*args, **kwargs):
            self.strike(folder)
            return original(*args, **kwargs)

        setattr(owner, name, struck)


@dataclass
class Ended:
    """Exit codes (negative: a signal), output of each rank, and the seconds from the first fault to the last exit (nan
    without)."""

    codes: list[int]
    outs: list[str]
    seconds: float

    @property
    def out(self) -> str:
        return "\n".join(self.outs)


def _rank(argv: list[str], env: dict[str, str], folder: str, log: str, fault: Fault | None) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of the loader's workers, as for a command by itself on Linux
    if fault:
        fault.plant(Path(folder))
    conftest._child(argv, env, folder, log, None, None)


def torchrun_env(rank: int, ranks: int, nodes: int, port: int) -> dict[str, str]:
    """What torchrun sets for global rank `rank`."""
    local = ranks // nodes
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % local),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(local),
        "GROUP_RANK": str(rank // local),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }


def start(
    folder: Path,
    line: str,
    *,
    ranks: int = 1,
    nodes: int = 1,
    fault: Fault | None = None,
    timeout: float = 100,
    env: Callable[[int, int], dict[str, str]] | None = None,
    places: list[Path] | None = None,
) -> Ended:
    """Run the command line in `folder` on `ranks` processes; `env(rank, port)` instead of torchrun's variables, each in
    one of `places`."""
    port, children, logs = conftest.free_port(), [], []
    (folder / "struck").unlink(missing_ok=True)
    for rank in range(ranks):
        place = env(rank, port) if env else torchrun_env(rank, ranks, nodes, port) if ranks > 1 else {}
        place |= {"WANDB_DATA_DIR": str(folder / "wandb-data"), "WANDB_CACHE_DIR": str(folder / "wandb-cache")}
        logs.append(folder / f"launch-{port}-{rank}.log")
        planted = fault if fault and rank in fault.ranks else None
        where = str(places[rank] if places else folder)
        children.append(conftest.FORKS.Process(target=_rank, args=(line.split(), place, where, str(logs[-1]), planted)))
        children[-1].start()
    deadline = time.monotonic() + timeout
    while (left := [child.sentinel for child in children if child.is_alive()]) and time.monotonic() < deadline:
        wait(left, 1)
    end, late = time.time(), [child for child in children if child.is_alive()]
    for child in late:
        child.kill()
        child.join()
    outs = [log.read_text() if log.exists() else "" for log in logs]
    assert not late, f"{len(late)} of {ranks} still running after {timeout} s: {line}\n" + "\n".join(outs)
    struck = (folder / "struck").read_text().split() if (folder / "struck").exists() else []
    return Ended([child.exitcode for child in children], outs, end - float(struck[0]) if struck else float("nan"))


def rows_of(run: Path) -> list[dict[str, float]]:
    from lightning_modules.loggers.csv_logger import read_history

    return read_history(run / "metrics.csv")


def steps_of(run: Path) -> int:
    """Optimizer steps in last.ckpt."""
    import torch

    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


def assert_same_weights(first: Path, second: Path) -> None:
    import torch

    ours, theirs = (conftest.weights_of(run / "checkpoints" / "last.ckpt") for run in (first, second))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def alive(folder: Path) -> list[int]:
    """Processes that work in `folder`, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                zombie = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
                if not zombie and Path(os.readlink(entry / "cwd")) == folder.resolve():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def assert_none_left(folder: Path, seconds: float = 8) -> None:
    """No process is left after a while; a loader's worker looks for its parent every five seconds."""
    deadline = time.monotonic() + seconds
    while (left := alive(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, [(Path("/proc") / str(pid) / "cmdline").read_bytes() for pid in left]


def wait_for(condition: Callable[[], object], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def pics(tmp_path):
    """40 training and 13 test pictures of three classes; val (a tenth) comes out of train. Two ranks of 8 have 4 steps
    an epoch."""
    conftest.write_pictures(tmp_path / "pics" / "train", {"dark": 14, "grey": 13, "light": 13}, seed=1)
    conftest.write_pictures(tmp_path / "pics" / "test", {"dark": 5, "grey": 4, "light": 4}, seed=2)
    return tmp_path


TERM, USR1, HUP, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT
