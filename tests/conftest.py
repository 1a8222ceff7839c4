"""Shared fixtures: `launch` runs the command line in a fresh process, quickly: a fork of a server that has imported
torch and lightning."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ |= {
    "WANDB_MODE": "offline",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
    "CUDA_VISIBLE_DEVICES": "",
}
for variable in ("WANDB_API_KEY", "IMAGENET_DIR", "VITLAB_DECISION"):
    os.environ.pop(variable, None)

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch", "lightning", "timm", "wandb", "wandb.sdk.launch", "sklearn.datasets", "experiments.reporting.result"]
)


@dataclass
class Finished:
    """How a launched command ended: exit code (negative is a signal) and what it printed, of the first rank and of
    all."""

    code: int
    out: str
    outs: list[str]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def hear_signals() -> None:
    """Give this process, which a test has started, the usual signals back: the tests may run where they are ignored
    (nohup, a job in the background of a shell), and a command that is started so goes on ignoring them."""
    for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(each, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def heard():
    """Signals as a command in the foreground hears them, for one that runs in the tests' own process."""
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)}
    hear_signals()
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


def _child(
    argv: list[str],
    env: dict[str, str],
    folder: str,
    log: str,
    kill_at_step: int | None,
    before: Callable[[], None] | None,
) -> None:
    hear_signals()
    multiprocessing.set_start_method(
        "fork", force=True
    )  # of loader workers, as in a process from a shell; a forkserver's child would
    descriptor = os.open(
        log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    )  # start them from another forkserver, and they would outlive a kill
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    for variable in ("VITLAB_DECISION", "VITLAB_LAUNCHER"):  # of a run inside the test's own process
        os.environ.pop(variable, None)
    os.environ.update(env)
    os.chdir(folder)
    sys.argv = ["run.py", *argv]
    if kill_at_step is not None:
        _kill_before(kill_at_step)
    if before is not None:
        before()
    from experiments.run import main

    code = 1
    try:
        code = main(argv)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _kill_before(step: int) -> None:
    """Die by kill -9 at the first training pass after `step` optimizer steps."""
    from lightning_modules.task import Task

    original = Task.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.global_step >= step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, batch, batch_idx)

    Task.training_step = training_step


@contextmanager
def kept_environment():
    """Put back what a command run in this process writes into its environment, such as the launcher's decision for its
    ranks."""
    before = dict(os.environ)
    yield
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(autouse=True)
def same_environment():
    """Keep the environment of each test; a fixture of a module uses `kept_environment` itself."""
    with kept_environment():
        yield


@pytest.fixture
def launch(tmp_path: Path):
    """launch("--model vit_nano4 ...", ranks=2, kill_at_step=5) -> Finished. With ranks, the processes are started as
    torchrun would.

    `before` is called in each process before the command; `watch` here, with the processes, once they have started.
    """
    return launcher(tmp_path)


def launcher(tmp_path: Path) -> Callable[..., Finished]:
    """What `launch` is, in a folder that outlives the test."""

    def run(
        line: str,
        *,
        ranks: int = 1,
        kill_at_step: int | None = None,
        env: dict[str, str] | None = None,
        timeout: float = 120,
        before: Callable[[], None] | None = None,
        watch: Callable[[list], None] | None = None,
    ) -> Finished:
        port, children, logs = free_port(), [], []
        for rank in range(ranks):
            place = {
                "WANDB_DATA_DIR": str(tmp_path / "wandb-data"),
                "WANDB_CACHE_DIR": str(tmp_path / "wandb-cache"),
                **(env or {}),
            }
            if ranks > 1:
                place |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "LOCAL_WORLD_SIZE": str(ranks),
                    "GROUP_RANK": "0",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "TORCHELASTIC_RUN_ID": "test",
                }
            logs.append(tmp_path / f"launch-{port}-{rank}.log")
            children.append(
                FORKS.Process(
                    target=_child, args=(line.split(), place, str(tmp_path), str(logs[-1]), kill_at_step, before)
                )
            )
            children[-1].start()
        if watch is not None:
            watch(children)
        deadline = time.monotonic() + timeout
        for child in children:
            child.join(max(0.1, deadline - time.monotonic()))
        late = [child for child in children if child.is_alive()]
        for child in late:
            child.kill()
            child.join()
        outs = [log.read_text() if log.exists() else "" for log in logs]
        assert not late, f"still running after {timeout} s: {line}\n" + "\n".join(outs)
        return Finished(children[0].exitcode, outs[0], outs)

    return run


@pytest.fixture
def pics(tmp_path: Path) -> Path:
    """40 training and 13 test pictures of three classes; val (a tenth) comes out of train."""
    write_pictures(tmp_path / "pics" / "train", {"dark": 14, "grey": 13, "light": 13}, seed=1)
    write_pictures(tmp_path / "pics" / "test", {"dark": 5, "grey": 4, "light": 4}, seed=2)
    return tmp_path


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def weights_of(checkpoint: Path) -> dict[str, Any]:
    import torch

    return torch.load(checkpoint, weights_only=True)["state_dict"]


def write_pictures(root: Path, counts: dict[str, int], side: int = 16, seed: int = 0) -> None:
    """JPEGs `root/<class>/<n>.jpg`, each class with a brightness of its own."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    for place, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for n in range(count):
            pixels = rng.integers(0, 60, (side, side, 3)) + 190 * place // max(1, len(counts) - 1)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{n}.jpg", quality=95)


def write_damaged(path: Path) -> None:
    """A picture with a sound header and end, which only decoding finds out."""
    import numpy as np
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8)).save(path, "PNG")
    content = path.read_bytes()
    path.write_bytes(content[:1000] + bytes(100) + content[1100:])
