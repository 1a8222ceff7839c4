"""Guesses from a competition's tables: id and target columns, task, groups, folds and metric, each
with its reason.

Every part can be given instead; what cannot be guessed raises a ValueError that names the flag and the candidates. Only
pandas, numpy and the standard library.
"""

import re
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pandas as pd

from datamodules.loading.class_folders import SUFFIXES
from datamodules.tables.table import near_miss, whole
from datamodules.tables.targets import TRUTH

ID_NAMES = re.compile(
    r"(^|_)(ids?|images?|img|fname|file_?names?|files?|names?|paths?|pictures?|photos?|uuid|key)($|_)"
)
TARGET_NAMES = re.compile(
    r"^(labels?|targets?|class(es|_?name|_?id|_?label)?|category(_?id)?|y|score|tags?|diagnosis|grade)$"
)
GROUP_NAMES = re.compile(
    r"^(patient|subject|person|individual|user|participant|case|study|series|sequence|video|session|group|animal|pet|"
    r"specimen)"
    r"(_?(id|uid|no|nr|number|name|key))?$"
)
FOLD_NAMES = re.compile(r"^(k?_?folds?|cv_?folds?|fold_?(id|no|number))$")
SPLIT_NAMES = re.compile(
    r"^(split|set|subset|partition|phase|usage|fold|data_?(set|split)|(set|split)_?(name|type)|"
    r"train_?(val_?)?test(_?split)?)$"
)
PARTS = {
    "train": ("train", "training", "trn", "tr"),
    "val": ("val", "valid", "validation", "dev", "publictest"),
    "test": ("test", "testing", "tst", "privatetest"),
}  # the last of each as in FER2013, whose public test is to choose by
FLAGS = {
    "is_train": ("test", "train"),
    "is_training": ("test", "train"),
    "is_training_image": ("test", "train"),
    "is_valid": ("train", "val"),
    "is_val": ("train", "val"),
    "is_validation": ("train", "val"),
    "is_test": ("train", "test"),
}  # columns of 0 and 1: part of 0, part of 1
SEPARATORS = "|;, "
MOST_CLASSES = 50  # whole numbers from 0 on, of more they may be quantities


@dataclass(frozen=True)
class Tables:
    """The tables of a folder; `test` and `sample` may be missing. `names` are the files they came from."""

    train: pd.DataFrame
    test: pd.DataFrame | None
    sample: pd.DataFrame | None
    names: dict[str, str]


def words(name: str) -> str:
    """A column's name in lower case with underscores: ImageID -> image_id."""
    return re.sub(r"[\s\-.]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip())).lower()


def guess_id(tables: Tables) -> tuple[str, str]:
    """(id column, reason)."""
    train, others = tables.train, [table for table in (tables.test, tables.sample) if table is not None]
    first = [
        name
        for name in (tables.sample.columns if tables.sample is not None else ())
        if not name.startswith("Unnamed: ")
    ][:1]
    if first and first[0] in train:
        return first[0], f"first column of {tables.names['sample']}"
    shared = [name for name in train.columns if all(name in table for table in others)]
    where = " and ".join(tables.names[key] for key in ("train", "test", "sample") if key in tables.names)
    named = [name for name in shared if ID_NAMES.search(words(name)) and not GROUP_NAMES.search(words(name))]
    unique = [name for name in shared if train[name].is_unique and len(train) > 1]
    for found, why in (
        ([name for name in named if name in unique], "its name, and no value is there twice"),
        (unique, "no value is there twice"),
        (named, "its name"),
    ):
        if found and (len(found) == 1 or "name," in why):
            return found[0], f"{why} ({where})"
    raise ValueError(
        "which column holds the ids cannot be told: --data_args.id_column names it; "
        + (f"it may be {' or '.join(shared[:12])}" if shared else f"{where} have no column in common")
    )


def guess_targets(tables: Tables, id_column: str, taken: set[str]) -> tuple[list[str], str]:
    """(target columns, reason). `taken` are columns with another role."""
    train, test, sample = tables.train, tables.test, tables.sample
    free = [name for name in train.columns if name != id_column and name not in taken]
    if sample is not None:
        asked = [name for name in sample.columns if name != id_column]
        if asked and all(name in free for name in asked):
            return asked, f"as {tables.names['sample']} asks for"
        for name in free:
            values = set(train[name]) - {""}
            if len(asked) > 1 and set(map(whole, asked)) <= set(map(whole, values | _tokens(values))):
                return [name], f"{tables.names['sample']} has a column for each of its values"
    if test is not None:
        free = [name for name in free if name not in test] or free
    named = [name for name in free if TARGET_NAMES.search(words(name))]
    if len(free) == 1 and (sample is None or len(named) == 1):
        return (
            free,
            f"the only one that is left in {tables.names['train']}"
            + f" and not in {tables.names.get('test')}" * (test is not None),
        )
    if len(named) == 1:
        return named, "its name"
    if free and test is not None and all(set(train[name]) <= {"0", "1"} for name in free):
        return free, f"columns of 0 and 1 that are not in {tables.names['test']}"
    raise ValueError(
        "which column is the target cannot be told: --target names it, several by commas; "
        + (f"it may be {' or '.join(free[:12])}" if free else f"{tables.names['train']} has {', '.join(train.columns)}")
    )


def guess_task(tables: Tables, targets: list[str], separator: str | None) -> tuple[str, str]:
    """(task, reason)."""
    values = [tables.train[name] for name in targets]
    if len(targets) > 1:
        return _task_of_several(values)
    text = values[0][values[0] != ""]
    numbers, distinct = pd.to_numeric(text, errors="coerce"), text.nunique()
    sign, strange = separator or joined_by(text), text[numbers.isna()]
    if len(strange) and text.str.fullmatch(r"[-+]?\d+(,\d+)?").all():
        return "regression", "numbers with a decimal comma"
    if len(strange) and sign and (len(strange) > len(text) / 2 or strange.str.contains(sign, regex=False).all()):
        return (
            "multilabel",
            f"texts joined by {sign!r}, {len(_parts(set(text), sign))} words in {distinct} combinations",
        )
    if len(strange) > len(text) / 2:
        return "classification", f"{distinct} different texts"
    asked = _asked_numbers(tables.sample, targets[0])
    finite = numbers[np.isfinite(numbers)]
    if (finite % 1 != 0).any():
        return "regression", "numbers with fractions"
    kinds = np.unique(finite.to_numpy(float))
    if len(kinds) > 2 and asked is not None and (asked % 1 != 0).any():
        return "regression", f"{len(kinds)} different numbers, and {tables.names['sample']} holds fractions"
    if (
        len(kinds) <= MOST_CLASSES
        and kinds.min(initial=0) in (0, 1)
        and np.array_equal(kinds, np.arange(len(kinds)) + kinds.min(initial=0))
    ):
        return "classification", f"whole numbers {kinds[0]:g} to {kinds[-1]:g}" if len(kinds) else "no number at all"
    if len(kinds) <= 20:
        return "classification", f"{len(kinds)} different whole numbers"
    raise ValueError(
        f"whether {targets[0]} ({len(kinds)} different whole numbers, {kinds[0]:g} to {kinds[-1]:g}) are classes or "
        f"quantities cannot "
        "be told: --task classification or --task regression"
    )


def _task_of_several(values: list[pd.Series]) -> tuple[str, str]:
    ones = pd.DataFrame({place: pd.to_numeric(column, errors="coerce") for place, column in enumerate(values)})
    if ones.isin([0, 1]).all(axis=None):
        if (ones.sum(axis=1) == 1).all():
            return "classification", f"{len(values)} columns of 0 and 1, with exactly one 1 in each row"
        return "multilabel", f"{len(values)} columns of 0 and 1"
    if ones.notna().mean().min() > 0.5:
        return "regression", f"{len(values)} columns of numbers"
    raise ValueError(
        f"the targets {', '.join(column.name for column in values)} are neither all numbers nor all 0 and 1: --task "
        f"and --target say "
        "what they are"
    )


def _asked_numbers(sample: pd.DataFrame | None, target: str) -> pd.Series | None:
    if sample is None or target not in sample or len(sample) == 0:
        return None
    return pd.to_numeric(sample[target], errors="coerce").dropna()


def joined_by(text: pd.Series) -> str | None:
    """The sign that joins labels in a column of texts: with it there are fewer words than texts, and some text is a
    single word."""
    whole = set(text)
    for sign in SEPARATORS:
        if any(sign in value for value in whole):
            found = _parts(whole, sign)
            if len(found) < len(whole) and found & whole:
                return sign
    return None


def _parts(values: set[str], sign: str) -> set[str]:
    return {part.strip() for value in values for part in value.split(sign)} - {""}


def _tokens(values: set[str]) -> set[str]:
    return set(chain.from_iterable(_parts(values, sign) for sign in SEPARATORS))


def guess_separator(text: pd.Series) -> str:
    """The sign between the labels of a joined column."""
    return joined_by(text) or next((sign for sign in SEPARATORS if text.str.contains(sign, regex=False).any()), " ")


def guess_group(train: pd.DataFrame, taken: set[str]) -> tuple[str | None, str]:
    """(group column or None, reason): named like one, with values that repeat; a column of a few values is none."""
    for name in train.columns:
        values = train[name]
        kinds = values.nunique()
        if (
            name not in taken
            and GROUP_NAMES.search(words(name))
            and 5 <= kinds < len(values)
            and not (values == "").any()
        ):
            return (
                name,
                f"its name, {kinds:,} values in {len(values):,} rows: equal ones stay on one side; --group none does "
                f"without",
            )
    return None, "no column is named like one, as patient_id"


def guess_folds(train: pd.DataFrame, taken: set[str]) -> str | None:
    """A column that holds fold numbers, or None."""
    for name in train.columns:
        if name not in taken and (FOLD_NAMES.search(words(name)) or words(name) == "split"):
            numbers = pd.to_numeric(train[name], errors="coerce")
            kinds = np.unique(numbers.dropna())
            if (
                numbers.notna().all()
                and len(kinds) > 1
                and np.array_equal(kinds, np.arange(len(kinds)) + kinds[0])
                and kinds[0] in (0, 1)
            ):
                return name
    return None


def part_of_word(column: str, word: str) -> str | None:
    """train, val or test, as a word of a column means it; None for another word."""
    if words(column) in FLAGS:
        value = TRUTH.get(word.lower(), whole(word))
        return FLAGS[words(column)][int(value)] if value in (0, 1, "0", "1") else None
    return next((part for part, usual in PARTS.items() if words(word).replace("_", "") in usual), None)


def guess_split(tables: Tables, taken: set[str], targets: list[str]) -> str | None:
    """A column named like a split, with words for two parts, or None. `taken` are columns with another role, `targets`
    those that are known."""
    taken = taken | {*targets} | {*(tables.sample.columns if tables.sample is not None else ())}
    for name in tables.train.columns:
        if name not in taken and (words(name) in FLAGS or SPLIT_NAMES.search(words(name))):
            found = {part_of_word(name, word) for word in set(tables.train[name])} - {None}
            if len(found) > 1 and (targets or {*tables.train.columns} - taken - {name}):  # else it is the target
                return name
    return None


def guess_metric(tables: Tables, scheme: dict) -> tuple[str, str]:
    """(metric, reason)."""
    if scheme["task"] == "regression":
        return "rmse", "the usual one of a regression"
    if scheme["task"] == "multilabel":
        joined = scheme["separator"] is not None
        return ("f1", "labels are answered as text") if joined else ("auroc", "the usual one of columns of 0 and 1")
    if tables.sample is not None and len(tables.sample.columns) > 2:
        return "log_loss", f"{tables.names['sample']} asks for a probability of each class"
    asked = _asked_numbers(tables.sample, scheme["targets"][0])
    if asked is not None and len(asked) and (asked % 1 != 0).any() and asked.between(0, 1).all():
        return "auroc", f"{tables.names['sample']} holds probabilities of two classes"
    return "acc1", "the usual one of a classification; the files do not tell"


def check_columns(tables: Tables, given: dict[str, list[str]]) -> list[str]:
    """Errors of the columns that flags name, {flag: columns}: not in train.csv; with the closest."""
    return [
        f"{tables.names['train']}: {flag} {name!r} is no column{near_miss(name, tables.train.columns)}"
        for flag, names in given.items()
        for name in names
        if name not in tables.train
    ]


def looks_like_files(values: pd.Series) -> bool:
    return bool(len(values)) and values.head(100).str.lower().str.endswith(SUFFIXES).mean() > 0.5
