"""Names and directories of the folds of a run: runs/<name>/ over runs/<name>/fold0.."""

import os
import re
from dataclasses import replace
from pathlib import Path

import yaml

from datamodules.loading.files import write_text
from experiments.cli.errors import UsageError
from experiments.config import Config, plain
from experiments.running import run_directory
from models import pretrained


def enter(cfg: Config) -> None:
    """Make or re-enter the directory over the folds of a run, which `run_directory.look` has found fit. Raises
    UsageError where it cannot be written."""
    folder = cfg.folder
    try:
        if cfg.overwrite and folder.exists():
            run_directory.remove(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / run_directory.CONFIG, yaml.safe_dump(plain(cfg), sort_keys=False))
    except OSError as error:
        raise UsageError(
            f"the run directory {folder} cannot be written: {error.strerror or error}; --runs_dir names another place"
        ) from None


def take_in(parent: Path, cfg: Config, fold: int) -> None:
    """Link a finished run of this fold alone, with the same training values, into the directory over the folds, unless
    the fold has a run there. Its name has `-f<fold>` after the seed, or at the end of a given name."""
    start, given, own = run_directory.name_start(cfg), str(cfg.name), parent / f"fold{fold}"
    name = f"{start}-f{fold}{given[len(start) :]}" if given.startswith(start) else f"{given}-f{fold}"
    alone = Path(cfg.runs_dir) / name
    if (
        not own.exists()
        and run_directory.result(alone).get("finished")
        and not run_directory.differences(alone, replace(cfg, fold=fold))
    ):
        own.unlink(missing_ok=True)
        own.symlink_to(os.path.relpath(alone, parent))


def is_over_folds(path: str | Path) -> bool:
    """Whether a path is the directory over the folds of a run: it holds no weights."""
    return not (Path(path) / "checkpoints").is_dir() and (Path(path) / "fold0").is_dir()


def of_fold(source: str, fold: int | None) -> str:
    """Of a run over folds the directory of one; any other source as it is."""
    return str(Path(source) / f"fold{fold or 0}") if is_over_folds(source) else source


def own(source: str, cfg: Config, flag: str) -> str:
    """Where the weights are that a run takes of `source`: of a run over folds those of the run's own fold (over all
    folds, of the first).

    Raises UsageError for a run over folds without such weights, over another number of folds, or where this one is of
    no fold.
    """
    if not is_over_folds(source):
        return source
    count = run_directory.stored(Path(source)).get("folds")
    if not cfg.folds:
        raise UsageError(
            f"{flag} {source} is a run over {count} folds: one of them is {flag} {Path(source) / 'fold0'}; with "
            f"--folds {count} each "
            "fold takes its own"
        )
    if count != cfg.folds:
        raise UsageError(f"{flag} {source} is a run over {count} folds, not {cfg.folds}: their rows are others")
    place = of_fold(source, cfg.fold)
    try:
        pretrained.checkpoint_in(place)
    except FileNotFoundError:
        raise UsageError(f"{flag} {source}: its fold {cfg.fold or 0} has no weights yet") from None
    return place


def name_and_group(folder: Path, cfg: Config) -> tuple[str, str | None]:
    """What a tracker calls a run, and the group it puts it in: folds of one run share that run's name as their
    group."""
    if cfg.fold is None:
        return folder.name, None
    if folder.name == f"fold{cfg.fold}":
        return f"{folder.parent.name}-f{cfg.fold}", folder.parent.name
    return folder.name, re.sub(rf"-f{cfg.fold}(?=-|$)", "", folder.name, count=1)
