"""run.py processes that another process starts, one beside the other on devices of their own, and what their
directories say. No torch."""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lightning_modules.callbacks.signals import ORDER, PR_SET_PDEATHSIG, notice

OF_ONE_RUN = (
    "WANDB_SWEEP_ID",
    "WANDB_RUN_ID",
    "WANDB_SWEEP_PARAM_PATH",
    "WANDB_NAME",  # that over others: the trial of a W&B sweep, a name
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE",
    "TORCHELASTIC_RUN_ID",
)  # its place among processes: others meet on a port of their own
POLL_SECONDS = 0.2  # between two looks at them
MARGIN_SECONDS = 60  # of --hours, at most a fiftieth of it: for saving and merging


def start(argv: list[str], env: dict[str, str], log: Path | None) -> subprocess.Popen:
    """One run.py of its own, which dies with this process; in a session of its own, so that Ctrl-C comes from here
    alone."""
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


def pass_on(processes: list[subprocess.Popen], before: int, over: bool) -> int:
    """Hand a signal that this process got to others, or SIGTERM when their time is `over`: they save and leave.
    `before` is what they were asked so far; returns what they are asked now, as `notice.asked`."""
    asked = notice.asked or (1 + ORDER.index(signal.SIGTERM)) * over
    if asked <= before:
        return before
    for process in processes:
        process.send_signal(ORDER[asked - 1])
    return asked


def die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def gpu_names(count: int) -> list[str]:
    """The names of the `count` GPUs that this process may use, for CUDA_VISIBLE_DEVICES of others."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [*map(str.strip, visible.split(","))][:count] if visible else [*map(str, range(count))]


def margin(hours: float) -> float:
    """Seconds of --hours that are kept for the end."""
    return min(MARGIN_SECONDS, 72 * hours)


def how(ended: int) -> str:
    return f"exit code {ended}" if ended >= 0 else f"killed by {signal.Signals(-ended).name}"


def result(folder: Path) -> dict[str, Any]:
    """What result.json of a run directory says; {} where there is none."""
    return json.loads((folder / "result.json").read_text()) if (folder / "result.json").is_file() else {}


def score(name: str, value: float) -> str:
    """As `metrics.shown`, which imports torch."""
    return f"{name} {100 * value:.2f} %" if name.split("/")[-1] in ("acc1", "acc5") else f"{name} {value:.5g}"


def clock(seconds: float | None) -> str:
    """`3:05`, `1:02:03`, or `?`."""
    if seconds is None:
        return "?"
    return (
        re.sub(r"^0:0?", "", time.strftime("%-H:%M:%S", time.gmtime(round(seconds))))
        if seconds < 86400
        else f"{seconds / 3600:.1f} h"
    )
