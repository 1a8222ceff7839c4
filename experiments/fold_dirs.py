"""Names and directories of the folds of a run: runs/<name>/ over runs/<name>/fold0.., or beside it where a fold is run alone."""
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


def alone(cfg: Config, fold: int) -> Path | None:
    """The directory in which this fold of the run was run alone, with the same training values; None where there is none. Its name has
    `-f<fold>` after the seed, or at the end of a given name."""
    start = rundir.name_start(cfg)
    name = f"{start}-f{fold}{cfg.name[len(start):]}" if cfg.name.startswith(start) else f"{cfg.name}-f{fold}"
    folder = Path(cfg.runs_dir) / name
    return folder if rundir.stored(folder) and not rundir.differences(folder, replace(cfg, fold=fold)) else None


def name_and_group(folder: Path, cfg: Config) -> tuple[str, str | None]:
    """What a tracker calls a run, and the group it puts it in: folds of one run share that run's name as their group."""
    if cfg.fold is None:
        return folder.name, None
    if folder.name == f"fold{cfg.fold}":
        return f"{folder.parent.name}-f{cfg.fold}", folder.parent.name
    return folder.name, re.sub(rf"-f{cfg.fold}(?=-|$)", "", folder.name, count=1)
