"""`run.py --folds K`: every fold a subprocess under runs/<name>/fold0.., one after the other or one on each
device, and what they say together. This process stays light: it imports no torch before the merge and holds no GPU."""

import json
import multiprocessing
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from datamodules.loading.files import write_text
from experiments.cli import launcher
from experiments.cli.errors import NOTES_PRINTED, UsageError
from experiments.config import Command, Config, read
from experiments.folds import FOLD_PER_DEVICE
from experiments.processes import pool
from lightning_modules.callbacks.signals import ORDER, PREEMPTED, exit_code, notice
from lightning_modules.loggers.formats import format_duration, format_metric
from lightning_modules.loggers.history import read_history

PROCESSES = multiprocessing.get_context(
    "spawn"
)  # for the plan, which may need a GPU that must be free again afterwards


def wanted(cfg: Config) -> bool:
    return cfg.folds is not None and cfg.fold is None and not cfg.list


def main(command: Command) -> int:
    """Train what is left of the folds, merge. Returns the exit code: 0 all done, 75 when the time is over or a signal
    came and folds are left, else that of the first fold that failed. Raises UsageError."""
    cfg, began = command.config, time.monotonic()
    _refuse(cfg)
    plan = _planned(command)
    if isinstance(plan, int):
        return plan
    notice.together = True  # from here on a signal is handed to the folds, and waited for
    folds = Folds(plan, command.argv, began)
    code = folds.run()
    if notice.asked:
        return exit_code(ORDER[notice.asked - 1])
    merged = _merge(folds, whole=code == 0) if folds.finished() else 0
    return code or merged


def _refuse(cfg: Config) -> None:
    which = f"0 to {(cfg.folds or 1) - 1}"
    if launcher.tasks() > 1:
        raise UsageError(
            f"--folds {cfg.folds} starts subprocesses: under torchrun or srun give one fold, --fold I ({which}); "
            f"afterwards --folds {cfg.folds} alone, in one process, merges them"
        )
    for key in ("resume", "extend", "eval_only"):
        if getattr(cfg, key):
            raise UsageError(f"--{key} is for one run: --fold I names it ({which})")


class Folds:
    """The folds of a run: which are finished, which run now, how long they take.

    Args:
        plan: what `_plan` sent.
        argv: the command line, which every fold repeats.
        began: the start of the command in time.monotonic(), from which --hours counts.

    `seconds` are wall clock over all launches of a fold, kept in result.json.
    """

    def __init__(self, plan: dict[str, Any], argv: tuple[str, ...], began: float):
        self.plan, self.argv, self.folder, self.k = plan, argv, Path(plan["folder"]), plan["cfg"]["folds"]
        count = plan["cfg"]["devices"] if plan["cfg"]["strategy"] == FOLD_PER_DEVICE else 1
        slots = pool.gpu_slots(plan["gpus"], count) if count > 1 and plan["gpus"] else [{}] * count
        self.pool = pool.Pool(slots, pool.deadline(began, plan["cfg"]["hours"]), stop_together=False)
        self.seconds: list[float] = pool.result(self.folder).get("fold_seconds") or [0.0] * self.k
        self.left = [fold for fold in range(self.k) if fold not in self.finished()]

    def place(self, fold: int) -> Path:
        return self.folder / f"fold{fold}"

    def finished(self) -> list[int]:
        return [fold for fold in range(self.k) if pool.result(self.place(fold)).get("finished")]

    def run(self) -> int:
        """Start what is left and wait for it. Returns 0, the exit code of the first fold that did not end well, or 75
        for time."""
        self._print_plan()
        return self.pool.run(self._start_next, self._ended)

    def expected(self, fold: int) -> float | None:
        """Seconds a fold has still to go, from the slowest measured so far: whole folds, or steps of one begun; None
        where nothing is."""
        whole = [
            self.seconds[each] or pool.result(self.place(each)).get("train_seconds") or 0.0 for each in self.finished()
        ]
        whole += [
            self.seconds[each] / share for each in range(self.k) if (share := self._share(each)) and self.seconds[each]
        ]
        return max(whole) * (1 - self._share(fold)) if any(whole) else None

    def fits(self, fold: int) -> bool:
        expected = self.expected(fold)
        return self.pool.time_left > 0 and (expected is None or expected <= self.pool.time_left)

    def _share(self, fold: int) -> float:
        """The share of an unfinished fold's steps that its history has."""
        if fold in self.finished():
            return 0.0
        steps = [row["step"] for row in read_history(self.place(fold) / "metrics.csv") if "step" in row]
        return min(0.99, max(steps, default=0) / self.plan["steps"])

    def _print_plan(self) -> None:
        left, slots, each = self.left, len(self.pool.slots), self.plan["forecast_seconds"]
        measured, forecast = [self.expected(fold) for fold in left], ""
        if left and None not in measured:
            forecast = f"about {format_duration(sum(filter(None, measured)) / slots)} by those before"
        elif left and each:
            together = format_duration(each * -(-len(left) // slots))
            forecast = f"about {format_duration(each)} of training steps each, {together} together, at "
            forecast += f"{self.plan['speed']:.1f} images/s measured now on one device without data loading"
        how = f"{slots} at a time, each on a device of its own" if slots > 1 else "one after the other"
        print(
            f"{self.k} folds of {self.plan['rows']:,} rows in {self.folder}: {self.k - len(left)} finished"
            + (f", {len(left)} to do, {how}; {forecast}" if left else "")
            + f"; who is held out when: {self.plan['folds_file']}",
            flush=True,
        )

    def _start_next(self) -> int | None:
        """Start a fold, as `Pool.run` asks for it: 75 where it would not end in time."""
        if not self.left:
            return None
        fold = self.left[0]
        if not self.fits(fold):
            needed, there = self.expected(fold), format_duration(self.pool.time_left)
            would = f"would take about {format_duration(needed)} and {there} are left" if needed else "has no time left"
            print(f"--hours: fold {fold} {would}, so it is not started; the same command goes on", flush=True)
            return PREEMPTED
        self.left.pop(0)
        line = [*self.argv, "--fold", str(fold), "--runs_dir", str(self.folder), "--name", f"fold{fold}"]
        line, log = [*line, "--no_overwrite"], None
        if len(self.pool.slots) > 1:
            line, log = [*line, "--devices", "1", "--strategy", "auto"], self.folder / f"fold{fold}.log"
        print(f"fold {fold} starts" + f", its output is in {log}" * bool(log), flush=True)
        self.pool.start(fold, line, {NOTES_PRINTED: "1"}, log)
        return 0

    def _ended(self, child: pool.Child, returned: int) -> int:
        """Note how a fold ended. Returns 0 where it is finished, else its exit code, or 1 where it was killed."""
        fold = child.job
        self.seconds[fold] += child.seconds
        result, took = pool.result(self.place(fold)), format_duration(self.seconds[fold])
        self._keep()
        if result.get("finished"):
            score = format_metric(result["metric"], result["best"]) if result.get("best") is not None else "not scored"
            rest = [*self.left, *(each.job for each in self.pool.running)]
            after = [each for each in map(self.expected, rest) if each is not None]
            seconds = format_duration(sum(after) / len(self.pool.slots))
            print(
                f"fold {fold} has ended after {took}: {score}" + f"; {len(rest)} left, about {seconds}" * bool(after),
                flush=True,
            )
            return 0
        if not notice.asked:
            over = "the time of --hours is over" if self.pool.asked else pool.describe_exit(returned)
            print(f"fold {fold} has stopped after {took} ({over}); the same command goes on", flush=True)
        if self.pool.asked:
            return PREEMPTED  # also where it had no time yet to listen
        return max(returned, 0) or 1

    def _keep(self) -> None:
        """Write how long each fold took, so that a later launch knows."""
        result = pool.result(self.folder)
        about = {key: self.plan["cfg"][key] for key in ("model", "data", "folds")}
        kept = {**about, **result, "fold_seconds": [round(each, 1) for each in self.seconds], "finished": False}
        write_text(self.folder / "result.json", json.dumps(kept, indent=1) + "\n")


def _planned(command: Command) -> dict[str, Any] | int:
    """The plan that `_plan` makes in a subprocess, or the exit code where there is nothing to do or something to
    mend."""
    receive, send = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_plan, args=(command.argv, send), daemon=True)
    process.start()
    send.close()
    try:
        answer = receive.recv()
    except EOFError:
        process.join()
        return max(process.exitcode or 0, 0) or 1  # it has printed why
    process.join()
    if isinstance(answer, str):
        raise UsageError(answer)
    return answer


def _plan(argv: tuple[str, ...], send: Connection) -> None:
    """Resolve the run as one of its folds would, enter its directory, write the folds, measure. Sends a dict, an exit
    code or a complaint."""
    pool.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, and its end is the end of this one
    from experiments.folds import plan as fold_plan

    command = read([*argv])
    try:
        send.send(fold_plan.prepare(command, write=not command.config.dry_run))
    except (ValueError, FileNotFoundError) as error:
        send.send(str(error))
    sys.stdout.flush()


def _merge(folds: Folds, *, whole: bool) -> int:
    """Write what the finished folds say together. Returns 0, or 1 where their files cannot be merged."""
    from experiments.folds import plan as fold_plan

    try:
        fold_plan.conclude(
            folds.plan, {fold: folds.place(fold) for fold in folds.finished()}, folds.seconds, whole=whole
        )
    except (ValueError, OSError) as error:
        print(f"run.py: the folds are not merged: {error}", file=sys.stderr, flush=True)
        return 1
    return 0
