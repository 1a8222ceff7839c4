"""Names and directories of the folds of a run: runs/<name>/ over runs/<name>/fold0.."""
import os
import re
from dataclasses import replace
from pathlib import Path

import yaml

from experiments import rundir
from experiments.config import Config, plain
from experiments.usage import UsageError


def enter(cfg: Config) -> None:
    """Make or re-enter the directory over the folds of a run, which `rundir.look` has found fit. Raises UsageError where it cannot be
    written."""
    folder = Path(cfg.runs_dir) / cfg.name
    try:
        if cfg.overwrite and folder.exists():
            rundir.remove(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rundir.write_text(folder / rundir.CONFIG, yaml.safe_dump(plain(cfg), sort_keys=False))
    except OSError as error:
        raise UsageError(f"the run directory {folder} cannot be written: {error.strerror or error}; --runs_dir names another place") from None


def take_in(parent: Path, cfg: Config, fold: int) -> None:
    """Link a finished run of this fold alone, with the same training values, into the directory over the folds, where it has none of its own. Its
    name has `-f<fold>` after the seed, or at the end of a given name."""
    start, own = rundir.name_start(cfg), parent / f"fold{fold}"
    name = f"{start}-f{fold}{cfg.name[len(start):]}" if cfg.name.startswith(start) else f"{cfg.name}-f{fold}"
    alone = Path(cfg.runs_dir) / name
    if not own.exists() and rundir.result(alone).get("finished") and not rundir.differences(alone, replace(cfg, fold=fold)):
        own.unlink(missing_ok=True)
        own.symlink_to(os.path.relpath(alone, parent))


def name_and_group(folder: Path, cfg: Config) -> tuple[str, str | None]:
    """What a tracker calls a run, and the group it puts it in: folds of one run share that run's name as their group."""
    if cfg.fold is None:
        return folder.name, None
    if folder.name == f"fold{cfg.fold}":
        return f"{folder.parent.name}-f{cfg.fold}", folder.parent.name
    return folder.name, re.sub(rf"-f{cfg.fold}(?=-|$)", "", folder.name, count=1)
