"""`benchmark.py load`: a training step on a quiet machine and beside busy processes, with our wait of OpenMP's threads
and its default."""

import os
import random
import statistics
import subprocess
import sys
from contextlib import contextmanager

from torch import get_num_threads

SETTINGS = {"vitlab": {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "")}, "default": {}}
STEPS = """
import sys, time
import torch
import models
threads, name, batch, seconds = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
torch.set_num_threads(threads)
model = models.create(name, 10, image_size=32)
optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
images, targets, times = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,)), []
while len(times) < 3 or sum(times[1:]) < seconds:
    start = time.perf_counter()
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(images), targets).backward()
    optimizer.step()
    times.append(time.perf_counter() - start)
print(sorted(times[1:])[len(times) // 2 - 1])
"""


@contextmanager
def busy(count: int):
    """Keep `count` processes of pure Python running."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def step_seconds(setting: dict[str, str], name: str, batch: int, seconds: float = 5.0) -> float:
    """Median seconds of a step in a process of its own, which reads the setting as it starts."""
    env = (
        {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
        | setting
        | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    )
    line = [sys.executable, "-c", STEPS, str(get_num_threads()), name, str(batch), str(seconds)]
    return float(subprocess.run(line, env=env, check=True, capture_output=True, text=True).stdout)


def measure(name: str, batch: int, rounds: int, load: int) -> None:
    """Print the median step of both settings, quiet and beside `load` busy processes, and the ratio of ours to the
    default."""
    print(f"{name}, batch {batch}, 32 px, float32, {rounds} interleaved rounds, {get_num_threads()} CPU threads")
    for count in (0, load):
        times: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
        with busy(count):
            for _ in range(rounds):
                for setting in random.sample(list(SETTINGS), len(SETTINGS)):
                    times[setting].append(step_seconds(SETTINGS[setting], name, batch))
        ours, default = (statistics.median(times[setting]) for setting in ("vitlab", "default"))
        ratios = ", ".join(f"{theirs / own:.2f}" for own, theirs in zip(times["vitlab"], times["default"]))
        print(
            f"  beside {count} busy processes: {ours:.3f} s a step, by default {default:.3f} s; speed ratio "
            f"{default / ours:.2f} (rounds {ratios})"
        )
