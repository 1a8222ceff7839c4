"""Check that the weights a run starts or learns from were not trained on images that it holds out: their score would be
too good.

A checkpoint keeps the config of its run and a fingerprint of its splits. The splits are made anew from the config, and
are the run's own where they have that fingerprint, wherever the folder lies by now.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

import datamodules
from datamodules import kaggle_csv
from datamodules.base import PictureData
from datamodules.folder import DataModule as ClassFolders
from experiments.cli.errors import UsageError
from experiments.config import SPLIT, Config
from experiments.folds import directories
from lightning_modules.teachers import cached_teacher
from models import pretrained

PLAIN: dict[str, Any] = {
    "global_batch_size": 1,
    "micro_batch_size": None,
    "mixup": 0.0,
    "cutmix": 0.0,
    "repeated_augment": 1,
    "augment": None,
    "train_size": None,
    "cache_dir": None,
    "init": None,
    "eval_only": False,
    "metric": None,
}  # of a run whose splits alone are asked for
UNKNOWN = "whether it has learned rows that are held out here cannot be told"


def check(cfg: Config, data: PictureData, datamodule: Callable[[Config], PictureData]) -> list[str]:
    """Hold --init and --teacher against the rows that `data` holds out; over all folds, those of each fold against what
    that fold starts from.

    Args:
        cfg: the resolved config; datamodule: makes the data of one.
    Returns lines on what cannot be told, or is allowed. Raises UsageError for weights that have learned such rows,
    unless `allow_seen`.
    """
    notes: dict[str, None] = {}
    for fold, held in _held_out(cfg, data).items():
        of_fold = replace(cfg, fold=fold)
        for flag, source in sources(of_fold):
            start = directories.own(source, of_fold, flag)
            for path, about in _ancestors(start, fold):
                what = f"{flag} {start}" + f": {path}, which it has learned from," * (path != start)
                line = _learned(what, about, path, held, cfg, data, datamodule)
                if line and not cfg.allow_seen and UNKNOWN not in line:
                    raise UsageError(line + _instead(flag, cfg, fold))
                notes |= {line: None} if line else {}
    return [*notes]


def sources(cfg: Config) -> Iterator[tuple[str, str]]:
    """(flag, path) of the files and runs that --init, --teacher and --teacher_init name, and of those whose answers a
    cached teacher holds."""
    if cfg.init and Path(cfg.init).exists():
        yield "--init", cfg.init
    if not cfg.teacher or cfg.eval_only:
        return
    if cached_teacher.is_cache(cfg.teacher):
        for teacher in cached_teacher.read_about(cfg.teacher)["teachers"]:
            if Path(teacher.get("file", "")).is_file():
                yield "--teacher", teacher["file"]
        return
    yield from (("--teacher", source.strip()) for source in cfg.teacher.split(",") if Path(source.strip()).exists())
    if cfg.teacher_init and Path(cfg.teacher_init).exists():
        yield "--teacher_init", cfg.teacher_init


def _held_out(cfg: Config, data: PictureData) -> dict[int | None, np.ndarray]:
    """Names of the pictures that are scored and not trained on, by fold (None: of a single run)."""
    if cfg.eval_only and data.sizes["test"] or not data.sizes["val"]:
        return {}
    if not cfg.folds or cfg.fold is not None:
        return {cfg.fold: data.splits["val"].names}
    assert isinstance(data, kaggle_csv.DataModule) and data.fold_numbers is not None  # folds are of tables
    names = np.concatenate([data.splits[split].names for split in ("train", "val")])
    fold = data.fold_numbers[np.concatenate([data.rows[split] for split in ("train", "val")])]
    return {number: names[fold == number] for number in range(cfg.folds)}


def _ancestors(path: str, fold: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, config and spec) of a checkpoint and of all that it was initialised or distilled from, as far as they
    exist."""
    left, seen = [path], set()
    while left:
        path = left.pop()
        about = pretrained.read_about(path)
        if not about or os.path.realpath(path) in seen:
            continue
        seen.add(os.path.realpath(path))
        yield path, about
        before = about["config"]
        for source in filter(
            None, (before.get("init"), *(before.get("teacher") or "").split(","), before.get("teacher_init"))
        ):
            source = directories.of_fold(source.strip(), before.get("fold", fold))
            try:
                pretrained.checkpoint_in(source)
            except (FileNotFoundError, ValueError):  # a name or tag, or no longer there
                continue
            left.append(source)


def _learned(
    what: str,
    about: dict[str, Any],
    path: str,
    held: np.ndarray,
    cfg: Config,
    data: PictureData,
    datamodule: Callable[[Config], PictureData],
) -> str:
    """A line if weights were trained on some of the images `held`, or if that is unknown; else ''."""
    there, spec = about["config"], about["spec"]
    same_names = (spec.get("class_names"), spec.get("target_names")) == (
        data.spec["class_names"],
        data.spec["target_names"],
    )
    if "data" not in there:
        return f"{what} does not keep what it was trained on: {UNKNOWN}" * same_names
    same_place = _place(there) == _place({"data_dir": cfg.data_dir, "data": cfg.data})
    if not same_place and not same_names or _other_folders(there["data"], data, held):
        return ""
    fingerprint = about.get("fingerprint")
    if fingerprint == data.fingerprint:
        names = data.splits["train"].names
    else:
        before = _splits(there, path, cfg, datamodule)
        if before is None or before.fingerprint != fingerprint:
            return f"{what} was trained on the same folder, which has changed since: {UNKNOWN}" * same_place
        names = before.splits["train"].names
    count = int(np.isin(held, names).sum())
    if not count:
        return ""
    how = (
        f"fold {there.get('fold')} of {there['folds']}"
        if there.get("folds")
        else f"val_fraction {there.get('val_fraction')}"
    )
    return (
        f"{what} has learned {count:,} of the {len(held):,} rows that are held out here (it held out {how}, split_seed "
        f"{there.get('split_seed')}): their score would be too good"
    )


def _place(config: dict[str, Any]) -> tuple[str, str | None]:
    return config["data"] if not config.get("data_dir") else "", config.get("data_dir") and os.path.realpath(
        config["data_dir"]
    )


def _other_folders(name: str, data: PictureData, held: np.ndarray) -> bool:
    """Whether both are class folders and all that is held out has a folder of its own, from which no run learns:
    ImageNet is not listed again."""
    both = (
        isinstance(data, ClassFolders)
        and name in datamodules.names()
        and issubclass(datamodules.data_class(name), ClassFolders)
    )
    return both and not any(each.startswith(b"train/") for each in held.tolist())


def _splits(
    there: dict[str, Any], path: str, cfg: Config, datamodule: Callable[[Config], PictureData]
) -> PictureData | None:
    """The data module of a stored config, divided as its run divided it; None where that fails."""
    known = {knob.name for knob in fields(Config)}
    split: dict[str, Any] = {key: there[key] for key in SPLIT if key in there and key in known}
    run = pretrained.checkpoint_in(path).absolute().parents[1]  # folds that it kept lie over or beside it
    try:
        return datamodule(replace(cfg, **split, **PLAIN, name=run.name, runs_dir=str(run.parent)))
    except (ValueError, KeyError, OSError, TypeError):
        return None


def _instead(flag: str, cfg: Config, fold: int | None) -> str:
    """The end of the error: what helps."""
    where = f" (fold {fold})" if cfg.folds and cfg.fold is None else ""
    parent = (
        f", as {flag} PARENT does, a run over the same folds, of which each fold takes its own" if cfg.folds else ""
    )
    return f"{where}. Give weights that held out the same rows{parent}; --allow_seen says that it is meant"
