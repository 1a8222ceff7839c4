"""`run.py --folds K`: every fold a process of its own under runs/<name>/fold0.., one after the other or one on each
device, and what they say together. This process stays light: it imports no torch before the merge and holds no GPU."""

import csv
import json
import multiprocessing
import signal
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from datamodules.loading.files import write_text
from experiments.cli import launcher
from experiments.cli.errors import TOLD, UsageError
from experiments.config import Command, Config, read
from experiments.folds import FOLD_PER_DEVICE
from experiments.processes import pool
from lightning_modules.callbacks.signals import ORDER, PREEMPTED, exit_code, notice

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
    folds = Folds(plan, command.argv, None if cfg.hours is None else began + cfg.hours * 3600)
    code = folds.run()
    if notice.asked:
        return exit_code(ORDER[notice.asked - 1])
    merged = _merge(folds, whole=code == 0) if folds.finished() else 0
    return code or merged


def _refuse(cfg: Config) -> None:
    if launcher.tasks() > 1:
        raise UsageError(
            f"--folds {cfg.folds} starts processes of its own: under torchrun or srun give one fold, --fold I (0 to "
            f"{cfg.folds - 1}); "
            f"afterwards --folds {cfg.folds} alone, in one process, merges them"
        )
    for key in ("resume", "extend", "eval_only"):
        if getattr(cfg, key):
            raise UsageError(f"--{key} is for one run: --fold I names it (0 to {cfg.folds - 1})")


@dataclass
class Folds:
    """The folds of a run: which are finished, which run now, how long they take.

    `plan` is what `_plan` sent; `deadline` of time.monotonic(); seconds are wall clock over all launches of a fold,
    kept in result.json.
    """

    plan: dict[str, Any]
    argv: tuple[str, ...]
    deadline: float | None
    running: dict[int, tuple[Any, int, float]] = field(default_factory=dict)  # fold: (process, device, since)
    asked: int = 0

    def __post_init__(self) -> None:
        self.folder, self.k = Path(self.plan["folder"]), self.plan["cfg"]["folds"]
        self.slots = self.plan["cfg"]["devices"] if self.plan["cfg"]["strategy"] == FOLD_PER_DEVICE else 1
        self.seconds: list[float] = pool.result(self.folder).get("fold_seconds") or [0.0] * self.k

    def place(self, fold: int) -> Path:
        return self.folder / f"fold{fold}"

    def finished(self) -> list[int]:
        return [fold for fold in range(self.k) if pool.result(self.place(fold)).get("finished")]

    def run(self) -> int:
        """Start what is left and wait for it. Returns 0, or the exit code of the first fold that did not end well, or
        75 for time."""
        left, code = [fold for fold in range(self.k) if fold not in self.finished()], 0
        self._say(left)
        while self.running or left and not code and not notice.asked:
            while left and not code and not notice.asked and len(self.running) < self.slots:
                if not self.fits(left[0]):
                    needed, there = self.expected(left[0]), pool.clock(self.time_left())
                    would = (
                        f"would take about {pool.clock(needed)} and {there} are left" if needed else "has no time left"
                    )
                    print(
                        f"--hours: fold {left[0]} {would}, so it is not started; the same command goes on", flush=True
                    )
                    code = PREEMPTED
                    break
                self._start(left.pop(0))
            time.sleep(pool.POLL_SECONDS)
            over = self.deadline is not None and bool(self.running) and not self.time_left()
            self.asked = pool.pass_on([process for process, _, _ in self.running.values()], self.asked, over)
            for fold, (process, _, since) in [*self.running.items()]:
                if (ended := process.poll()) is not None:
                    del self.running[fold]
                    self.seconds[fold] += time.monotonic() - since
                    ended = self._ended(fold, ended, left)
                    code = code or ended
        return code

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
        return self.deadline is None or self.time_left() > 0 and (expected is None or expected <= self.time_left())

    def time_left(self) -> float:
        return max(0.0, self.deadline - pool.margin(self.plan["cfg"]["hours"] or 0) - time.monotonic())

    def _share(self, fold: int) -> float:
        """Of the steps of an unfinished fold, those that its history tells of."""
        history = self.place(fold) / "metrics.csv"
        if not history.is_file() or fold in self.finished():
            return 0.0
        with open(history, newline="", encoding="utf-8") as file:
            steps = [int(row["step"]) for row in csv.DictReader(file) if (row.get("step") or "").isdecimal()]
        return min(0.99, max(steps, default=0) / self.plan["steps"])

    def _say(self, left: list[int]) -> None:
        each = self.plan["forecast_seconds"]
        measured = [self.expected(fold) for fold in left]
        if left and None not in measured:
            forecast = f"about {pool.clock(sum(measured) / self.slots)} by those before"
        else:
            forecast = (
                f"about {pool.clock(each)} of training steps each, {pool.clock(each * -(-len(left) // self.slots))} "
                f"together, at "
                f"{self.plan['speed']:.1f} images/s measured now on one device without data loading"
                if left and each
                else ""
            )
        how = f"{self.slots} at a time, each on a device of its own" if self.slots > 1 else "one after the other"
        print(
            f"{self.k} folds of {self.plan['rows']:,} rows in {self.folder}: {self.k - len(left)} finished"
            + (f", {len(left)} to do, {how}; {forecast}" if left else "")
            + f"; who is held out when: {self.plan['folds_file']}",
            flush=True,
        )

    def _start(self, fold: int) -> None:
        device = min({*range(self.slots)} - {slot for _, slot, _ in self.running.values()})
        line = [
            *self.argv,
            "--fold",
            str(fold),
            "--runs_dir",
            str(self.folder),
            "--name",
            f"fold{fold}",
            "--no_overwrite",
        ]
        env, log = {TOLD: "1"}, None
        if self.slots > 1:
            line, log = [*line, "--devices", "1", "--strategy", "auto"], self.folder / f"fold{fold}.log"
            if self.plan["gpus"]:
                env["CUDA_VISIBLE_DEVICES"] = self.plan["gpus"][device]
        print(f"fold {fold} starts" + f", its words are in {log}" * bool(log), flush=True)
        self.running[fold] = pool.start(line, env, log), device, time.monotonic()

    def _ended(self, fold: int, ended: int, left: list[int]) -> int:
        """Note how a fold ended. Returns 0 where it is finished, else its exit code, or 1 for none of its own."""
        result, took = pool.result(self.place(fold)), pool.clock(self.seconds[fold])
        why, ended = pool.how(ended), max(ended, 0)
        self._keep()
        if result.get("finished"):
            score = pool.score(result["metric"], result["best"]) if result.get("best") is not None else "not scored"
            after = [each for each in (self.expected(fold) for fold in [*left, *self.running]) if each is not None]
            rest = (
                f"; {len(left) + len(self.running)} left, about {pool.clock(sum(after) / self.slots)}" if after else ""
            )
            print(f"fold {fold} has ended after {took}: {score}{rest}", flush=True)
            return 0
        if self.asked:
            ended = PREEMPTED  # also where it had no time yet to listen
        if not notice.asked:
            over = "the time of --hours is over" if self.asked else why
            print(f"fold {fold} has stopped after {took} ({over}); the same command goes on", flush=True)
        return ended or 1

    def _keep(self) -> None:
        """Write how long each fold took, so that a later launch knows."""
        result = pool.result(self.folder)
        about = {key: self.plan["cfg"][key] for key in ("model", "data", "folds")}
        _write(
            self.folder / "result.json",
            {**about, **result, "fold_seconds": [round(each, 1) for each in self.seconds], "finished": False},
        )


def _planned(command: Command) -> dict[str, Any] | int:
    """What `_plan` finds out in a process of its own, or the exit code where there is nothing to do or something to
    mend."""
    receive, send = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_plan, args=(command.argv, send), daemon=True)
    process.start()
    send.close()
    try:
        answer = receive.recv()
    except EOFError:
        process.join()
        return max(process.exitcode, 0) or 1  # it has said why
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


def _write(path: Path, result: dict[str, Any]) -> None:
    write_text(path, json.dumps(result, indent=1) + "\n")
