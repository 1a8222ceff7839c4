"""The trials of a sweep: an Optuna study in study.db, which a later launch resumes, and its table."""

import csv
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from datamodules.loading.files import whole_file
from experiments.cli.errors import UsageError
from experiments.search.space import Space
from lightning_modules.loggers.formats import format_metric, format_value

STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "unfinished",
}
SECONDS, WHY, PRUNE = "seconds", "why", "prune"  # attributes of a trial in the study
ENOUGH = 5  # finished trials before a word on which parameter mattered

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


class Trials:
    """The study of a space, in `folder`/study.db, or in memory without one.

    Each suggestion is drawn with a seed of `seed` and the trial's number, so that a sweep that was stopped goes on with
    those it would have had.
    """

    def __init__(self, space: Space, seed: int, folder: Path | None = None):
        self.space, self.seed, self.folder, self.points = (
            space,
            seed,
            folder,
            space.points() if space.method == "grid" else [],
        )
        # W&B's hyperband is successive halving in one bracket (wandb/sweeps hyperband_stopping.py), so this and not
        # Optuna's HyperbandPruner,
        # whose later brackets would stop nothing before epoch min_iter x eta, and whose TPE learns within a bracket
        # alone
        pruner = (
            optuna.pruners.SuccessiveHalvingPruner(min_resource=space.early[0], reduction_factor=space.early[1])
            if space.early
            else optuna.pruners.NopPruner()
        )
        storage = f"sqlite:///{(folder / 'study.db').resolve()}" if folder else None
        self.study = optuna.create_study(
            study_name="sweep", storage=storage, direction=_direction(space), pruner=pruner, load_if_exists=True
        )

    def agree(self, about: dict[str, Any]) -> None:
        """Refuse to go on as another sweep than this one was. Raises UsageError with the differences."""
        about, before = json.loads(json.dumps(about)), self.study.user_attrs.get("about")
        if before is None:
            self.study.set_user_attr("about", about)
            return
        if apart := [
            f"{key} {before.get(key)} -> {about.get(key)}"
            for key in {**before, **about}
            if before.get(key) != about.get(key)
        ]:
            raise UsageError(
                f"{self.folder} is a sweep with other values ({', '.join(apart)}): --name another, or delete it"
            )

    def ask(self) -> Trial:
        """A new trial with its parameters drawn: in a copy, so that the file has it whole or not at all."""
        number = self.count()
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        samplers = optuna.samplers
        sampler = (
            samplers.TPESampler(seed=seed, constant_liar=True)
            if self.space.method == "bayes"
            else samplers.RandomSampler(seed=seed)
        )
        copy = optuna.create_study(direction=_direction(self.space), sampler=sampler)
        copy.add_trials(self.study.get_trials(deepcopy=False))
        if self.points:
            copy.enqueue_trial(self.points[number])
        drawn = copy.ask()
        for parameter in self.space.varied:
            parameter.suggest(drawn)
        self.study.add_trial(
            optuna.trial.create_trial(state=TrialState.RUNNING, params=drawn.params, distributions=drawn.distributions)
        )
        return self.unfinished()[-1]

    def unfinished(self) -> list[Trial]:
        """Those that run, or that an earlier launch left unfinished, in order."""
        return [
            Trial(self.study, each._trial_id)
            for each in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        ]

    def count(self, *states: TrialState) -> int:
        return len(self.study.get_trials(deepcopy=False, states=states or None))

    def kept(self, trial: Trial) -> FrozenTrial:
        """What the study has of a trial."""
        return self.study.trials[trial.number]

    def rows(self) -> list[dict[str, Any]]:
        """What is known of each trial: number, state, value, epochs, seconds, why, and its parameters as flags write
        them."""
        return [self.row(each) for each in self.study.get_trials(deepcopy=False)]

    def row(self, frozen: FrozenTrial) -> dict[str, Any]:
        return {
            "number": frozen.number,
            "state": STATES.get(frozen.state, "unfinished"),
            "value": frozen.value if frozen.values else None,
            "epochs": frozen.last_step,
            SECONDS: frozen.user_attrs.get(SECONDS),
            WHY: frozen.user_attrs.get(WHY),
            "parameters": self.space.texts(frozen.params),
        }

    def best(self) -> FrozenTrial | None:
        """The best of those that ran to their end; None where none did."""
        return self.study.best_trial if self.count(TrialState.COMPLETE) else None

    def importance(self) -> dict[str, float]:
        """How much each parameter mattered to those that finished, by Optuna's default evaluator, largest first; {}
        with too few of them."""
        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if len(done) < ENOUGH or len({each.value for each in done}) < 2 or len(self.space.varied) < 2:
            return {}
        return optuna.importance.get_param_importances(self.study)

    def write_csv(self, path: Path) -> None:
        """One row a trial, as `rows`."""
        columns = ["number", "state", "value", "epochs", SECONDS, *(each.name for each in self.space.varied)]
        with whole_file(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")  # which writes None as an empty cell
            writer.writeheader()
            for row in self.rows():
                seconds = None if row[SECONDS] is None else round(row[SECONDS], 1)
                writer.writerow({**row, SECONDS: seconds, **row["parameters"]})


def _direction(space: Space) -> optuna.study.StudyDirection:
    return optuna.study.StudyDirection.MINIMIZE if space.goal == "minimize" else optuna.study.StudyDirection.MAXIMIZE


@contextmanager
def stored(folder: Path) -> Iterator[None]:
    """Raises UsageError where study.db is no database, is in use elsewhere, or cannot be written."""
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise UsageError(
            f"{folder / 'study.db'}: {str(error.__cause__ or error).splitlines()[0]}; once it can be read and "
            f"written, the same "
            "command goes on"
        ) from error


def line(row: Mapping[str, Any], metric: str) -> str:
    """A trial in a few words."""
    settings = ", ".join(f"{name} {text}" for name, text in row["parameters"].items())
    value = (
        format_metric(metric, row["value"]) if row["value"] is not None and math.isfinite(row["value"]) else "no score"
    )
    epochs = f" after {row['epochs']} epoch{'s' * (row['epochs'] > 1)}" if row["epochs"] else ""
    return f"trial {row['number']} {row['state']}{epochs}, {(row[SECONDS] or 0) / 60:.1f} min: {value}; {settings}" + (
        f" ({row[WHY].splitlines()[-1][:150]})" if row[WHY] else ""
    )


def table(rows: list[dict[str, Any]], space: Space) -> str:
    """All trials, one line each."""
    names = [each.name for each in space.varied]
    cells = [["trial", *names, space.metric, "state", "epochs", "minutes"]]
    for row in rows:
        value = "-" if row["value"] is None else format_value(space.metric, row["value"])
        cells.append(
            [
                str(row["number"]),
                *(row["parameters"].get(name, "-") for name in names),
                value,
                row["state"],
                str(row["epochs"] or "-"),
                f"{(row[SECONDS] or 0) / 60:.1f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells)
