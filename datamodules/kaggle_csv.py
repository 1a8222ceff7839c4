"""A competition's folder: train.csv, test.csv, sample_submission.csv and pictures. What each column means is guessed, or given."""

import os
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from datamodules import folds, table_scheme, table_split, table_targets
from datamodules.base import PictureData
from datamodules.folder import Files
from datamodules.pictures import Split, hold_out
from datamodules.table import Report, listed
from datamodules.table_guess import Tables
from datamodules.table_pictures import Folder
from datamodules.table_rows import Rows, find_rows

GIVEN = ("target", "task", "image", "group", "metric", "id_column", "fold_column", "label_separator")


@dataclass(kw_only=True, eq=False, repr=False)
class DataModule(PictureData):
    """Classification, multilabel or regression from tables. Rows of train.csv become train and val; those of test.csv, or else of
    sample_submission.csv, `predict`, or `test` where test.csv has the labels.

    Args:
        target, task, image, group, metric: as the flags of the same names; group none does without, FILE.csv has an id column and the groups.
        bad_images: error, or skip: rows whose picture is missing or cannot be read are left out (`skipped`).
        folds, fold: val is this one of so many folds (`folds.assign`, or `fold_column`); else `val_fraction` of the rows.
        folds_at: where the folds are kept: a folder with a file for each table, number and seed, or a file of one's own.
        id_column, fold_column, label_separator: columns and the sign between labels.
        target_range: [low, high] of the targets in their own units, or a pair for each; left out: those of the rows trained on.
        train_csv, test_csv, sample_csv: other names of the files.

    Attributes:
        table_scheme: what the table means, plain values, also `spec["table"]`. metric_name: the metric that goes with it.
        skipped: DataFrame of split (train or test), id, file and reason. rows: {split: (N,) rows of its table, from 0 on}.
        fold_numbers: (N,) folds of all rows of train.csv, skipped ones too; None without folds. groups, all_targets, train_ids: of the same rows.
    """

    usual_metric: ClassVar[str | None] = None  # of a competition that is known

    target: str | None = None
    task: str | None = None
    image: str | None = None
    group: str | None = None
    metric: str | None = None
    bad_images: str = "error"
    folds: int | None = None
    fold: int | None = None
    folds_at: str | None = None
    id_column: str | None = None
    fold_column: str | None = None
    label_separator: str | None = None
    target_range: list[Any] | tuple[Any, ...] | None = None
    train_csv: str | None = None
    test_csv: str | None = None
    sample_csv: str | None = None

    def __post_init__(self) -> None:
        self._given = {name: getattr(self, name) for name in (*GIVEN, "target_range")}  # the base class sets some of them anew
        self.skipped = pd.DataFrame(columns=["split", "id", "file", "reason"])
        self.rows: dict[str, np.ndarray] = {}
        self.fold_numbers: np.ndarray | None = None
        self.folds_file: str | None = None
        super().__post_init__()

    def read(self) -> tuple[list[str] | None, dict[str, Split]]:
        if self.data_dir is None or not os.path.isdir(self.data_dir):
            where = "is not given" if self.data_dir is None else f"{os.path.abspath(self.data_dir)} is not a folder"
            raise FileNotFoundError(f"--data_dir {where}; it must hold train.csv and pictures")
        tables = table_scheme.read_tables(self.data_dir, {"train": self.train_csv, "test": self.test_csv, "sample": self.sample_csv})
        folder, report = Folder(self.data_dir), Report(f"--data_dir {self.data_dir}")
        scheme, self.lines = table_scheme.decide(tables, folder, self._given | {"usual_metric": self.usual_metric})
        self.table_scheme, self.task, self.metric_name, self.id_column = scheme, scheme["task"], scheme["metric"], scheme["id_column"]
        names = self.class_names or table_targets.class_names(tables.train, scheme)
        self.target_names = scheme["targets"] if names is None else None
        skip = self.bad_images == "skip"
        train = find_rows(folder, tables.train, "train", tables.names["train"], scheme, names, report, skip=skip)
        table_targets.check_constant(train.targets, scheme, names, tables.names["train"], report)
        asked, labelled = self._asked(tables, folder, names, report)
        self.all_targets, fold = train.targets, self._folds(tables, train, report)
        limits = self._limits(train, tables.names["train"], report) if self.task == "regression" else None
        report.finish()
        splits = self._divide(train, fold, names, report, tables.names["train"])
        report.finish()
        if self.task == "regression":
            self.target_range = limits or _extent(splits["train"].targets)
        self.skipped = pd.concat([part.skipped() for part in (train, asked) if part], ignore_index=True)
        self.table_scheme = {**scheme, "class_names": names, "target_range": self.target_range}
        if asked is not None:
            splits["test" if labelled else "predict"] = asked.split(Files(self.data_dir))
            self.rows["test" if labelled else "predict"] = np.flatnonzero(asked.good)
        return names, splits

    def _asked(self, tables: Tables, folder: Folder, names: list[str] | None, report: Report) -> tuple[Rows | None, bool]:
        """(rows that answers are wanted for, whether they have labels)."""
        frame, file = table_scheme.rows_asked(tables), tables.names.get("test", tables.names.get("sample"))
        if frame is None or frame.empty:
            return None, False
        targets = self.table_scheme["targets"]
        labelled = frame is tables.test and all(name in frame for name in targets) and not (frame[targets] == "").all(axis=None)
        found = find_rows(folder, frame, "test", file, self.table_scheme, names, report, labelled=labelled, skip=self.bad_images == "skip")
        return found, labelled

    def _limits(self, train: Rows, file: str, report: Report) -> list[list[float]] | None:
        """The range that was given, a pair for each target."""
        given, count = self._given["target_range"], len(self.table_scheme["targets"])
        if given is None:
            return None
        pairs = [given] * count if len(given) == 2 and not isinstance(given[0], list | tuple) else given
        try:
            pairs = [[float(low), float(high)] for low, high in pairs]
        except (TypeError, ValueError):
            pairs = []
        if len(pairs) != count or not all(low < high for low, high in pairs):
            raise ValueError(f"--data_args.target_range {given}: [low,high], or a pair for each of {count} targets, low below high")
        table_targets.check_range(train.targets, self.table_scheme, pairs, file, report)
        return pairs

    def _folds(self, tables: Tables, train: Rows, report: Report) -> np.ndarray | None:
        """(N,) fold of every row of the table, of skipped ones too; None without folds."""
        column, file = self.table_scheme["fold_column"], tables.names["train"]
        if column and not self.folds:
            raise ValueError(f"--data_args.fold_column {column}: --folds says how many folds there are")
        self.groups, self.train_ids = self._grouping(tables, train, report), tables.train[self.id_column].str.strip().tolist()
        if not self.folds or report.lines:
            return None
        try:
            if column:
                self.fold_numbers = table_split.from_column(tables.train[column], self.folds)
            else:
                self.fold_numbers = self._kept_or_assigned(train.targets)
        except ValueError as error:
            report.add(file, f"column {column}: {error}" if column else str(error))
        return self.fold_numbers

    def _kept_or_assigned(self, targets: np.ndarray) -> np.ndarray:
        """(N,) fold of every row: as a file of `folds_at` has it, else by rule."""
        at, groups = self.folds_at or "folds", self.groups
        if at.endswith(".csv"):
            self.folds_file = at
        else:
            name = os.path.basename(os.path.realpath(self.data_dir))
            self.folds_file = os.path.join(at, folds.file_name(name, self.train_ids, targets, self.task, self.folds, self.split_seed, groups))
        if self.folds_at and os.path.isfile(self.folds_file):
            return folds.read(self.folds_file, self.train_ids, self.folds, groups)
        if at.endswith(".csv"):
            raise ValueError(f"--data_args.folds_at {at}: there is no such file")
        return folds.assign(targets, self.task, self.folds, self.split_seed, groups)

    def keep_folds(self) -> None:
        """Write `folds_file`, unless it is there."""
        if self.folds_file is not None:
            folds.write(self.folds_file, self.train_ids, self.fold_numbers, self.id_column)

    def _grouping(self, tables: Tables, train: Rows, report: Report) -> np.ndarray | None:
        """(N,) group of every row, "" where it has none: of the group column or file, and rows of one picture."""
        name, parts = self.table_scheme["group"], []
        if name and name.endswith(".csv"):
            groups, problem = table_scheme.read_groups(self.data_dir, name, tables.train[self.id_column], self.id_column)
            report.lines += [problem] if problem else []
            parts.append(np.array(groups))
        elif name:
            parts.append(tables.train[name].to_numpy(str))
        files = np.array([file or "" for file in train.files])
        if len(set(files) - {""}) < (files != "").sum():
            parts.append(files)
        return table_split.together(parts) if len(parts) > 1 else parts[0] if parts else None

    def _divide(self, train: Rows, fold: np.ndarray | None, names: list[str] | None, report: Report, file: str) -> dict[str, Split]:
        """{"train", "val"} of the rows with pictures."""
        every, rows = train.split(Files(self.data_dir)), np.flatnonzero(train.good)
        if fold is not None:
            held = fold[rows] == (self.fold or 0)
        elif self.val_fraction == 0:
            self.rows["train"] = rows
            return {"train": every}
        elif self.task == "classification" and self.groups is None:
            lonely = [names[place] for place in np.flatnonzero(np.bincount(every.targets, minlength=len(names)) == 1)]
            if lonely:
                column = ", ".join(self.table_scheme["targets"])
                report.add(file, f"column {column}: classes with one row each: {listed(lonely)}; --val_fraction {self.val_fraction} needs two of "
                                 "each class: drop them, or --folds K, or --val_fraction 0")
                return {}
            place = Split(np.arange(len(rows)), every.targets, every.open)
            held = np.isin(np.arange(len(rows)), hold_out(place, self.val_fraction, self.split_seed, names)[1].names)
        else:
            groups = None if self.groups is None else self.groups[rows]
            try:
                held = table_split.share_held_out(every.targets, self.task, self.val_fraction, self.split_seed, groups)
            except ValueError as error:
                report.add(file, str(error))
                return {}
        self.rows |= {"train": rows[~held], "val": rows[held]}
        return {"train": every.take(np.flatnonzero(~held)), "val": every.take(np.flatnonzero(held))}

    @property
    def spec(self) -> dict[str, Any]:
        """With `table`: what the table means (`table_scheme`)."""
        return super().spec | {"table": self.table_scheme}

    def resolved(self) -> dict[str, str | None]:
        """The flags that were left out, as they were guessed: target, task, image, group and metric."""
        scheme = self.table_scheme
        return {"target": ",".join(scheme["targets"])} | {name: scheme[name] for name in ("task", "image", "group", "metric")}

    def notes(self) -> list[str]:
        """What the table was taken to mean, and why; what was skipped; classes too rare for the folds."""
        lines, numbers = list(self.lines), self.fold_numbers
        if len(self.skipped):
            counts = self.skipped["split"].value_counts()
            lines.append(f"table skipped {' and '.join(f'{count} pictures of {split}' for split, count in counts.items())}, listed in skipped.csv: "
                         + listed(self.skipped["file"] + " " + self.skipped["reason"]))
        if numbers is not None:
            lines += table_split.notes(numbers, self.all_targets, self.task, self.class_names)
        return lines + super().notes()


def _extent(targets: np.ndarray) -> list[list[float]]:
    """[low, high] of each column."""
    return [[float(low), float(high)] for low, high in zip(targets.min(0), targets.max(0))]
