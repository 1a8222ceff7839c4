"""The record of one run, from whatever source it was read."""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from datamodules.knobs import default
from experiments.config import Config

FINISHED, UNFINISHED, BROKEN = "finished", "unfinished", "broken"
PLACE = {knob.name for knob in fields(Config) if knob.metadata["role"] == "place"}  # where a run is, not what it is
DEFAULTS = {knob.name: default(knob) for knob in fields(Config)}


@dataclass
class Record:
    """One run, wherever it was read from.

    Args:
        name: key of every table, different for every run.
        config: the knobs of its config.yaml.
        result: its result.json; {} of a run that is not finished.
        history: rows of its metrics.csv; `epoch` counts from 0, `step` optimizer steps.
        state: finished, unfinished, broken; from W&B also failed, crashed, preempted, running.
        source: file, folder or address.
        folder: run directory, where its predictions are; None for W&B's.
        notes: remarks for the tables.
        folds: of a run over all folds, the run of each.
    """

    name: str
    config: dict[str, Any]
    result: dict[str, Any]
    history: list[dict[str, float]]
    state: str
    source: str
    folder: Path | None = None
    notes: list[str] = field(default_factory=list)
    folds: list["Record"] = field(default_factory=list)

    def value(self, key: str) -> Any:
        """The value of `key` in the result, else in the config, else None. Hours, and sums and means over folds, are
        computed."""
        if key == "hours":
            seconds = self.value("train_seconds")
            return seconds / 3600 if number(seconds) else None
        if self.result.get(key) is not None:
            return self.result[key]
        known = [
            each.value(key) for each in self.folds if key in ("params", "gmacs", "images_per_sec", "train_seconds")
        ]
        if known and all(map(number, known)):
            return (
                sum(known)
                if key == "train_seconds"
                else known[0]
                if key in ("params", "gmacs")
                else sum(known) / len(known)
            )
        return self.knobs().get(key, self.config.get(key))

    def knobs(self) -> dict[str, Any]:
        """The config with its dictionaries spread out as `model_args.depth`; knobs younger than the run have their
        defaults."""
        ours = {"model", "data", "split_seed"} <= self.config.keys()  # else some other program's run in W&B
        values = {key: self.config.get(key, default) for key, default in DEFAULTS.items()} if ours else self.config
        flat: dict[str, Any] = {}
        for key, value in values.items():
            flat |= (
                {f"{key}.{inner}": each for inner, each in value.items()} if isinstance(value, dict) else {key: value}
            )
        return flat

    @property
    def metric(self) -> str | None:
        return self.result.get("metric") or (self.folds[0].metric if self.folds else None)

    def files(self, name: str) -> list[Path]:
        """Its file of predictions of this name; of a run over all folds that has none, its folds'."""
        own = [self.folder / name] if self.folder else []
        return [file for file in own if file.is_file()] or [file for fold in self.folds for file in fold.files(name)]

    @property
    def best(self) -> float | None:
        """The run's own score: over all rows for a run over all folds. None where there is none."""
        found = self.result.get("overall", self.result.get("best")) if self.folds else self.result.get("best")
        return found if number(found) else None


def of_place(key: str) -> bool:
    """Whether a knob, or a key of its dictionary, is no part of what a run is."""
    return key.split(".")[0] in PLACE


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def progress(record: Record) -> str:
    """`not finished: epoch 5 of 10`."""
    epochs, last = (
        record.config.get("epochs"),
        next((int(row["epoch"]) + 1 for row in reversed(record.history) if "epoch" in row), 0),
    )
    return f"not finished: epoch {last}" + (f" of {epochs}" if epochs else "")
