"""Predictions in the form of a sample submission, and all that is wrong with them. pandas and numpy alone.

Legend: N rows, O outputs (classes, labels, targets). The sample has an id column and columns of values; predictions
have `prediction`, or `prediction_<output>` for each output.
"""

import os
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from datamodules.loading.class_folders import SUFFIXES
from datamodules.tables.table import WHOLE, listed, near_miss, paired, whole

SUM_TOLERANCE = 1e-3  # of probabilities that shall sum to 1
CONSTANT = 1e-6  # standard deviation below which predictions are called constant
FEW = 20  # rows up to which a test table looks like the placeholder of a code competition
KINDS = ("numbers", "whole", "probability", "label", "labels")
SEPARATORS = (" ", "|", ",", ";")


@dataclass(frozen=True)
class Options:
    """`kind`: one of KINDS, or None to tell from the sample; `limits`: (low, high) of numbers, or None for those of the
    training."""

    kind: str | None = None
    threshold: float = 0.5
    separator: str | None = None
    limits: tuple[float, float] | None = None
    clip: bool = False


@dataclass
class Outcome:
    """`table`: the submission, cells as they are written, None where `problems` forbid it; `warnings` and `facts` do
    not. `again`: where ids of the sample have no prediction, how predict.py would give it: for all rows of the folder,
    for some that are bad, or by the sample."""

    table: pd.DataFrame | None = None
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    again: str | None = None


@dataclass(frozen=True)
class Predicted:
    """What was predicted, in the sample's order: `outputs` (None: a single `prediction`), `values` (N, O) float64, or
    `labels` (N,) text."""

    ids: pd.Series
    outputs: list[str] | None
    values: np.ndarray
    labels: pd.Series | None
    task: str


def submission(sample: pd.DataFrame, predictions: pd.DataFrame, spec: dict[str, Any], options: Options) -> Outcome:
    """Predictions in the sample's form, joined by id, and what is wrong with them; all cells of both tables are text.

    `spec`: of its `task`, `class_names`, `target_names`, `target_range` and `table` what is there is used.
    """
    outcome = Outcome()
    id_column = spec.get("id_column") if spec.get("id_column") in sample.columns else sample.columns[0]
    if sample.empty:
        outcome.problems.append("the sample has a header and no row")
    elif wanted := [column for column in sample.columns if column != id_column]:
        joined = _join(sample[id_column], predictions, outcome)
        predicted = _read(joined, sample[id_column], spec, outcome) if joined is not None else None
        cells = _cells(sample, wanted, predicted, spec, options, outcome) if predicted is not None else None
        if cells is not None and not outcome.problems:
            outcome.table = pd.DataFrame(
                {column: sample[id_column] if column == id_column else cells[column] for column in sample.columns}
            )
            _tell(outcome, sample, cells)
    else:
        outcome.problems.append(f"the sample has no column but {id_column}: nothing to fill in")
    return outcome


# by id


def _join(ids: pd.Series, predictions: pd.DataFrame, outcome: Outcome) -> pd.DataFrame | None:
    """The predictions in the sample's order; None, with the problems, where the ids are not the same."""
    column, name = ids.name if ids.name in predictions else predictions.columns[0], ids.name
    ids, predictions = ids.str.strip(), predictions.assign(**{column: predictions[column].str.strip()})
    if column != name:
        outcome.warnings.append(f"the sample's ids are in {name!r}, those of the predictions in {column!r}")
    theirs = predictions[column]
    for whose, each in (("the sample", ids), ("the predictions", theirs)):
        twice = each[each.duplicated()]
        if len(twice):
            outcome.problems.append(f"{whose}: ids more than once: {listed(twice.unique())}")
    spelled = {other: each for each, other in paired(ids, theirs).items() if each != other}
    if spelled:
        other, each = next(iter(spelled.items()))
        outcome.warnings.append(
            f"{len(spelled)} ids are the same whole numbers in other spellings, and joined: {each!r} of the sample is "
            f"{other!r} "
            "of the predictions"
        )
        theirs = predictions[column] = theirs.map(lambda text: spelled.get(text, text))
    missing, strange = ids[~ids.isin(theirs)], theirs[~theirs.isin(ids)]
    if len(missing):
        hint, outcome.again = _hint(missing, theirs) or ("", "some" if len(missing) < len(ids) else "all")
        outcome.problems.append(
            f"{len(missing)} of {len(ids)} ids of the sample have no prediction: {listed(missing)}{hint}"
        )
    if len(strange):
        outcome.problems.append(
            f"{len(strange)} of {len(theirs)} predicted ids are not in the sample: {listed(strange)}"
        )
    return None if outcome.problems else predictions.set_index(column, drop=False).loc[ids].reset_index(drop=True)


def _hint(missing: pd.Series, theirs: pd.Series) -> tuple[str, str] | None:
    """(how the ids only look different, `again` of Outcome), or None."""

    def bare(path: str) -> str:
        stem, suffix = os.path.splitext(os.path.basename(path))
        return stem if suffix.lower() in SUFFIXES else stem + suffix

    if set(map(bare, missing)) <= set(map(bare, theirs)):
        return "; without folder and suffix they would be the same", "sample"
    return None


def _read(rows: pd.DataFrame, ids: pd.Series, spec: dict[str, Any], outcome: Outcome) -> Predicted | None:
    """The numbers in the columns, or None, with the problems."""
    columns = [column for column in rows.columns if column.startswith("prediction_")]
    classes = [str(name) for name in spec.get("class_names") or ()]
    outputs = [column.removeprefix("prediction_") for column in columns] or (classes if len(classes) == 1 else None)
    if not columns and "prediction" not in rows:
        outcome.problems.append(
            f"the predictions have no column prediction or prediction_<name> (there are {', '.join(rows.columns)})"
        )
        return None
    texts, labels = rows[columns or ["prediction"]], None
    if not columns and (
        classes
        and set(texts["prediction"]) <= {*classes}
        or not classes
        and texts["prediction"].map(_number).isna().all()
    ):
        labels, values = (
            texts["prediction"],
            np.zeros((len(rows), 0)),
        )  # of very many classes run.py writes the likeliest alone
    else:
        values = _numbers(texts, ids, outcome)
    return (
        None
        if outcome.problems
        else Predicted(ids, outputs, values, labels, spec.get("task") or _task(outputs, values, labels))
    )


def _numbers(texts: pd.DataFrame, ids: pd.Series, outcome: Outcome) -> np.ndarray:
    try:
        values = texts.to_numpy(object).astype(np.float64)
    except ValueError:
        values = texts.map(_number).to_numpy(np.float64)
    for column, each in zip(texts.columns, values.T):
        if (wrong := ~np.isfinite(each)).any():
            cells = dict.fromkeys(map(repr, texts[column][wrong]))
            outcome.problems.append(
                f"{column}: {wrong.sum()} cells are no finite number ({listed(cells)}), of the ids {listed(ids[wrong])}"
            )
    return values


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _task(outputs: list[str] | None, values: np.ndarray, labels: pd.Series | None) -> str:
    """Where no run says it: rows that sum to 1 are a classification's, numbers between 0 and 1 of several outputs a
    multilabel's."""
    if labels is not None:
        return "classification"
    if outputs is None or values.min() < 0 or values.max() > 1:
        return "regression"
    return "classification" if np.allclose(values.sum(1), 1, atol=SUM_TOLERANCE) else "multilabel"


# what goes where


def _cells(
    sample: pd.DataFrame,
    wanted: list[str],
    predicted: Predicted,
    spec: dict[str, Any],
    options: Options,
    outcome: Outcome,
) -> dict[str, Any] | None:
    """{column of the sample: cells}, or None, with the problem."""
    if predicted.outputs:  # a class 1.0 is the sample's column 1
        named = {output: column for column, output in paired(wanted, predicted.outputs).items()}
        predicted = replace(predicted, outputs=[named.get(output, output) for output in predicted.outputs])
    outputs, task, kind = predicted.outputs, predicted.task, options.kind
    if outputs and kind in (None, "numbers", "whole") and {*wanted} & {*outputs}:
        if missing := [column for column in wanted if column not in outputs]:
            outcome.problems += [
                f"the sample's column {column!r} was not predicted{near_miss(column, outputs)}" for column in missing
            ]
            return None
        outcome.facts.append(f"columns by name: {'values of the targets' if task == 'regression' else 'probabilities'}")
        values = {column: predicted.values[:, outputs.index(column)] for column in wanted}
        if task == "classification" and {*outputs} == {*wanted}:
            _check_sums(predicted, outcome)
    elif len(wanted) > 1:
        there = ", ".join(outputs or ["prediction"])
        outcome.problems.append(
            f"the sample has the columns {listed(wanted)}; predicted were {there}: they cannot be brought together by "
            f"name"
        )
        return None
    else:
        kind = kind or _kind(sample[wanted[0]], predicted)
        if kind in ("label", "labels"):
            return {wanted[0]: _labels(sample[wanted[0]], predicted, spec, options, kind, outcome)}
        values = {wanted[0]: _one(predicted, kind, wanted[0], outcome)}
    if outcome.problems:
        return None
    for column in values:
        values[column] = _within(column, values[column], predicted, spec, options, outcome)
        if kind == "whole":
            values[column] = np.rint(values[column]).astype(np.int64)
    return values


def _kind(cells: pd.Series, predicted: Predicted) -> str:
    """What one column of the sample takes: see KINDS."""
    if predicted.labels is not None:
        return "label"
    if predicted.task != "classification":
        return {"multilabel": "labels", "regression": "numbers"}[predicted.task]
    numeric = not cells.map(_number).isna().any()
    return "probability" if numeric and len(predicted.outputs or "1") <= 2 else "label"


def _one(predicted: Predicted, kind: str, column: str, outcome: Outcome) -> np.ndarray:
    """The numbers of one column: those predicted alone, or the probability of the second class."""
    outputs = predicted.outputs or ["prediction"]
    if predicted.labels is None and len(outputs) == 1:
        return predicted.values[:, 0]
    if predicted.labels is None and len(outputs) == 2 and predicted.task == "classification":
        outcome.facts.append(f"{column}: probability of {outputs[1]!r} (--as label writes the likelier class)")
        return predicted.values[:, 1]
    found = f"predicted are {listed(outputs)}" if predicted.labels is None else "predicted are class names"
    outcome.problems.append(
        f"{column} takes one number a row, {found}: --as {'labels' if predicted.task == 'multilabel' else 'label'}"
    )
    return np.zeros(len(predicted.ids))


def _labels(
    cells: pd.Series, predicted: Predicted, spec: dict[str, Any], options: Options, kind: str, outcome: Outcome
) -> list[str]:
    """The likeliest class of each row; of a multilabel those from the threshold on, and never none, since an empty cell
    is refused."""
    outputs, column = predicted.outputs, cells.name
    if predicted.labels is None and (outputs is None or predicted.task == "regression"):
        outcome.problems.append(f"{column}: --as {kind} needs probabilities of classes, and numbers were predicted")
        return []
    if predicted.labels is not None:
        return predicted.labels.map(_spelled(predicted.labels.unique().tolist(), {*cells}, column, outcome)).tolist()
    best = predicted.values.argmax(1)
    if kind == "label":
        numeric = (cells != "").any() and not cells.map(_number).isna().any()
        if numeric and options.kind is None and np.isnan([_number(name) for name in outputs]).any():
            outcome.problems.append(
                f"the sample's column {column!r} holds numbers ({listed(cells.unique())}), the classes are "
                f"{listed(outputs)}: "
                "--as label writes their names"
            )
        outcome.facts.append(f"{column}: the likeliest class")
        spelled = _spelled(outputs, {*cells}, column, outcome)
        return [spelled[outputs[place]] for place in best]
    separator = options.separator or _separator(cells, spec, outputs)
    if clash := [name for name in outputs if separator in name]:
        outcome.problems.append(
            f"{column}: labels joined by {separator!r}, which is in their names ({listed(clash)}): --separator"
        )
    chosen = predicted.values >= options.threshold
    chosen[np.arange(len(best)), best] = True
    outcome.facts.append(
        f"{column}: labels of probability {options.threshold:g} on, at least the likeliest, joined by {separator!r}; "
        f"{chosen.sum() / len(best):.2f} a row"
    )
    spelled = _spelled(outputs, {part for cell in cells for part in cell.split(separator)}, column, outcome)
    return [separator.join(spelled[name] for name, there in zip(outputs, row) if there) for row in chosen]


def _spelled(names: list[str], sample: set[str], column: str, outcome: Outcome) -> dict[str, str]:
    """{label: how it is written}: as it is, but whole numbers as the sample writes such, 0 for 0.0; where that cannot
    be told it is warned of."""
    sample = {text.strip() for text in sample} - {""}
    if not sample or sample <= {*names} or not all(map(WHOLE.fullmatch, [*names, *sample])):
        return {name: name for name in names}
    tail = next((tail for tail in ("", ".0") if all(text == whole(text) + tail for text in sample)), None)
    if tail is None:
        outcome.warnings.append(
            f"{column}: the sample spells numbers as {listed(sorted(sample))}, the labels of the training table are "
            f"{listed(names)}, and written so"
        )
        return {name: name for name in names}
    spelled = {name: whole(name) + tail for name in names}
    outcome.facts += [
        f"{column}: {name} is written as {text}, and so on, as the sample spells numbers"
        for name, text in spelled.items()
        if name != text
    ][:1]
    return spelled


def _separator(cells: pd.Series, spec: dict[str, Any], outputs: list[str]) -> str:
    """That of the training table, else the one whose parts in the sample are all labels, else a space."""
    if known := (spec.get("table") or {}).get("separator"):
        return known
    return next(
        (
            sign
            for sign in SEPARATORS
            if any(sign in cell for cell in cells) and all({*cell.split(sign)} <= {*outputs, ""} for cell in cells)
        ),
        " ",
    )


# what is wrong


def _check_sums(predicted: Predicted, outcome: Outcome) -> None:
    sums = predicted.values.sum(1)
    if (wrong := abs(sums - 1) > SUM_TOLERANCE).any():
        outcome.problems.append(
            f"the probabilities of {wrong.sum()} rows do not sum to 1: ids {listed(predicted.ids[wrong])}, sums from "
            f"{sums.min():.6g} to {sums.max():.6g}"
        )


def _within(
    column: str, values: np.ndarray, predicted: Predicted, spec: dict[str, Any], options: Options, outcome: Outcome
) -> np.ndarray:
    """The values of a column, cut to its limits with `clip`; beyond them is a problem."""
    ranges = spec.get("target_range") or []
    names = [str(name) for name in spec.get("target_names") or ()]
    limits, whose = options.limits, "given"
    if limits is None and predicted.task != "regression":
        limits, whose = (0.0, 1.0), "probabilities"
    elif limits is None and ranges:
        limits, whose = (
            tuple(ranges[names.index(column) if column in names and len(names) == len(ranges) else 0]),
            "of the training targets",
        )
    if limits is None:
        outcome.warnings += [f"{column}: --clip does nothing, no limits are known: --limits LOW HIGH"] * options.clip
        return values
    wrong = (values < limits[0]) | (values > limits[1])
    if options.clip or not wrong.any():
        outcome.facts += [f"{column}: {wrong.sum()} values cut to {_shown(limits[0])} to {_shown(limits[1])}"] * bool(
            wrong.any()
        )
        return values.clip(*limits)
    outcome.problems.append(
        f"{column}: {wrong.sum()} values are outside of {_shown(limits[0])} to {_shown(limits[1])} ({whose}), from "
        f"{_shown(values.min())} to {_shown(values.max())}, ids {listed(predicted.ids[wrong])}: "
        "--clip cuts them, --limits LOW HIGH sets others"
    )
    return values


def _shown(value: float) -> str:
    """Six digits, or all twelve of a large number, whose offset would hide the rest."""
    return f"{value:.6g}" if abs(value) < 1e6 else f"{value:.12g}"


def _tell(outcome: Outcome, sample: pd.DataFrame, cells: dict[str, Any]) -> None:
    """Warn of what is allowed and rarely meant, and say how the values lie."""
    rows = len(sample)
    if rows <= FEW:
        outcome.warnings.append(
            f"the sample has {rows} rows only: if this is a code competition, they stand for the hidden test"
        )
    for place, (column, values) in enumerate(cells.items()):
        if isinstance(values, list):
            counts = pd.Series(values).value_counts()
            outcome.warnings += [f"{column} is constant: {values[0]!r} in every row"] * (rows > 1 and len(counts) == 1)
            outcome.facts.append(
                f"{column}: {len(counts)} different cells, the most frequent {counts.index[0]!r} ({counts.iloc[0]} "
                f"times)"
            )
            continue
        outcome.warnings += [f"{column} is constant: {_shown(values[0])} in every row"] * bool(
            rows > 1 and values.std() < CONSTANT
        )
        if place < 5:
            theirs = sample[column].map(_number)
            outcome.facts.append(
                f"{column}: mean {_shown(values.mean())}, standard deviation {values.std():.4g}, "
                f"{_shown(values.min())} to "
                f"{_shown(values.max())}"
                + f"; the sample's mean is {_shown(theirs.mean())}"
                * (not theirs.isna().any())
            )
