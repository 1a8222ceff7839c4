"""The meaning of a competition's tables: what was given and what was guessed, as plain values and as lines with
reasons. Only pandas, numpy, Pillow and the standard library."""

import os
from typing import Any

import pandas as pd

from datamodules.tables import guess as table_guess
from datamodules.tables.guess import Tables
from datamodules.tables.images import Folder, columns_in
from datamodules.tables.table import Report, counted, near_miss, paired, plainly, read_table, spelled_twice
from datamodules.tables.targets import spellings
from datamodules.tables.template import guess_template

FILES = {
    "train": ["train.csv"],
    "test": ["test.csv"],
    "sample": ["sample_submission.csv", "sampleSubmission.csv", "SampleSubmission.csv"],
}
TASKS = ("classification", "multilabel", "regression")


def read_tables(root: str, named: dict[str, str | None], no_train: bool = False) -> Tables:
    """The tables of a folder, under their usual names or the given ones, {train, test, sample: name or None}; only
    train.csv must be there, and with `no_train` test.csv may stand in for it.

    Raises:
        FileNotFoundError: a required table is missing; lists what was looked for.
        ValueError: one or several cannot be read, or hold no row; in one report.
    """
    report, frames, names = Report(f"--data_dir {root}"), {}, {}
    named = {part: named.get(part) for part in FILES}
    for part, usual in FILES.items():
        given = named[part]
        found = [name for name in ([given] if given else usual) if os.path.isfile(os.path.join(root, name))]
        if not found and (
            given
            or part == "train"
            and not (no_train and os.path.isfile(os.path.join(root, named["test"] or "test.csv")))
        ):
            raise FileNotFoundError(
                f"--data_dir {root}: there is no table {given or usual[0]}" + f" (--data_args.{part}_csv)" * bool(given)
            )
        if found:
            names[part] = found[0]
            try:
                frames[part] = read_table(os.path.join(root, found[0]))
            except ValueError as error:
                report.lines.append(str(error).removeprefix(os.path.join(root, "")))
                continue
            if frames[part].empty and part != "test":
                report.add(found[0], "has a header and no row")
    report.finish()
    if "train" not in frames:
        return Tables(frames["test"], None, None, {"train": names["test"], "test": names["test"]})
    return Tables(frames["train"], frames.get("test"), frames.get("sample"), names)


def decide(tables: Tables, folder: Folder, given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(scheme, a line with the reason for each of its parts). `given` holds the flags, None where left out;
    `usual_metric` is a preset's.

    The scheme: id_column, targets (columns), separator (of joined labels, else None), task, image (template), group,
    fold_column, split_column, metric.

    Raises:
        ValueError: a part that cannot be guessed, a column that is not there, a task that is none; names flags and
            candidates.
    """
    targets = _names(given["target"], whole=given["target"] in tables.train)
    group = given["group"] if given["group"] not in (None, "none") and not given["group"].endswith(".csv") else None
    named = {
        "--data_args.id_column": _names(given["id_column"], whole=True),
        "--target": targets,
        "--group": _names(group, whole=True),
        "--data_args.fold_column": _names(given["fold_column"], whole=True),
        "--data_args.split_column": _names(
            None if given.get("split_column") == "none" else given.get("split_column"), whole=True
        ),
    }
    report = Report(f"--data_dir {folder.root}", table_guess.check_columns(tables, named))
    if given["task"] not in (None, *TASKS):
        report.lines.append(f"--task {given['task']}: classification, multilabel or regression")
    report.finish()
    scheme: dict[str, Any] = {}
    why: dict[str, str] = {}
    train = tables.train

    def put(part: str, value: Any, flag: str, guess: Any) -> None:
        scheme[part], why[part] = (value, f"given; {flag} changes it") if value is not None else guess()

    put("id_column", given["id_column"], "--data_args.id_column", lambda: table_guess.guess_id(tables))
    taken = {str(name) for name in (scheme["id_column"], group, given["fold_column"]) if name}
    split = given.get("split_column") or table_guess.guess_split(tables, taken, targets)
    found = table_guess.guess_folds(train, taken | {*targets, *([split] if split else [])})
    folds = {found} if found else set()
    scheme |= {"fold_column": given["fold_column"], "split_column": None if split == "none" else split}
    taken |= {*filter(None, (scheme["split_column"],))}
    put(
        "targets",
        targets or None,
        "--target",
        lambda: table_guess.guess_targets(
            tables, scheme["id_column"], taken | folds | {*filter(None, table_guess.guess_group(train, taken)[:1])}
        ),
    )
    put(
        "task",
        given["task"],
        "--task",
        lambda: table_guess.guess_task(tables, scheme["targets"], given["label_separator"]),
    )
    scheme["separator"] = _separator(train, scheme, given["label_separator"])
    put(
        "image",
        given["image"],
        "--image",
        lambda: guess_template(folder, train, rows_asked(tables), scheme["id_column"]),
    )
    columns_in(scheme["image"], list(train.columns), "train")
    put(
        "group", given["group"], "--group", lambda: table_guess.guess_group(train, taken | folds | {*scheme["targets"]})
    )
    usual = given.get("usual_metric")
    scheme["metric"], why["metric"] = (
        (usual, "the competition's") if usual else table_guess.guess_metric(tables, scheme)
    )
    lines = [
        f"table {part} {_spelled(scheme[part])} ({why[part]})"
        for part in why
        if part != "metric" or not given["metric"]
    ]
    if found and not scheme["fold_column"]:
        lines.append(f"table column {found} looks like folds: --data_args.fold_column {found} with --folds uses it")
    return {**scheme, "group": None if scheme["group"] == "none" else scheme["group"]}, lines


def advice(tables: Tables, scheme: dict[str, Any], names: list[str] | None) -> list[str]:
    """Lines on what is allowed but perhaps not meant: ids that only one table has, labels that are the same number,
    names of labels that are nearly the same."""
    lines, column = [], scheme["id_column"]
    if tables.test is not None and tables.sample is not None and column in tables.test and column in tables.sample:
        asked, there = set(tables.sample[column]), set(tables.test[column])
        for less, more, where, other in ((asked, there, "test", "sample"), (there, asked, "sample", "test")):
            if alone := more - paired(more, less).keys():
                lines.append(
                    f"table {tables.names[where]} has {counted(len(alone), 'id')} that {tables.names[other]} does not "
                    f"have, "
                    f"as {min(alone)!r}"
                )
    if (
        names
        and len(scheme["targets"]) == 1
        and scheme["targets"][0] in tables.train
        and (plain := plainly(spellings(tables.train, scheme)))
    ):
        lines.append(
            f"table labels: {spelled_twice(plain)} are the same numbers, and taken for one class each, as "
            f"{', '.join(names[:3])}"
        )
    folded: dict[str, list[str]] = {}
    for name in names or ():
        folded.setdefault(table_guess.words(name).replace("_", ""), []).append(name)
    for same in [same for same in folded.values() if len(same) > 1 and not all(name[-1:].isdigit() for name in same)][
        :3
    ]:
        lines.append(f"table labels that are nearly the same: {', '.join(map(repr, same))}")
    return lines


def _separator(train: pd.DataFrame, scheme: dict[str, Any], given: str | None) -> str | None:
    """Between the labels of one joined column; None for any other kind of target."""
    if scheme["task"] != "multilabel" or len(scheme["targets"]) > 1:
        return None
    text = train[scheme["targets"][0]]
    if given is None and set(text) <= {"0", "1"}:
        return None
    return given or table_guess.guess_separator(text)


def rows_asked(tables: Tables) -> pd.DataFrame | None:
    """The rows that answers are wanted for: of test.csv, or else of sample_submission.csv."""
    return tables.sample if tables.test is None else tables.test


def _names(text: str | None, whole: bool = False) -> list[str]:
    """Column names by commas."""
    return [] if text is None else [text] if whole else [name.strip() for name in text.split(",") if name.strip()]


def _spelled(value: Any) -> str:
    return (
        ",".join(value[:12]) + f" and {len(value) - 12} more" * (len(value) > 12)
        if isinstance(value, list)
        else str(value or "none")
    )


def read_groups(root: str, name: str, ids: pd.Series, id_column: str) -> tuple[list[str], str | None]:
    """(group of each id, problem or None) of a file with the id column and a second one, `group` or whichever there
    is."""
    path = name if os.path.isfile(name) else os.path.join(root, name)
    frame = read_table(path)
    others = [column for column in frame.columns if column != id_column]
    if id_column not in frame or not others:
        return [], f"--group {name}: needs the columns {id_column} and group{near_miss(id_column, frame.columns)}"
    column = "group" if "group" in others else others[0]
    known, pairs = dict(zip(frame[id_column], frame[column])), paired(ids, frame[id_column])
    missing = [value for value in ids if value not in pairs]
    found = [known[pairs[value]] if value in pairs else "" for value in ids]
    return found, f"--group {name}: has no row for {len(missing)} ids, as {missing[0]!r}" if missing else None
