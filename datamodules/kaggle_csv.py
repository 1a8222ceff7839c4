"""A competition's folder: train.csv, test.csv, sample_submission.csv and images. What each column means is guessed,
or given."""

import os
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from datamodules.base import PictureData
from datamodules.folder import Files
from datamodules.knobs import ImageFiles, Table
from datamodules.loading.decode import MAX_PIXELS, SUFFIXES, Decoding
from datamodules.loading.images import Split
from datamodules.tables import columns as table_columns
from datamodules.tables import folds
from datamodules.tables import scheme as table_scheme
from datamodules.tables import split as table_split
from datamodules.tables import targets as table_targets
from datamodules.tables.guess import Tables
from datamodules.tables.images import Folder
from datamodules.tables.rows import Rows, find_rows
from datamodules.tables.table import Report, counted, listed, plainly, spelled_twice, whole

if TYPE_CHECKING:
    from models.spec import Spec

INPUTS, AUX = "--data_args.input_columns", "--data_args.aux_targets"
GIVEN = ("target", "task", "image", "group", "metric", "id_column", "fold_column", "split_column", "label_separator")


@dataclass(kw_only=True, eq=False, repr=False)
class DataModule(Table, ImageFiles, PictureData):
    """Classification, multilabel or regression from tables. Rows of train.csv become train and val; those of test.csv,
    or else of sample_submission.csv, `predict`, or `test` where test.csv has the labels.

    Args:
        target, task, image, group, metric: as the flags of the same names; group none does without, FILE.csv has an id
            column and the groups.
        bad_images: error, or skip: rows whose image is missing or cannot be read are left out (`skipped`).
        bad_rows: error, or skip: rows without a label are left out (`skipped`).
        max_pixels, white: `Decoding`.
        folds, fold: val is this one of so many folds (`folds.assign`, or `fold_column`); else `val_fraction` of the
            rows.
        folds_at: where the folds are kept: a folder with a file for each table, number and seed, or a file of one's
            own.
        id_column, fold_column, label_separator: columns and the sign between labels.
        split_column: column of train.csv with train, val or test for each row (found by name and words; none does
            without): rows for val are val, unless folds divide train and val anew, and rows for test are never trained
            on.
        target_range: [low, high] of the targets in their own units, or a pair for each; left out: those of the rows
            trained on.
        train_csv, test_csv, sample_csv: other names of the files.
        input_columns: names of columns of numbers, or of 0 and 1, that the network takes beside the image (batch:
            `columns` (B, C) float32, standardised by the rows trained on). aux_targets: of such columns of train.csv to
            be learned beside the target (`aux` (B, A), 0 to 1 by their range in the rows trained on), their loss times
            `aux_weight`.

    Attributes:
        table_scheme: what the table means, plain values, also `spec["table"]`. metric_name: the metric that goes with
            it.
        skipped: DataFrame of split (train or test), id, file and reason. rows: {split: (N,) rows of its table, from 0
            on}.
        columns: names, mean and std of the columns that are inputs, also `spec["columns"]`; {} without.
        fold_numbers: (N,) folds of the rows of train.csv, those of skipped images too, those without a label or for
            test not; None without folds.
            groups, all_targets, train_ids: of the same rows.
    """

    if TYPE_CHECKING:
        task: Any  # `read` fills in what is left out
        metric_name: str
        files: Files
        table_scheme: dict[str, Any]
        lines: list[str]

    usual_metric: ClassVar[str | None] = None  # of a competition that is known

    max_pixels: int = MAX_PIXELS
    white: float | None = None
    folds_at: str | None = None
    id_column: str | None = None
    fold_column: str | None = None
    split_column: str | None = None
    label_separator: str | None = None
    target_range: Any = None
    train_csv: str | None = None
    test_csv: str | None = None
    sample_csv: str | None = None
    input_columns: str | list[str] | tuple[str, ...] | None = None
    aux_targets: str | list[str] | tuple[str, ...] | None = None
    aux_weight: float = 0.1

    def __post_init__(self) -> None:
        self._given = {
            name: getattr(self, name) for name in (*GIVEN, "target_range")
        }  # the base class sets some of them anew
        self.skipped = pd.DataFrame(columns=["split", "id", "file", "reason"])
        self.rows: dict[str, np.ndarray] = {}
        self.fold_numbers: np.ndarray | None = None
        self.folds_file: str | None = None
        self._limits: list[list[float]] | None = None
        self._check_further()
        for name in ("bad_images", "bad_rows"):
            if getattr(self, name) not in ("error", "skip"):
                raise ValueError(f"{name} {getattr(self, name)!r}: error or skip")
        if self.fold is not None and not 0 <= self.fold < (self.folds or 0):
            raise ValueError(f"fold {self.fold} of folds {self.folds}: from 0 on, below folds")
        if self.fold_column and not self.folds:
            raise ValueError(f"--data_args.fold_column {self.fold_column}: --folds says how many folds there are")
        super().__post_init__()

    def _check_further(self) -> None:
        """Check the further columns before a table is read. Raises ValueError."""
        self.columns: Any = {}
        self.inputs = table_columns.names_of(self.input_columns, INPUTS)
        self.aux = table_columns.names_of(self.aux_targets, AUX)
        if not self.aux_weight > 0:
            raise ValueError(f"--data_args.aux_weight {self.aux_weight}: must be above 0")
        if (self.inputs or self.aux) and self.mixing and not self.eval_only:
            raise ValueError(f"{INPUTS if self.inputs else AUX} does not go with mixed pictures: --mixup 0 --cutmix 0")

    def read(self) -> tuple[list[str] | None, dict[str, Split]]:
        if self.data_dir is None or not os.path.isdir(self.data_dir):
            where = "is not given" if self.data_dir is None else f"{os.path.abspath(self.data_dir)} is not a folder"
            raise FileNotFoundError(f"--data_dir {where}; it must hold train.csv and pictures")
        named = {"train": self.train_csv, "test": self.test_csv, "sample": self.sample_csv}
        tables = table_scheme.read_tables(self.data_dir, named, no_train=self.eval_only)
        self.files = Files(self.data_dir, Decoding(self.max_pixels, self.white))
        folder, report = Folder(self.data_dir, self.files.how), Report(f"--data_dir {self.data_dir}")
        scheme, self.lines = table_scheme.decide(tables, folder, self._given | {"usual_metric": self.usual_metric})
        folder.taken.clear()  # by the guess
        folder.suffix_guessed = self._given["image"] is None and scheme["image"].lower().endswith(SUFFIXES)
        self.table_scheme, self.task, self.metric_name, self.id_column = (
            scheme,
            scheme["task"],
            scheme["metric"],
            scheme["id_column"],
        )
        table_columns.check_use(self.inputs, scheme, INPUTS)
        table_columns.check_use(self.aux, scheme, AUX)
        names = self.class_names or table_targets.class_names(tables.train, scheme)
        self.target_names = scheme["targets"] if names is None else None
        inputs = {"columns": self.inputs} if self.inputs else {}
        find = partial(
            find_rows,
            folder,
            more=inputs,
            scheme=scheme,
            names=names,
            report=report,
            skip=self.bad_images == "skip",
            known="the checkpoint" if self.class_names else tables.names["train"],
        )
        if tables.names["train"] == tables.names.get("test"):  # of an evaluation without train.csv
            parts, splits = (
                {"test": find(tables.train, "test", tables.names["test"], hollow=self.bad_rows == "skip")},
                {},
            )
            report.finish()
        else:
            aux, marked = {"aux": self.aux} if self.aux and not self.eval_only else {}, self._marked(tables, report)
            hollow = (marked == "test") | (self.bad_rows == "skip")
            parts = {
                "train": find(tables.train, "train", tables.names["train"], more=inputs | aux, hollow=hollow)
            } | self._asked(tables, find)
            splits = self._divide(parts["train"], marked, tables, names, report, beside=parts.keys())
        self.lines += [*table_scheme.advice(tables, scheme, names), *folder.notes()]
        self.skipped = pd.concat([part.skipped() for part in parts.values()], ignore_index=True)
        for split in parts.keys() - {"train"}:
            splits[split], self.rows[split] = parts[split].split(self.files), np.flatnonzero(parts[split].good)
        if self.task == "regression":
            self.target_range = self._limits or _extent(next(iter(splits.values())).targets)
        self.table_scheme = {**scheme, "class_names": names, "target_range": self.target_range}
        self._raw = splits
        return names, self._further(
            table_columns.statistics(self.inputs, next(iter(splits.values())).more["columns"]) if self.inputs else {}
        )

    def _further(self, columns: dict[str, Any]) -> dict[str, Split]:
        """The splits, their columns standardised by `columns`; what is learned beside the target is of train alone."""
        self.columns, splits = columns, {}
        for name, split in self._raw.items():
            more = {"columns": table_columns.standardised(split.more["columns"], columns)} if columns else {}
            more |= {"aux": table_columns.ranged(split.more["aux"])} if name == "train" and "aux" in split.more else {}
            splits[name] = replace(split, more=more)
        return splits

    def standardise(self, columns: dict[str, Any]) -> None:
        """Take the mean and std of a checkpoint in place of these data's. Raises ValueError where the columns are
        others."""
        wanted = ",".join(columns.get("names", ()))
        if wanted != ",".join(self.inputs):
            raise ValueError(
                f"{INPUTS} {','.join(self.inputs) or 'is not given'}: the checkpoint takes {wanted or 'no columns'}"
            )
        self.splits = self._further(columns)

    def _asked(self, tables: Tables, find: Callable[..., Rows]) -> dict[str, Rows]:
        """The rows that answers are wanted for, as `test` where they have labels, else as `predict`."""
        targets = self.table_scheme["targets"]
        frame = table_scheme.rows_asked(tables)
        if frame is None or frame.empty:
            return {}
        labelled = tables.test is not None and set(targets) <= set(frame) and not (frame[targets] == "").all(axis=None)
        return {
            "test" if labelled else "predict": find(
                frame,
                "test",
                tables.names.get("test", tables.names.get("sample")),
                labelled=labelled,
                hollow=self.bad_rows == "skip",
            )
        }

    def _marked(self, tables: Tables, report: Report) -> np.ndarray:
        """(N,) train, val or test of the rows of train.csv, by its split column; all train without one."""
        column = self.table_scheme["split_column"]
        try:
            return table_split.parts(tables.train[column]) if column else np.full(len(tables.train), "train")
        except ValueError as error:
            report.add(tables.names["train"], str(error))
            return np.full(len(tables.train), "train")

    def _divide(
        self,
        train: Rows,
        part: np.ndarray,
        tables: Tables,
        names: list[str] | None,
        report: Report,
        beside: Container[str],
    ) -> dict[str, Split]:
        """{"train", "val"} of the rows with images, and "test" of those that (N,) `part` marks so, unless that is
        `beside`. Raises ValueError with all that was reported before, or speaks against dividing."""
        file, scheme = tables.names["train"], self.table_scheme
        places = np.flatnonzero(train.labelled & (part != "test"))  # rows of the table that are divided
        pool, frame = train.take(places), tables.train.iloc[places]
        table_targets.check_constant(pool.targets, scheme, names, file, report)
        if self.task == "regression" and self._given["target_range"] is not None:
            self._limits = table_targets.read_range(self._given["target_range"], len(scheme["targets"]))
            table_targets.check_range(train.targets, scheme, self._limits, file, report)
        self.groups, self.train_ids = self._groups(frame, pool, report), frame[self.id_column].str.strip().tolist()
        report.finish()
        self.all_targets, rows, every = pool.targets, np.flatnonzero(pool.good), pool.split(self.files)
        try:
            held = self._held_out(frame, rows, names, part[places] == "val")
        except ValueError as error:
            report.add(file, str(error))
            report.finish()
        splits, for_test = {}, train.take(np.flatnonzero(part == "test"))
        if scheme["split_column"]:
            self.lines += [self._split_line(part, "test" in beside), *self._crossed(tables.train, part)]
        if for_test.good.any() and "test" not in beside:
            splits["test"], self.rows["test"] = (
                for_test.split(self.files),
                np.flatnonzero(part == "test")[for_test.good],
            )
        if held is None:
            self.rows["train"] = places[rows]
            return {"train": every} | splits
        self.rows |= {"train": places[rows[~held]], "val": places[rows[held]]}
        return {"train": every.take(np.flatnonzero(~held)), "val": every.take(np.flatnonzero(held))} | splits

    def _split_line(self, part: np.ndarray, beside: bool) -> str:
        """Line on the use of the split column's rows."""
        column, there = (
            self.table_scheme["split_column"],
            {name: int((part == name).sum()) for name in ("train", "val", "test")},
        )
        counts = ", ".join(f"{name} {count:,}" for name, count in there.items() if count)
        why = "given" if self._given["split_column"] else "its name and its words"
        folded = f"; --folds {self.folds} divides the rows of train and val anew" * bool(self.folds and there["val"])
        apart = "; its rows for test are left out, since test.csv has labels" * bool(beside and there["test"])
        return (
            f"table split by column {column} ({why}): {counts}{folded}{apart}; --data_args.split_column none does "
            f"without"
        )

    def _crossed(self, frame: pd.DataFrame, part: np.ndarray) -> list[str]:
        """A line on groups that the split column puts on several sides."""
        name, column = self.table_scheme["group"], self.table_scheme["split_column"]
        if name not in frame:
            return []
        sides = (
            pd.Series(np.where((part == "val") & bool(self.folds), "train", part))
            .groupby(frame[name].map(whole).to_numpy())
            .nunique()
        )
        crossed = sides.index[(sides > 1) & (sides.index != "")]
        return (
            [
                f"table split by column {column}: {counted(len(crossed), 'group')} of {name} lie on several sides, so "
                f"scores are too good there: "
                f"{listed(crossed)}"
            ]
            if len(crossed)
            else []
        )

    def _held_out(
        self, frame: pd.DataFrame, rows: np.ndarray, names: list[str] | None, for_val: np.ndarray
    ) -> np.ndarray | None:
        """(R,) bool of the rows with images: held out; None for none. Folds are of all rows that are divided, so that
        an image that comes or goes moves no other. Raises ValueError where the rows cannot be divided so.

        Args:
            frame: the N rows that are divided. rows: (R,) places in it. for_val: (N,) bool of a split column.
        """
        column, targets, groups, ids = self.table_scheme["fold_column"], self.all_targets, self.groups, self.train_ids
        if self.folds:
            self.fold_numbers = (
                table_split.from_column(frame[column], column, self.folds)
                if column
                else self._kept_or_assigned(targets, names)
            )
            held = self.fold_numbers[rows] == (self.fold or 0)
            if not 0 < held.sum() < len(rows):
                raise ValueError(
                    f"--fold {self.fold or 0} of --folds {self.folds}: no row with a picture is "
                    f"{'left' if held.any() else 'in it'}"
                )
            return held
        if for_val[rows].any():
            if for_val[rows].all():
                raise ValueError("no row with a picture is left for train")
            return for_val[rows]
        if self.val_fraction == 0:
            return None
        ids = [ids[row] for row in rows]
        if self.task == "classification" and groups is None:
            return table_split.stratified(
                targets[rows], self.val_fraction, self.split_seed, names or [], ids, frame.index.to_numpy()[rows]
            )
        return table_split.share_held_out(
            targets[rows], self.task, self.val_fraction, self.split_seed, None if groups is None else groups[rows], ids
        )

    def _kept_or_assigned(self, targets: np.ndarray, names: list[str] | None) -> np.ndarray:
        """(N,) fold of every row: as a file of `folds_at` has it, else by rule."""
        at, groups, ids, count = self.folds_at or "folds", self.groups, self.train_ids, self.folds or 0
        if at.endswith(".csv"):
            self.folds_file = at
        else:
            data = os.path.basename(os.path.realpath(str(self.data_dir)))
            self.folds_file = folds.kept(at, data, ids, targets, self.task, count, self.split_seed, groups)
        if self.folds_at and os.path.isfile(self.folds_file):
            return folds.read(self.folds_file, ids, count, groups)
        if at.endswith(".csv"):
            raise ValueError(f"--data_args.folds_at {at}: there is no such file")
        return table_split.by_rule(targets, self.task, count, self.split_seed, groups, names, ids)

    def keep_folds(self) -> None:
        """Write `folds_file`, unless it is there."""
        if self.folds_file is not None and self.fold_numbers is not None:
            folds.write(self.folds_file, self.train_ids, self.fold_numbers, str(self.id_column))

    def _groups(self, frame: pd.DataFrame, train: Rows, report: Report) -> np.ndarray | None:
        """(N,) group of every row, "" where it has none: of the group column or file, and rows of one image."""
        name, parts = self.table_scheme["group"], []
        if name and name.endswith(".csv"):
            column = str(self.id_column)
            groups, problem = table_scheme.read_groups(str(self.data_dir), name, frame[column], column)
            report.lines += [problem] if problem else []
            parts.append(self._alike(groups, name))
        elif name:
            parts.append(self._alike(frame[name], name))
        files = np.array([file or "" for file in train.files])
        if len(set(files) - {""}) < (files != "").sum():
            parts.append(files)
        if report.lines:
            return None
        return table_split.together(parts, train.ids.tolist()) if len(parts) > 1 else parts[0] if parts else None

    def _alike(self, groups: Sequence[str], name: str) -> np.ndarray:
        """(N,) groups, 5 and 5.0 as one; a line notes it."""
        if plain := plainly(groups):
            self.lines.append(
                f"table group {name}: {spelled_twice(plain)} are the same numbers, and taken for one group each"
            )
        return np.array([plain.get(group, group) for group in groups], str)

    @property
    def spec(self) -> "Spec":
        """With `table`: what the table means (`table_scheme`), and `columns`, where some are inputs."""
        spec = super().spec
        spec["table"] = self.table_scheme
        if self.columns:
            spec["columns"] = self.columns
        return spec

    def resolved(self) -> dict[str, str | None]:
        """The flags that were left out, as they were guessed: target, task, image, group and metric."""
        scheme = self.table_scheme
        target = None if any("," in name for name in scheme["targets"][1:]) else ",".join(scheme["targets"])
        return {"target": target} | {name: scheme[name] for name in ("task", "image", "group", "metric")}

    def resolved_args(self) -> dict[str, str]:
        """The keywords that were left out, as they were guessed: the split column, where there is one."""
        column = self.table_scheme["split_column"]
        return {"split_column": column} if column and not self._given["split_column"] else {}

    def notes(self) -> list[str]:
        """Lines to print: the meaning of the table and the reasons; skipped rows; classes too rare for the folds."""
        lines, numbers = list(self.lines), self.fold_numbers
        if len(self.skipped):
            lines += self._skipped_lines()
        if self.task == "regression" and self._given["target_range"] is None:
            spans = [f"{low:.15g} to {high:.15g}" for low, high in self.target_range]
            lines.append(
                f"table range {listed(spans)} (of the rows trained on; a known one: --data_args.target_range [0,100])"
            )
        if numbers is not None:
            lines += table_split.notes(numbers, self.all_targets, self.task, self.class_names)
        elif self.task != "regression" and {"train", "val"} <= self.splits.keys():
            lines += table_split.never_learned(
                self.splits["train"].targets, self.splits["val"].targets, self.class_names or []
            )
        return lines + super().notes()

    def _skipped_lines(self) -> list[str]:
        """Lines on the rows left out for their images, and on those without a label."""
        lines, hollow = [], self.skipped["reason"] == table_targets.NO_LABEL
        for kind, what in ((self.skipped[~hollow], "picture"), (self.skipped[hollow], "row")):
            counts = " and ".join(
                f"{counted(count, what)} of {split}" for split, count in kind["split"].value_counts().items()
            )
            if what == "row" and counts:
                lines.append(f"table skipped {counts} without a label, listed in skipped.csv: {listed(kind['id'])}")
            elif counts:
                wanted = "predict" in self.rows and "test" in set(kind["split"])
                lines.append(
                    f"table skipped {counts}, listed in skipped.csv: {listed(kind['file'] + ' ' + kind['reason'])}"
                    + "; a submission needs a row for each: predict.py RUN --bad_images fill" * wanted
                )
        return lines


def _extent(targets: np.ndarray) -> list[list[float]]:
    """[low, high] of each column."""
    return [[float(low), float(high)] for low, high in zip(targets.min(0), targets.max(0))]
