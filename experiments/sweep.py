"""Searches over flags of run.py: python experiments/sweep.py experiments/sweep.yaml --trials 20

FILE is a search space in W&B's sweep format, which `wandb sweep` reads too. Each trial is one run.py under
<runs_dir>/<name>/trial-0, trial-1 ...; trials that fall behind are stopped early where FILE says so. The same command
again resumes the sweep. Flags after `--` go to every run.py: sweep.py FILE --trials 20 -- --data_dir pics --epochs 5
"""

import argparse
import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a checkout need not be installed
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from datamodules.loading.cores import cores
from experiments import config
from experiments.cli import launcher
from experiments.cli.errors import Parser, UsageError, piped, positive
from experiments.folds import processes
from experiments.processes import pool
from experiments.search import space as sweep_space
from experiments.search.space import OURS, Space
from lightning_modules.callbacks.signals import ORDER, exit_code, listening, notice

KNOBS = {knob.name for knob in fields(config.Config)}
LOCK = ".lock"
TRIALS = 20  # where neither the command line nor the file says how many


def _parser() -> Parser:
    parser = Parser(
        prog="sweep.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="sweep.py FILE [--trials N] [--hours H] [--parallel P] [--name NAME] [--runs_dir DIR] [--seed S] [-- "
        "<flags of run.py>]",
    )
    parser.add_argument(
        "file", metavar="FILE", type=Path, help="Search space in W&B's sweep format, such as experiments/sweep.yaml."
    )
    parser.add_argument(
        "--trials",
        type=positive,
        metavar="N",
        help=f"Number of trials. Default: run_cap of FILE, else all points of a grid, else {TRIALS}.",
    )
    parser.add_argument(
        "--hours",
        type=_hours,
        metavar="H",
        help="Hours that this command may take. Trials still running are saved, and the same command resumes them.",
    )
    parser.add_argument(
        "--parallel",
        type=positive,
        default=1,
        metavar="P",
        help="Number of trials that run at once, each on its own --devices GPUs or on a share of the CPU.",
    )
    parser.add_argument(
        "--name", help="Name of the sweep's directory. Default: the name in FILE, else the name of FILE."
    )
    parser.add_argument(
        "--runs_dir",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="Folder of the sweep's directory. Default: runs.",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="Random seed of the values drawn; the runs' seed is -- --seed."
    )
    return parser


@listening()
def main(argv: list[str] | None = None) -> int:
    """Check the file and the flags, run the trials. Returns the exit code: 0 all done, 75 when the time is over or a
    signal came (130 after Ctrl-C) and trials are left, 1 when three fail in a row or none has ended with a score, 2 for
    wrong input."""
    words = [*(sys.argv[1:] if argv is None else argv)]
    cut, parser = words.index("--") if "--" in words else len(words), _parser()
    for word in words[:cut]:
        flag = word.split("=")[0]
        if (
            flag.split(".")[0].removeprefix("--") in KNOBS
            and flag.startswith("--")
            and flag not in parser.format_usage()
        ):
            parser.error(
                f"{flag} is a flag of run.py: put it behind --, as sweep.py FILE --trials {TRIALS} -- {flag} ..."
            )
    args = parser.parse_args(words[:cut])
    try:
        return _sweep(args, words[cut + 1 :])
    except (ValueError, OSError) as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        return 2


def _sweep(args: argparse.Namespace, own: list[str]) -> int:
    began, space = time.monotonic(), sweep_space.read(args.file)
    try:
        from experiments.search import processes as sweep_runs
        from experiments.search import trials as sweep_trials
    except ModuleNotFoundError as error:
        raise UsageError(f"a sweep on this machine needs Optuna: pip install optuna ({error})") from None
    base = _base(space, own)
    if args.seed < 0:
        raise UsageError(f"--seed {args.seed}: must not be negative")
    first = space.texts(sweep_runs.Trials(space, args.seed).ask().params)
    cfg = config.read([*base, *sweep_space.flags(first)], "sweep.py").config  # exit 2 for what run.py would not take
    if processes.wanted(cfg) and space.metric.startswith("val"):
        raise UsageError(
            f"metric.name: {space.metric}: with --folds it is over all rows, as oof/{space.metric.split('/')[-1]}"
        )
    name = args.name or space.name
    if not re.fullmatch(r"\w[\w.+=-]*", name):
        raise UsageError(f"--name {name}: letters, digits and . _ + = - only")
    if launcher.tasks() > 1:
        raise UsageError("it starts processes of its own: run it alone, not under torchrun or srun")
    slots, folder = _slots(cfg, args.parallel), args.runs_dir / name
    with _alone(folder) as new, sweep_trials.stored(folder):
        trials = sweep_runs.Trials(space, args.seed, folder)
        trials.agree(_about(space, cfg, args.seed))
        notice.together = True  # from here on a signal is handed to the trials, and waited for
        total = args.trials or space.run_cap or len(trials.points) or TRIALS
        deadline = pool.deadline(began, args.hours)
        runs = sweep_runs.Runs(trials, base, cfg.epochs, min(total, len(trials.points) or total), slots, deadline)
        try:
            code = runs.run()
        except UsageError as error:
            print(f"sweep.py: {error}", file=sys.stderr)
            code = 2
        if code == 2 and new and runs.in_vain():
            shutil.rmtree(folder)  # it may be tried again under the same name
    return exit_code(ORDER[notice.asked - 1]) if notice.asked else code


def _base(space: Space, own: list[str]) -> list[str]:
    """The flags that all trials share; those typed win over those that FILE gives one value. Raises UsageError."""
    typed = {word.split("=")[0].removeprefix("--") for word in own if word.startswith("--")}
    for name in typed:
        if name in OURS:
            raise UsageError(
                f"--{name} behind -- is not for a sweep's trials"
                + f": put --{name} before it" * (name in ("name", "runs_dir"))
            )
        if name in (each.name for each in space.varied):
            raise UsageError(f"--{name} behind -- is what the file varies")
    return [
        *space.words,
        *sweep_space.flags({key: text for key, text in space.fixed.items() if key not in typed}),
        *own,
    ]


def _slots(cfg: config.Config, parallel: int) -> list[dict[str, str]]:
    """The environment of each of the trials that run at once: its GPUs, or its share of the cores. Raises UsageError
    for too few GPUs."""
    if parallel == 1:
        return [{}]
    count = 0
    if cfg.accelerator != "cpu":  # asked elsewhere: this process holds no GPU and loads no torch
        count = int(
            subprocess.run(
                [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
    if not count:
        threads = os.environ.get("OMP_NUM_THREADS") or str(cores(parallel))
        return [{"OMP_NUM_THREADS": threads}] * parallel
    names, each = pool.gpu_names(count), cfg.devices
    if len(names) < parallel * each:
        raise UsageError(
            f"--parallel {parallel} with --devices {each} takes {parallel * each} GPUs, and there are {len(names)}"
        )
    return pool.gpu_slots(names, parallel, each)


def _about(space: Space, cfg: config.Config, seed: int) -> dict[str, Any]:
    """What makes a sweep this one, in plain values: its space, and the flags of all its trials that are part of what a
    run is."""
    varied, values = {each.name for each in space.varied}, config.plain(cfg)
    about = {
        "method": space.method,
        "metric.name": space.metric,
        "metric.goal": space.goal,
        "early_terminate": space.early,
        "sweep's seed": seed,
        **{f"parameters.{each.name}": str(each) for each in space.varied},
    }
    for knob in fields(config.Config):
        if knob.metadata["role"] != "place" and knob.name in values:
            value = values[knob.name]
            flat = (
                {f"{knob.name}.{key}": inner for key, inner in value.items()}
                if isinstance(value, dict)
                else {knob.name: value}
            )
            about |= {key: inner for key, inner in flat.items() if key not in varied}
    return about | ({"data_dir": os.path.abspath(str(about["data_dir"]))} if about.get("data_dir") else {})


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Hold a sweep's directory, made where it is missing, against another sweep.py on this machine. Gives whether it is
    new. Raises UsageError."""
    new = not folder.exists() or {file.name for file in folder.iterdir()} <= {LOCK}
    if not new and not (folder / "study.db").is_file():
        raise UsageError(f"{folder} exists and is not a sweep (no study.db): --name or --runs_dir another")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise UsageError(
                f"{folder}: another sweep.py is at work on it (process {lock.read().strip() or '?'})"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield new


def _hours(text: str) -> float:
    if not text.replace(".", "", 1).isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of hours, as 12 or 0.5")
    return float(text)


if __name__ == "__main__":
    sys.exit(piped(main))
