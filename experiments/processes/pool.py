"""A pool of run.py subprocesses, each on its own devices, and what their run directories say. No torch."""

import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_modules.callbacks.signals import ORDER, PR_SET_PDEATHSIG, notice

OF_ONE_RUN = (  # variables of one run in a W&B sweep or under a launcher; subprocesses meet on a port of their own
    "WANDB_SWEEP_ID WANDB_RUN_ID WANDB_SWEEP_PARAM_PATH WANDB_NAME MASTER_ADDR MASTER_PORT RANK LOCAL_RANK GROUP_RANK "
    "ROLE_RANK NODE_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE TORCHELASTIC_RUN_ID"
).split()
POLL_SECONDS = 0.2
MARGIN_SECONDS = 60  # of --hours, at most a fiftieth of it: for saving and merging


@dataclass(eq=False)
class Child:
    """A subprocess that runs: the job it does, its slot in the pool, its start in time.monotonic()."""

    job: Any
    process: subprocess.Popen
    slot: int
    since: float

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since


class Pool:
    """run.py subprocesses, at most one at a time for each environment in `slots`.

    Args:
        slots: the environment variables of each slot: its GPUs, or its share of the cores.
        deadline: of time.monotonic(), when running subprocesses are asked to save and leave; None: never.
        stop_together: whether the exit code that stops the pool ends the other subprocesses too.

    `asked` is 0 until the subprocesses are asked to leave, then as `notice.asked` the signal they got.
    """

    def __init__(self, slots: list[dict[str, str]], deadline: float | None, *, stop_together: bool):
        self.slots, self.deadline, self.stop_together = slots, deadline, stop_together
        self.running: list[Child] = []
        self.asked = 0

    @property
    def time_left(self) -> float:
        return math.inf if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def run(
        self,
        start_next: Callable[[], int | None],
        ended: Callable[[Child, int], int],
        watch: Callable[[Child], None] = lambda child: None,
    ) -> int:
        """Run jobs until none is left, a signal came, or one asks to stop. Returns 0 or the first code that is not.

        Args:
            start_next: starts the next job by `start`; returns 0, None when there is none, or a code to stop with.
            ended: takes a child and its return code; returns 0 to go on, or a code to start nothing more.
            watch: called at every poll of a child.

        Raises what these raise, after the subprocesses have saved and left.
        """
        code = 0
        try:
            while True:
                while not code and not self.asked and not notice.asked and len(self.running) < len(self.slots):
                    if (started := start_next()) is None:
                        break
                    code = started
                if not self.running:
                    return code
                time.sleep(POLL_SECONDS)
                self._forward(bool(code and self.stop_together) or not self.time_left)
                for child in [*self.running]:
                    returned = child.process.poll()
                    watch(child)
                    if returned is not None:
                        self.running.remove(child)
                        asks = ended(child, returned)
                        code = code or asks
        except Exception:
            self.stop()
            while any(child.process.poll() is None for child in self.running):
                time.sleep(POLL_SECONDS)
            raise

    def start(self, job: Any, argv: list[str], env: dict[str, str], log: Path | None) -> None:
        """Start a run.py for a job in a free slot."""
        slot = min({*range(len(self.slots))} - {child.slot for child in self.running})
        process = start(argv, {**env, **self.slots[slot]}, log)
        self.running.append(Child(job, process, slot, time.monotonic()))

    def stop(self) -> None:
        """Ask the subprocesses to save and leave; no other is started."""
        self._forward(True)

    def _forward(self, over: bool) -> None:
        """Forward the signal that this process got, or send SIGTERM when their time is over."""
        asked = notice.asked or (1 + ORDER.index(signal.SIGTERM)) * over
        if asked > self.asked:
            for child in self.running:
                child.process.send_signal(ORDER[asked - 1])
            self.asked = asked


def start(argv: list[str], env: dict[str, str], log: Path | None) -> subprocess.Popen:
    """Start a run.py that dies with this process, in another session, so that Ctrl-C comes from here alone."""
    script = Path(__file__).parents[1] / "run.py"
    paths = os.pathsep.join(filter(None, (str(script.parents[1]), os.environ.get("PYTHONPATH"))))
    inherited = {key: value for key, value in os.environ.items() if key not in OF_ONE_RUN}
    out = None if log is None else open(log, "a", encoding="utf-8")  # noqa: SIM115 (the child's)
    try:
        return subprocess.Popen(
            [sys.executable, str(script), *argv],
            env={**inherited, "PYTHONPATH": paths, **env},
            stdout=out,
            stderr=None if out is None else subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    finally:
        if out is not None:
            out.close()


def die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def gpu_names(count: int) -> list[str]:
    """The names of the `count` GPUs that this process may use, for CUDA_VISIBLE_DEVICES of others."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [*map(str.strip, visible.split(","))][:count] if visible else [*map(str, range(count))]


def gpu_slots(names: list[str], slots: int, each: int = 1) -> list[dict[str, str]]:
    """The environments of `slots` slots with `each` of these GPUs."""
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[slot * each : (slot + 1) * each])} for slot in range(slots)]


def deadline(began: float, hours: float | None) -> float | None:
    """When the subprocesses must save and leave, so that --hours is enough for the end too. In time.monotonic()."""
    return None if hours is None else began + hours * 3600 - min(MARGIN_SECONDS, 72 * hours)


def describe_exit(ended: int) -> str:
    return f"exit code {ended}" if ended >= 0 else f"killed by {signal.Signals(-ended).name}"


def result(folder: Path) -> dict[str, Any]:
    """What result.json of a run directory says; {} where there is none."""
    return json.loads((folder / "result.json").read_text()) if (folder / "result.json").is_file() else {}
