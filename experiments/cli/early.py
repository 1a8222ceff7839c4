"""Checks of a command line that need no torch: unknown names, missing folders, a run that has finished."""

import hashlib
import json
import os
from pathlib import Path

import datamodules
from datamodules.loading.closest import did_you_mean
from experiments.cli import launcher, registered
from experiments.cli.errors import UsageError
from experiments.config import Config
from experiments.running import run_directory
from lightning_modules.objectives import metrics

MOST_ENTRIES = 200_000  # of a data folder; beyond, a listing takes as long as importing torch


def check(cfg: Config, *, by_launcher: bool = False) -> None:
    """Check names, folders and the number of ranks. Raises UsageError with all problems.

    by_launcher: the ranks are not started yet, and their number is not checked.
    """
    over_folds = (
        cfg.folds is not None and cfg.fold is None and launcher.tasks() > 1
    )  # `fold_runs` says what to type instead
    known, problems = datamodules.names(), [_data_dir_problem(cfg)]
    if not (by_launcher or over_folds):
        problems.append(launcher.problem(cfg.devices, cfg.num_nodes, planned=cfg.dry_run))
    if cfg.data and cfg.data not in known:
        problems.append(f"no data set named {cfg.data!r}{did_you_mean(cfg.data, known)} (there are {', '.join(known)})")
    if cfg.model:
        problems.append(registered.model_problem(cfg.model))
    if cfg.metric and ".py:" not in cfg.metric and cfg.metric not in metrics.METRICS:
        problems.append(
            f"--metric {cfg.metric}: there is no such metric{did_you_mean(cfg.metric, [*metrics.METRICS])} (there are "
            f"{', '.join(metrics.METRICS)}; or my.py:function)"
        )
    if cfg.distill and cfg.distill not in (losses := registered.distill_losses()):
        problems.append(
            f"no distillation loss named {cfg.distill!r}{did_you_mean(cfg.distill, [*losses])} (there are "
            f"{', '.join(losses)})"
        )
    if not any(problems) and cfg.model is None and not cfg.eval_only:
        problems.append("--model is missing: --list models prints the names; --recipe demo is a small one to try")
    if any(problems):
        raise UsageError("\n".join(filter(None, problems)))


def _data_dir_problem(cfg: Config) -> str | None:
    if cfg.data_dir is None or os.path.isdir(cfg.data_dir):
        return None
    if (
        cfg.num_nodes > 1 and launcher.tasks() > 1
    ):  # one machine may lack it: its rank may not leave alone, the others would wait for it
        return None
    return f"--data_dir {cfg.data_dir}: there is no such folder ({os.path.abspath(cfg.data_dir)})"


def finished(cfg: Config) -> Path | None:
    """The directory of this command's run if it has finished on the data as they are; None if torch is needed to
    decide."""
    if cfg.overwrite or cfg.dry_run or cfg.fast_dev_run or cfg.resume:
        return None
    if (
        launcher.tasks() > 1 or "LOCAL_RANK" in os.environ or os.environ.get("WANDB_RUN_ID")
    ):  # ranks decide together; an agent wants its run
        return None
    folders = (
        [cfg.folder] if cfg.name else [file.parent for file in Path(cfg.runs_dir).glob(f"*/{run_directory.RESULT}")]
    )
    typed = _typed(cfg) if folders else None
    for folder in folders:
        if typed is None:
            break
        try:
            before, page = run_directory.result(folder), folder / "report.html"
            if (
                before.get("finished")
                and before.get("asked") == _digest(typed, folder)
                and page.stat().st_mtime >= (folder / run_directory.RESULT).stat().st_mtime
            ):
                return folder
        except (OSError, ValueError):
            continue
    return None


def print_finished(folder: Path) -> int:
    """Print that the run has finished, and its result. Returns the exit code."""
    print(
        f"already finished: {folder} (--overwrite starts it again); its {run_directory.RESULT}, which counts epochs "
        f"from 0:\n"
        f"{(folder / run_directory.RESULT).read_text().strip()}"
    )
    return 0


def asked(cfg: Config, folder: Path) -> str | None:
    """A digest of the typed knobs and the state of the data folder; None if the folder alone does not determine it."""
    typed = _typed(cfg)
    return typed and _digest(typed, folder)


def _digest(typed: str, folder: Path) -> str:
    return hashlib.sha256(f"{typed} {folder.name}".encode()).hexdigest()[:16]


def _typed(cfg: Config) -> str | None:
    if cfg.eval_only or cfg.folds or cfg.group and os.path.isfile(cfg.group):
        return None
    stamp = (
        _stamp(cfg.data_dir) if cfg.data_dir else "in memory" if cfg.data and registered.in_memory(cfg.data) else None
    )
    return stamp and json.dumps(
        [run_directory.flat(cfg, "training", "where", "numerics"), cfg.name, stamp], sort_keys=True, default=str
    )


def _stamp(root: str) -> str | None:
    """The modification times of all folders and tables under a data folder, as text; None for a very large one."""
    found: list[tuple[str | int, ...]] = []
    left, seen, been = [root], 0, set()
    while left:
        place = left.pop()
        if (real := os.path.realpath(place)) in been:  # a link that leads back
            continue
        been.add(real)
        found.append((os.path.relpath(place, root), os.stat(place).st_mtime_ns))
        with os.scandir(place) as entries:
            for entry in entries:
                seen += 1
                if entry.is_dir():
                    left.append(entry.path)
                elif entry.name.endswith(".csv"):
                    found.append((os.path.relpath(entry.path, root), entry.stat().st_mtime_ns, entry.stat().st_size))
        if seen > MOST_ENTRIES:
            return None
    return str(sorted(found))
