"""The tables of a comparison: the metric and its direction, the runs in order, groups of runs that differ in their
seeds; runs.csv and groups.csv."""

import csv
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from datamodules.loading.closest import did_you_mean
from datamodules.loading.files import whole_file
from experiments.cli.errors import UsageError
from experiments.comparison.record import FINISHED, Record, number, of_place
from lightning_modules.loggers.formats import format_value, in_percent

SMALLER = {*"loss log_loss rmse mse mae mape error nll brier ece params gmacs train_seconds peak_memory_mb".split()}
LARGER = {*"acc1 acc5 acc accuracy f1 auroc auc map qwk r2 spearman kappa".split()}
SHOWN_PLACES = {"recipe", "devices", "num_nodes"}  # no part of what a run is, but worth a column where they differ
EACH_RUN = {"seed", "fold"}  # what the runs of a group differ in
PATHS = {"teacher", "init", "teacher_init"}  # and these, where their names have the seed: cache0, cache1 for seeds 0, 1
COST = ("params", "gmacs", "images_per_sec", "hours")


@dataclass
class Group:
    """Runs of one configuration: `runs` finished with a score, in the order of their seeds; `rest` the others. `number`
    counts from 1, best first."""

    name: str
    knobs: dict[str, Any]
    runs: list[Record]
    rest: list[Record]
    scores: list[float]
    number: int = 0

    def spread(self) -> tuple[float | None, float | None]:
        """(mean, standard deviation of a sample) of the scores; None without a run, or without a second."""
        return (mean(self.scores) if self.scores else None), (stdev(self.scores) if len(self.scores) > 1 else None)

    def of(self, key: str) -> list[float]:
        """What the finished runs say of a number."""
        return [value for value in (run.value(key) for run in self.runs) if number(value)]


@dataclass
class Comparison:
    """Everything the outputs show. `records` best first, then those without a score; `differing` config keys; `tested`
    test metrics there are."""

    metric: str
    smaller: bool
    records: list[Record]
    groups: list[Group]
    differing: list[str]
    tested: list[str]
    notes: list[str]

    def score(self, record: Record) -> float | None:
        return score(record, self.metric)

    def group_of(self, record: Record) -> Group:
        return next(group for group in self.groups if record in group.runs or record in group.rest)


def score(record: Record, metric: str) -> float | None:
    """The run's own best where it was chosen by this metric; else what its result says of it. Scores of averaged (EMA)
    weights, and over all folds, are scores too."""
    if record.best is not None and _plain(record.metric) == _plain(metric):
        return record.best
    found = record.result.get(metric)
    return found if number(found) else None


def compare(records: list[Record], wanted: str | None = None) -> Comparison:
    """Put the runs in order. `wanted`: a key of result.json instead of the commonest metric. Raises UsageError when no
    run has it."""
    notes: list[str] = []
    metric = _metric(records, wanted, notes)
    smaller = _smaller(metric, records, notes)
    found = [(each, value) for each in records if (value := score(each, metric)) is not None and each.state == FINISHED]
    found.sort(key=lambda pair: (pair[1] * (1 if smaller else -1), pair[0].name))
    scored = [each for each, _ in found]
    ordered = scored + [each for each in records if each not in scored]
    differing = _differing(ordered)
    groups = _groups(ordered, differing, metric, smaller)
    base = metric.split("/")[-1]
    tested = [
        key
        for key in dict.fromkeys(
            [f"test/{base}", *(key for each in scored for key in each.result if key.startswith("test/"))]
        )
        if key != metric and any(number(each.result.get(key)) for each in scored)
    ]
    _warn(ordered, scored, metric, notes)
    return Comparison(metric, smaller, ordered, groups, differing, tested, notes)


def _plain(metric: str | None) -> str:
    return (metric or "").replace("val_ema/", "val/").replace("oof/", "val/")


def _metric(records: list[Record], wanted: str | None, notes: list[str]) -> str:
    if wanted:
        there = sorted({key for each in records for key, value in each.result.items() if number(value)})
        if wanted not in there and not any(_plain(each.metric) == _plain(wanted) for each in records):
            raise UsageError(f"--metric {wanted}: no run has it{did_you_mean(wanted, there)}")
        return wanted
    names = [each.metric for each in records if each.metric and each.best is not None]
    counts = Counter(map(_plain, names))
    if not counts:
        unfinished = ", ".join(f"{each.name} ({'; '.join(each.notes) or each.state})" for each in records[:5])
        raise UsageError(f"none of the {len(records)} runs is finished with a score: {unfinished}")
    common = counts.most_common(1)[0][0]
    chosen = Counter(name for name in names if _plain(name) == common).most_common(1)[0][0]
    if len(counts) > 1:
        said = ", ".join(f"{name} {times}" for name, times in counts.most_common())
        notes.append(
            f"The runs have different metrics ({said}); sorted by {chosen}. The others stand with what they reached "
            f"in it, if they say."
        )
        for each in records:
            if each.best is not None and _plain(each.metric) != common:
                each.notes.append(f"chosen by {each.metric} ({shown(each.metric, each.best)}), not by {chosen}")
    return chosen


def _smaller(metric: str, records: list[Record], notes: list[str]) -> bool:
    """Whether a smaller value is better: as the results say, as the name says, or as the best epochs were chosen."""
    modes = {each.result.get("mode") for each in records if _plain(each.metric) == _plain(metric)} & {"min", "max"}
    name = metric.split("/")[-1]
    if len(modes) == 1:
        return modes == {"min"}
    if name in SMALLER | LARGER:
        return name in SMALLER
    lowest = highest = 0
    for each in records:
        name, best = each.metric or "", each.best
        values = [row[name] for row in each.history if name in row]
        if best is not None and values and min(values) < max(values):
            lowest += abs(best - min(values)) <= 1e-6 * abs(best)
            highest += abs(best - max(values)) <= 1e-6 * abs(best)
    notes.append(
        f"{metric}: taken as better when {'smaller' if lowest > highest else 'larger'} "
        + ("(the best epochs are those)." if lowest != highest else "(nothing says otherwise).")
    )
    return lowest > highest


def _differing(records: list[Record]) -> list[str]:
    """Config keys in which the runs differ, in their order, those of dictionaries last."""
    known = [each.knobs() for each in records if each.config]
    keys = dict.fromkeys(key for each in known for key in each if not of_place(key) or key in SHOWN_PLACES)
    return sorted(
        (key for key in keys if len({_text(each.get(key)) for each in known}) > 1), key=lambda key: "." in key
    )


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _groups(records: list[Record], differing: list[str], metric: str, smaller: bool) -> list[Group]:
    """Runs equal but for seed, fold and place, best mean first; a run without a config is a group alone."""
    keys = [key for key in differing if key not in EACH_RUN and not of_place(key)]
    members: dict[str, list[Record]] = {}
    for each in records:
        knobs = each.knobs()
        same = _text(
            [_starred(str(knobs[key]), each) if key in PATHS and knobs.get(key) else knobs.get(key) for key in keys]
        )
        members.setdefault(same if each.config else f"alone {each.name}", []).append(each)
    groups = []
    for all_runs in members.values():
        scores = {run.name: score(run, metric) for run in all_runs if run.state == FINISHED}
        runs = [run for run in all_runs if scores.get(run.name) is not None]
        runs.sort(key=lambda run: (_order(run.value("seed")), run.name))
        first, knobs = all_runs[0], {}
        for key in differing:
            if key not in EACH_RUN:
                alike = len({_text(run.knobs().get(key)) for run in all_runs}) == 1
                value = first.knobs().get(key)
                knobs[key] = value if alike else _starred(str(value), first)
        rest, values = [run for run in all_runs if run not in runs], [scores[run.name] or 0.0 for run in runs]
        groups.append(Group(_group_name(all_runs), knobs, runs, rest, values))
    groups.sort(key=lambda group: (not group.runs, (group.spread()[0] or 0) * (1 if smaller else -1), group.name))
    taken = Counter(group.name for group in groups)
    for place, group in enumerate(groups, 1):
        group.number = place
        group.name += f" ({place})" * (taken[group.name] > 1)
    return groups


def _order(seed: Any) -> tuple[int, float]:
    return (0, seed) if number(seed) else (1, 0)


def _starred(text: str, record: Record) -> str:
    """A path with a star for the run's seed in its last name, where it is a whole number there."""
    return re.sub(rf"(?<![0-9.]){re.escape(str(record.value('seed')))}(?![0-9.])(?=[^/]*/?$)", "*", text)


def _group_name(records: list[Record]) -> str:
    """The runs' name with a star for the seed where that is all they differ in, else the first one's."""
    names = {
        re.sub(rf"(?<![a-zA-Z0-9])(s|seed[-_=]?)?{re.escape(str(each.value('seed')))}(?![0-9.])", r"\1*", each.name)
        for each in records
    }
    if len(records) == 1:
        return records[0].name
    return names.pop() if len(names) == 1 else f"{records[0].name} and {len(records) - 1} like it"


def _warn(records: list[Record], scored: list[Record], metric: str, notes: list[str]) -> None:
    """What makes scores hard to compare."""
    for key, words in (
        ("data", "data sets"),
        ("split_seed", "splits (split_seed)"),
        ("val_fraction", "splits (val_fraction)"),
    ):
        values = {_text(each.value(key)) for each in scored}
        if len(values) > 1:
            notes.append(
                f"The runs are of different {words}: {', '.join(sorted(values))}. Their scores are of different "
                f"pictures."
            )
    prints = Counter(each.result["data_fingerprint"] for each in scored if each.result.get("data_fingerprint"))
    if len(prints) > 1:
        notes.append(f"The runs saw {len(prints)} different states of their files (data_fingerprint in result.json).")
    kinds = {each.metric or "" for each in scored if _plain(each.metric) == _plain(metric)}
    if len(kinds) > 1:
        notes.append(
            f"{' and '.join(sorted(kinds))} stand side by side: each is of the weights its run chose, over the rows "
            f"it held out."
        )
    rest = [each for each in records if each not in scored]
    if rest:
        notes.append(f"Without a score, so not ranked: {', '.join(each.name for each in rest)}.")


def shown(metric: str | None, value: float | None, sign: bool = False) -> str:
    """A score for people: accuracies in per cent, their differences (`sign`) in percentage points."""
    if value is None:
        return ""
    if not sign:
        return format_value(metric or "", value)
    return f"{100 * value:+.2f}" if in_percent(metric) else f"{value:+.4g}"


def with_spread(metric: str, values: list[float]) -> str:
    """`50.80 % +- 0.31 (3)`: mean, standard deviation, number."""
    if len(values) < 2:
        return shown(metric, values[0]) + " (1)" if values else ""
    middle, apart = mean(values), stdev(values)
    return f"{shown(metric, middle)} +- {shown(metric, apart).removesuffix(' %')} ({len(values)})"


def write_runs(path: Path, found: Comparison) -> None:
    """runs.csv: every run and every fold, values as result.json has them."""
    rows = []
    for record in found.records:
        rows += [_run_row(record, found, "")] + [_run_row(fold, found, record.name) for fold in record.folds]
    _write(path, rows)


def _run_row(record: Record, found: Comparison, fold_of: str) -> dict[str, Any]:
    knobs = record.knobs()
    row = {
        "name": record.name,
        "state": record.state,
        "group": "" if fold_of else found.group_of(record).name,
        "fold_of": fold_of,
        "score": score(record, found.metric),
        "seed": record.value("seed"),
    }
    row |= {key: record.value(key) for key in COST} | {key: knobs.get(key) for key in found.differing if key not in row}
    row |= {key: value for key, value in record.result.items() if key not in row}
    return {**row, "source": record.source, "notes": "; ".join(record.notes)}


def write_groups(path: Path, found: Comparison) -> None:
    """groups.csv: mean, standard deviation (of a sample, n - 1), number over the seeds; a run over all folds counts
    once, overall."""
    rows = []
    for group in found.groups:
        middle, apart = group.spread()
        row = {
            "group": group.name,
            "metric": found.metric,
            "n": len(group.runs),
            "mean": middle,
            "sd": apart,
            "min": min(group.scores, default=None),
            "max": max(group.scores, default=None),
            "folds": max((len(run.folds) for run in group.runs), default=0) or None,
            "seeds": " ".join(str(run.value("seed")) for run in group.runs),
            "without_score": len(group.rest),
        }
        for key in found.tested:
            values = group.of(key)
            row |= {
                f"{key}_mean": mean(values) if values else None,
                f"{key}_sd": stdev(values) if len(values) > 1 else None,
            }
        row |= {key: mean(group.of(key)) if group.of(key) else None for key in COST}
        rows.append({**row, **{key: value for key, value in group.knobs.items() if key not in row}})
    _write(path, rows)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in ("source", "notes")))
    columns += [key for key in ("source", "notes") if any(key in row for row in rows)]
    with whole_file(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows({key: cell(value) for key, value in row.items()} for row in rows)


def cell(value: Any) -> str:
    """A value as text, numbers to their last digit."""
    return (
        ""
        if value is None
        else value
        if isinstance(value, str)
        else repr(value)
        if isinstance(value, float)
        else _text(value)
    )
