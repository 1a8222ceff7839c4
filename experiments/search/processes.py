"""The run.py subprocesses of a sweep: started, watched epoch by epoch, stopped early, counted."""

import math
import shlex
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, Trial, TrialState

from experiments.cli.errors import UsageError, invocation
from experiments.processes import pool
from experiments.search import trials as sweep_trials
from experiments.search.space import flags
from experiments.search.trials import PRUNE, SECONDS, WHY, Trials
from lightning_modules.callbacks.signals import INTERRUPTED, PREEMPTED, notice
from lightning_modules.loggers.formats import format_metric
from lightning_modules.loggers.history import read_history

IN_A_ROW = 3  # failures that stop a sweep
OF_RESULT = (  # keys that result.json alone has
    "best overall ci_low ci_high train_seconds seconds_per_epoch images_per_sec peak_memory_mb params gmacs"
).split()
LAST_LINES = 15


@dataclass
class Watched:
    """A trial that runs: its start, seconds of earlier launches, epochs reported, whether it was stopped early, and the
    (time, size) of its history when last read."""

    trial: Trial
    since: float
    before: float
    reported: set[int]
    pruned: bool
    seen: tuple[int, int] = (0, 0)


class Runs:
    """What is left of a sweep's trials.

    Args:
        trials: the study.
        base: the flags that all trials share.
        epochs: of a trial that does not vary them.
        total: how many trials there are to be in all.
        slots: the environments of the trials that run at once.
        deadline: of time.monotonic(), or None.
    """

    def __init__(
        self,
        trials: Trials,
        base: list[str],
        epochs: int,
        total: int,
        slots: list[dict[str, str]],
        deadline: float | None,
    ):
        self.trials, self.base, self.epochs, self.total = trials, base, epochs, total
        self.space, self.left = trials.space, trials.unfinished()
        self.folder: Path = trials.folder or Path()
        self.pool = pool.Pool(slots, deadline, stop_together=True)
        self.failed = 0
        self.complaint: str | None = None  # the last line of the trial that failed last, if it is a usage error
        self.known = False  # that the runs have the metric

    def place(self, trial: Trial) -> Path:
        return self.folder / f"trial-{trial.number}"

    def run(self) -> int:
        """Run what is left. Returns 0, 75 for time, or the exit code that a trial stops the sweep with; prints how it
        went."""
        self._print_plan()
        code = self.pool.run(self._start_next, self._ended, lambda child: self._watch(child.job, child.process))
        return code if code == 2 else self._conclude(code)

    def in_vain(self) -> bool:
        """Whether nothing has come of the trials so far."""
        return not self.trials.count(TrialState.COMPLETE, TrialState.PRUNED) and not any(
            self.folder.glob("trial-*/result.json")
        )

    def _more(self) -> bool:
        """Whether another trial may be started."""
        return not self.pool.asked and not notice.asked and (bool(self.left) or self.trials.count() < self.total)

    def _print_plan(self) -> None:
        space, count = self.space, {word: self.trials.count(state) for state, word in sweep_trials.STATES.items()}
        done = ", ".join(f"{number} {word}" for word, number in count.items() if number)
        varied, slots = ", ".join(each.name for each in space.varied), len(self.pool.slots)
        print(
            f"sweep {self.folder}: {self.total} trials, {done or 'none yet'}; {space.method} over {varied}, "
            f"{space.goal} {space.metric}" + f"; {slots} at a time" * (slots > 1),
            flush=True,
        )

    def _argv(self, trial: Trial | FrozenTrial) -> list[str]:
        return [*self.base, *flags(self.space.texts(trial.params))]

    def _start_next(self) -> int | None:
        """Start a trial, as `Pool.run` asks for it."""
        if not self.pool.time_left:
            self.pool.stop()
        if not self._more():
            return None
        trial = self.left.pop(0) if self.left else self.trials.ask()
        kept, folder = self.trials.kept(trial), self.place(trial)
        before, reported = kept.user_attrs.get(SECONDS, 0.0), {*kept.intermediate_values}
        watched = Watched(trial, time.monotonic(), before, reported, pruned=PRUNE in kept.user_attrs)
        if watched.pruned or pool.result(folder).get("finished"):  # an earlier launch ended before it could tell
            self._watch(watched)
            return self._conclude_trial(watched, 0)
        log = folder.with_name(f"{folder.name}.log")
        settings = " ".join(flags(self.space.texts(trial.params)))
        verb = "goes on" if folder.exists() else "starts"
        print(f"trial {trial.number} {verb}: {settings} (its output is in {log})", flush=True)
        line = [*self._argv(trial), "--runs_dir", str(self.folder), "--name", folder.name]
        self.pool.start(watched, line, {"WANDB_RUN_GROUP": self.folder.name}, log)
        return 0

    def _watch(self, child: Watched, process: Any = None) -> None:
        """Report the new epochs of its history; stop it early where it has fallen behind. Raises UsageError for a
        metric that runs do not have."""
        history = self.place(child.trial) / "metrics.csv"
        if child.pruned or not history.is_file():
            return
        now = history.stat()
        if child.seen == (now.st_mtime_ns, now.st_size):
            return
        child.seen, rows = (now.st_mtime_ns, now.st_size), read_history(history)
        self._check_metric(rows)
        epochs = int(self.space.texts(child.trial.params).get("epochs", self.epochs))
        for row in rows:
            epoch = int(row["epoch"]) + 1
            if self.space.metric not in row or epoch in child.reported:
                continue
            child.reported.add(epoch)
            child.trial.report(row[self.space.metric], epoch)
            self._keep(child)
            if epoch < epochs and child.trial.should_prune():
                child.pruned = True
                child.trial.set_user_attr(PRUNE, epoch)
                if process is not None:
                    process.send_signal(signal.SIGTERM)
                return

    def _check_metric(self, rows: list[dict[str, float]]) -> None:
        """Whether the first whole epoch has the metric, unless it is one that only result.json has."""
        name, first = self.space.metric, [row for row in rows if row["epoch"] == rows[0]["epoch"]]
        if self.known or not rows or name in OF_RESULT or name.startswith(("test", "oof")):
            return
        keys = [key for row in first for key in row]
        self.known = name in keys
        if not self.known and (any(key.startswith("val") for key in keys) or len(rows) > len(first)):
            self._no_metric(keys)

    def _no_metric(self, keys: list[str]) -> None:
        there = ", ".join(key for key in dict.fromkeys(keys) if key not in ("epoch", "step"))
        raise UsageError(f"metric.name: the runs have no {self.space.metric} (there are {there})")

    def _keep(self, child: Watched) -> None:
        """Write how long it took, so that a later launch knows."""
        child.trial.set_user_attr(SECONDS, child.before + time.monotonic() - child.since)

    def _ended(self, child: pool.Child, returned: int) -> int:
        return self._conclude_trial(child.job, returned)

    def _conclude_trial(self, child: Watched, ended: int) -> int:
        """Tell the study how a trial ended. Returns the exit code to stop with, 0 to go on. Raises UsageError as
        `_watch`."""
        result, trial = pool.result(self.place(child.trial)), child.trial
        self._keep(child)
        if result.get("finished"):
            self._finished(trial, result)
        elif child.pruned:
            kept = self.trials.kept(trial)
            value = kept.intermediate_values.get(kept.last_step or 0, 0.0)
            self._tell(
                trial,
                TrialState.PRUNED,
                why=None if math.isfinite(value) else f"its {self.space.metric} was {value}, not a number",
            )
        elif "not_finite" in result:  # what was tried is to blame, not the sweep
            self._tell(trial, TrialState.PRUNED, why=result["not_finite"].partition(". ")[0])
        elif self.pool.asked or notice.asked or ended in (PREEMPTED, INTERRUPTED):
            print(
                f"trial {trial.number} has stopped ({pool.describe_exit(ended)}); the same command goes on", flush=True
            )
            return ended if ended in (PREEMPTED, INTERRUPTED) else PREEMPTED
        else:
            return self._failed(trial, ended)
        self.failed = 0
        return 0

    def _finished(self, trial: Trial, result: dict[str, Any]) -> None:
        name = self.space.metric
        if name not in (result.get("metric"), *result):
            self._no_metric(
                [result.get("metric") or "", *(key for key, value in result.items() if isinstance(value, int | float))]
            )
        value = result.get("best") if name == result.get("metric") else result[name]
        if isinstance(value, int | float) and math.isfinite(value):
            self._tell(trial, TrialState.COMPLETE, float(value))
        else:  # to a sampler worse than any number, which FAIL would not be
            self._tell(trial, TrialState.PRUNED, why=f"its {name} is {'NaN' if value is None else value}, not a number")

    def _failed(self, trial: Trial, ended: int) -> int:
        log = self.place(trial).with_name(f"trial-{trial.number}.log")
        words = "\n".join(log.read_text(errors="replace").strip().splitlines()[-LAST_LINES:]) if log.is_file() else ""
        print(f"trial {trial.number} has failed ({pool.describe_exit(ended)}):\n{words}", flush=True)
        complaint = words.rpartition("\n")[2] if ended == 2 else None
        if (
            complaint
            and (complaint == self.complaint or self.total == 1)
            and not any(self.folder.glob("trial-*/config.yaml"))
        ):
            return 2  # two say the same and none has begun: it is what all have in common, the data or a flag
        self.complaint = complaint
        self._tell(trial, TrialState.FAIL, why=f"{words}\n{pool.describe_exit(ended)}".strip())
        self.failed += 1
        stops = self.failed >= IN_A_ROW and self._more()
        if stops:
            print(
                f"{IN_A_ROW} trials in a row have failed, so the sweep stops; the same command goes on with the next",
                flush=True,
            )
        return int(stops)

    def _tell(self, trial: Trial, state: TrialState, value: float | None = None, why: str | None = None) -> None:
        if why:
            trial.set_user_attr(WHY, why)
        self.trials.study.tell(trial, value, state=state)
        self.trials.write_csv(self.folder / "trials.csv")
        print(sweep_trials.line(self.trials.row(self.trials.kept(trial)), self.space.metric), flush=True)

    def _conclude(self, code: int) -> int:
        """The table, the best, what repeats it. Returns the exit code."""
        self.trials.write_csv(self.folder / "trials.csv")
        print(f"\n{sweep_trials.table(self.trials.rows(), self.space)}\n")
        if best := self.trials.best():
            print(
                f"best: trial {best.number}, {format_metric(self.space.metric, best.values[0])}; alone, it is\n"
                f"  {invocation('run')} {shlex.join(self._argv(best))}"
            )
        elif nowhere := [row for row in self.trials.rows() if "not a number" in (row[sweep_trials.WHY] or "")]:
            print(
                f"no best: {self.space.metric} was not a number in {len(nowhere)} of {self.trials.count()} trials; is "
                f"it defined on this split? "
                "(auroc, for example, needs rows with and without a label)"
            )
        if found := self.trials.importance():
            print("importance by Optuna: " + ", ".join(f"{name} {share:.2f}" for name, share in found.items()))
        print(
            f"{self.folder / 'trials.csv'} has a row of each; compare: {invocation('compare')} {self.folder}",
            flush=True,
        )
        left = max(0, self.total - self.trials.count()) + self.trials.count(TrialState.RUNNING)
        if self.pool.asked and left:
            print(f"{left} of {self.total} trials are left; the same command goes on", flush=True)
        return code or (PREEMPTED if self.pool.asked and left else 0 if self.trials.count(TrialState.COMPLETE) else 1)
