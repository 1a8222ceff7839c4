"""The run of a command: decided once, in the launching process, and built by every rank."""

import json
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from datamodules import kaggle_csv
from experiments.cli import launcher
from experiments.cli.errors import UsageError
from experiments.config import Command, Config
from experiments.running import forecast, objects, rendezvous, run_directory
from experiments.running.decide import Run, decide
from lightning_modules.callbacks.signals import notice

DECISION = "VITLAB_DECISION"  # what the launching process decided, for the ranks Lightning starts


def resolve(command: Command, *, assume: bool = False) -> Run:
    """Decide once, in the launching process; other ranks take its result. `assume` as in `decide`.

    Raises ValueError or FileNotFoundError for what the user must change.
    """
    quiet()
    forecast.share_cores(command.config)
    if DECISION in os.environ and "LOCAL_RANK" in os.environ:
        return _build(json.loads(os.environ[DECISION]))
    place = forecast.environment(command.config)
    if not place.creates_processes_externally or place.world_size() == 1:
        run = enter(decide(command, assume=assume))
        os.environ[DECISION] = json.dumps(_decision(run))
        return run
    if problem := launcher.problem(command.config.devices, command.config.num_nodes, planned=command.config.dry_run):
        raise UsageError(problem)
    rendezvous.meet(place, command.config)
    run = _resolve_together(command, first=place.global_rank() == 0)
    notice.together = True  # from here on no rank leaves alone
    return run


def _resolve_together(command: Command, *, first: bool) -> Run:
    """Decide on rank 0, build on all ranks, and enter the directory once no rank has a problem. Raises as `resolve`."""
    run, problem = _attempt(decide, command) if first else (None, None)
    decision = rendezvous.broadcast(run and _decision(run), problem)
    if not first:
        run, problem = _attempt(_build, decision)
    rendezvous.agree(problem)
    assert run is not None  # or all ranks have left
    if not run.cfg.dry_run and not run.finished:
        rendezvous.one_disk(run.cfg.runs_dir)
    entered, problem = _attempt(enter, run) if first else (None, None)
    run.resume, run.finished = rendezvous.broadcast(entered and (entered.resume, entered.finished), problem)
    return run


def _attempt(do: Callable[[Any], Run], given: Any) -> tuple[Run | None, Exception | None]:
    try:
        return do(given), None
    except (ValueError, FileNotFoundError) as error:
        return None, error


def _decision(run: Run) -> dict[str, Any]:
    """The decision as plain data, from which other ranks build the same run."""
    return {
        "cfg": {each.name: getattr(run.cfg, each.name) for each in fields(run.cfg)},
        "folder": str(run.folder),
        "resume": run.resume,
        "finished": run.finished,
        "unreadable": getattr(run.data, "unreadable", None) or [],
    }


def quiet() -> None:
    """Silence Lightning's log lines and warnings that do not apply here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r".*isinstance\(treespec, LeafSpec\).*",  # lightning 2.6 with newer torch
        ".*Total length of `list` across ranks is zero.*",  # no val split: said by --dry_run
        ".*dataloader is not resumable.*",  # ours is: its position is in the checkpoint
        ".*does not have many workers.*",  # a start line tells workers and cores
    ):
        warnings.filterwarnings("ignore", message=message)


def enter(run: Run) -> Run:
    """Create or re-enter the run directory, unless only a plan is asked for. Raises UsageError
    (`run_directory.enter`)."""
    if not run.cfg.dry_run:
        run.folder, run.resume, run.finished = run_directory.enter(run.cfg, run.data.spec, run.identity)
        if isinstance(run.data, kaggle_csv.DataModule) and run.cfg.folds:
            run.data.keep_folds()
    return run


def _build(decision: dict[str, Any]) -> Run:
    cfg = Config.from_plain(decision["cfg"])
    data = objects.datamodule(cfg, decision["unreadable"])
    network, teacher = objects.model(cfg, data)[0], objects.teacher(cfg, data)
    return Run(cfg, Path(decision["folder"]), decision["resume"], decision["finished"], data, network, teacher)
