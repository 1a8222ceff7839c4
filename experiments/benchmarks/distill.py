"""Cost of a teacher: the same training step of the same student alone, with a cached teacher's answers, and with the
live teacher."""

import json
import random
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import models
from lightning_modules.distiller import Distiller
from lightning_modules.objectives import distill_losses, losses
from lightning_modules.optimization.optimizers import optimizer
from lightning_modules.task import Task
from lightning_modules.teachers import cached_teacher
from lightning_modules.teachers.cached_teacher import CachedTeacher
from lightning_modules.teachers.teacher import Teacher

CLASSES = 1000
HALF = (0.5, 0.5, 0.5)
SPEC = {"task": "classification", "num_outputs": CLASSES}


def cached(folder: Path, rows: int, topk: int) -> CachedTeacher:
    """One epoch of made-up answers in the form that `prepare.py teacher` writes."""
    identity = {**SPEC, "world_size": 1, "sizes": {"train": rows}}
    about = {
        "format": cached_teacher.FORMAT,
        "view": "replayed",
        "topk": topk,
        "copies": 1,
        "rows": rows,
        "teachers": [],
        "identity": identity,
    }
    (folder / cached_teacher.ABOUT).write_text(json.dumps(about))
    answers = {
        "row": torch.arange(rows).int(),
        **cached_teacher.compress(torch.randn(rows, CLASSES), topk, "classification"),
    }
    cached_teacher.write_shard(cached_teacher.shard_file(folder, about, 0, 0), answers, cached_teacher.digest_of(about))
    return CachedTeacher(folder)


def tasks(student: str, teacher: str, cache: CachedTeacher, device: torch.device, precision: str) -> dict[str, Task]:
    """The three contenders, each with a student of its own from the same first weights."""
    common = {
        "loss": losses.create("cross_entropy", SPEC, 0.1),
        "schedule": lambda step: 1e-4,
        "seed": 0,
        "make_optimizer": partial(optimizer, name="adamw", lr=1e-4, weight_decay=0.05),
    }
    hard = {"distill": distill_losses.create("hard"), "weights": distill_losses.weights("hard")}
    live = Teacher(
        models.create(teacher), mean=HALF, std=HALF, student_mean=HALF, student_std=HALF, precision=precision
    )
    made = {}
    for name, build in {
        "plain": Task,
        "cached": partial(Distiller, teacher=cache, **hard),
        "live": partial(Distiller, teacher=live, **hard),
    }.items():
        torch.manual_seed(0)
        made[name] = build(models.create(student), SPEC, {}, **common).to(device).train()
    for guide in (cache, live):
        guide.to(device)
    return made


def seconds(task: Task, learner: torch.optim.Optimizer, batch: dict[str, Tensor], dtype: torch.dtype | None) -> float:
    """One training step: forward, teacher, backward, update."""
    start = time.perf_counter()
    with torch.autocast(batch["image"].device.type, dtype, enabled=dtype is not None):
        loss = task.losses(batch)["loss"]
    learner.zero_grad(set_to_none=True)
    loss.backward()
    learner.step()
    if batch["image"].device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(student: str, teacher: str, precision: str, batch_size: int, rounds: int, rows: int, topk: int) -> None:
    """Print the median step of each, and the cost of cache and teacher over the plain step: ratio of medians, quartiles
    of the rounds'."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, word = (torch.bfloat16, "bf16-mixed") if precision == "bf16" else (None, "32-true")
    with tempfile.TemporaryDirectory() as folder:
        cache = cached(Path(folder), rows, topk)
        start = time.perf_counter()
        cache(torch.arange(1), 0)
        reading, size = time.perf_counter() - start, sum(file.stat().st_size for file in Path(folder).iterdir())
        made = tasks(student, teacher, cache, device, word)
        learners = {name: task.configure_optimizers() for name, task in made.items()}
        batch = {
            "image": torch.randn(batch_size, 3, 224, 224, device=device),
            "target": torch.randint(CLASSES, (batch_size,), device=device),
            "index": torch.randint(rows, (batch_size,), device=device),
        }
        times: dict[str, list[float]] = {name: [] for name in made}
        for number in range(rounds + 2):  # two to warm up
            for name in random.sample(list(made), len(made)):
                taken = seconds(made[name], learners[name], batch, dtype)
                if number >= 2:
                    times[name].append(taken)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"student {student}, teacher {teacher}, batch {batch_size}, 224 px, {precision}, {rounds} interleaved rounds, "
        f"{where}, "
        f"torch {torch.__version__}"
    )
    plain = statistics.median(times["plain"])
    for name, values in times.items():
        low, _, high = statistics.quantiles([value / alone for value, alone in zip(values, times["plain"])], n=4)
        ratio = (
            ""
            if name == "plain"
            else f"   {statistics.median(values) / plain:.3f} of the plain step (quartiles {low:.3f} to {high:.3f})"
        )
        print(f"  {name:<7}{1000 * statistics.median(values):>9.1f} ms{ratio}")
    print(
        f"  reading an epoch of {rows:,} answers, top {topk}: {reading:.2f} s, {size / 2**20:.1f} MB; "
        f"{reading / rows * batch_size / plain:.5f} of a plain step, not in the ratio"
    )
