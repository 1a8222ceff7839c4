"""Faults, as functions that `launch(before=...)` calls in the process of a run, and what the tests of the fault table
share."""

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import weights_of

TINY = (
    "--data_dir pics --image_size 16 --model vit_nano4 --model_args.embed_dim 32 --model_args.depth 2 "
    "--model_args.drop_path 0.2 "
    "--recipe none --global_batch_size 8 --lr 2e-3 --workers 0 --logger csv --micro_batch_size 4 --accelerator cpu"
)  # 4 steps of 2 passes
CHECKPOINTS = "checkpoints"


def same_weights(first: Path, second: Path) -> bool:
    """Whether two checkpoints hold the same weights, to the byte."""
    one, other = weights_of(first), weights_of(second)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def largest_difference(first: Path, second: Path) -> float:
    one, other = weights_of(first), weights_of(second)
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def last(folder: Path, name: str = "last.ckpt") -> Path:
    return folder / CHECKPOINTS / name


def several(*faults: Callable[[], None]) -> None:
    for fault in faults:
        fault()


def kill_when(file: Path, seconds: float = 60) -> Callable[[list], None]:
    """For `launch(watch=...)`: kill -9 all processes as soon as a file is there."""

    def watch(children: list) -> None:
        deadline = time.monotonic() + seconds
        while not file.exists() and time.monotonic() < deadline and any(child.is_alive() for child in children):
            time.sleep(0.0005)
        for child in children:
            os.kill(child.pid, signal.SIGKILL)

    return watch


def slow_writes() -> None:
    """Each write to a checkpoint takes a while, so that it can be hit."""
    from lightning_modules.callbacks import checkpoints

    original = checkpoints._Digested.write

    def write(self: Any, data: Any) -> int:
        time.sleep(0.003)
        return original(self, data)

    checkpoints._Digested.write = write


def die_at_replace(name: str, number: int) -> None:
    """kill -9 just before a file of this name is renamed for the `number`-th time."""
    original, seen = os.replace, []

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == name:
            seen.append(name)
            if len(seen) == number:
                os.kill(os.getpid(), signal.SIGKILL)
        original(source, target)

    os.replace = replace


def record_order(file: str) -> None:
    """Append `step epoch indices` of every training pass of this rank to a file."""
    from lightning_modules.task import Task

    original = Task.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        with open(file, "a") as lines:
            lines.write(f"{self.global_step} {self.current_epoch} {batch['index'].tolist()}\n")
        return original(self, batch, batch_idx)

    Task.training_step = training_step


def fixed_accuracies(values: list[float]) -> None:
    """best.ckpt is chosen by values[epoch], whatever the network says."""
    from lightning_modules.callbacks.checkpoints import BestCheckpoint

    original = BestCheckpoint.on_validation_end

    def on_validation_end(self: Any, trainer: Any, pl_module: Any) -> None:
        self.monitor = "fixed"
        trainer.callback_metrics["fixed"] = torch.tensor(values[trainer.current_epoch])
        original(self, trainer, pl_module)

    BestCheckpoint.on_validation_end = on_validation_end


def mounts_allowed() -> bool:
    """Whether a process of ours may have file systems of its own."""
    return (
        subprocess.run(
            ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=1m", "none", "/mnt"], capture_output=True
        ).returncode
        == 0
    )


NEWNS, NEWUSER, RDONLY, REMOUNT, BIND, REC, PRIVATE = 0x20000, 0x10000000, 1, 32, 4096, 16384, 1 << 18


def _libc(call: str, *arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, call)(*(each.encode() if isinstance(each, str) else each for each in arguments)) != 0:
        raise OSError(ctypes.get_errno(), f"{call} {arguments}")


def _own_mounts() -> None:
    user, group = os.getuid(), os.getgid()
    _libc("unshare", NEWNS | NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _libc("mount", "none", "/", None, REC | PRIVATE, None)


def read_only(folder: str) -> None:
    """The folder as it is, read-only for this process."""
    _own_mounts()
    _libc("mount", folder, folder, None, BIND, None)
    _libc("mount", "none", folder, None, BIND | REMOUNT | RDONLY, None)


def troubled_disk(fault: str, start: int, stop: int | None) -> None:
    """`runs` on a disk of 5 MB of its own that is `full` or `read-only` after `start` optimizer steps and well again
    after `stop` (None: never).

    When the run ends the disk's files are copied to `kept`; just before it is well again, last.ckpt to `during.ckpt`.
    """
    _own_mounts()
    os.makedirs("runs", exist_ok=True)
    _libc("mount", "none", "runs", "tmpfs", 0, "size=5m")
    from experiments.reporting import result as report
    from lightning_modules.task import Task

    step_before, result_before = Task.training_step, report.result
    done = []

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        step = self.global_step
        if step >= start and "start" not in done:
            done.append("start")
            _fill() if fault == "full" else _libc("mount", "none", "runs", None, REMOUNT | RDONLY, "size=5m")
        if stop is not None and step >= stop and "stop" not in done:
            done.append("stop")
            shutil.copy(next(Path("runs").glob("*/checkpoints/last.ckpt")), "during.ckpt")
            os.unlink("runs/ballast") if fault == "full" else _libc("mount", "none", "runs", None, REMOUNT, "size=5m")
        return step_before(self, batch, batch_idx)

    def result(*arguments: Any) -> None:
        try:
            result_before(*arguments)
        finally:
            shutil.copytree("runs", "kept", ignore=shutil.ignore_patterns("ballast"))

    Task.training_step, report.result = training_step, result


def _fill() -> None:
    with open("runs/ballast", "wb", buffering=0) as ballast:
        try:
            for size in (65536, 1):
                while True:
                    try:
                        ballast.write(bytes(size))
                    except OSError:
                        break
        finally:
            os.fsync(ballast.fileno())
