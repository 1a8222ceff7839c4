"""The parts of `run.py --folds K` that need torch: resolving before the first fold, merging after the last."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.tables import folds
from experiments.cli.errors import UsageError, invocation
from experiments.config import Command, read
from experiments.folds import FOLD_PER_DEVICE, directories, merge
from experiments.processes.pool import gpu_names
from experiments.reporting import result, run_page
from experiments.running import build, decide, forecast, run_directory, trackers
from experiments.running.build import Run
from lightning_modules.loggers.formats import format_value
from lightning_modules.loggers.messages import warn_on_error
from lightning_modules.objectives import metrics


def prepare(command: Command, *, write: bool) -> dict[str, Any] | int:
    """Resolve the run as its first fold would, and enter its directory; without `write` only print the plan. Returns
    plain values for `Folds`, or an exit code where there is nothing to do. Raises ValueError or FileNotFoundError for
    wrong input."""
    build.quiet()
    cfg, apart, flags = command.config, command.config.strategy == FOLD_PER_DEVICE, {"dry_run": True}
    if apart:
        flags |= {"devices": 1, "strategy": "auto"}
        if forecast.on_gpu(cfg) and torch.cuda.device_count() < cfg.devices:
            raise UsageError(
                f"--devices {cfg.devices} --strategy {FOLD_PER_DEVICE}: this machine has "
                f"{torch.cuda.device_count()} GPUs"
            )
    run = decide.decide(command.again(**flags), assume=not write)
    if not write:
        result.dry_run(run)
        print(f"all of this {cfg.folds} times, once for each fold")
        return 0
    if run.finished:
        return result.finished(run)
    file, ids, fold = run.data.folds_file, run.data.train_ids, run.data.fold_numbers
    directories.enter(replace(run.cfg, dry_run=False))
    run.data.keep_folds()
    folds.write(run.folder / merge.FOLDS, ids, fold, run.data.id_column)
    if not np.array_equal(folds.read(run.folder / merge.FOLDS, ids, cfg.folds), fold):
        raise UsageError(
            f"{run.folder / merge.FOLDS} holds other folds than there are now: --name another run, or --overwrite it"
        )
    known = {
        key: getattr(run.cfg, key)
        for key in ("model", "data", "epochs", "lr", "global_batch_size", "seed", "split_seed", "hours", "folds")
    }
    for number in range(cfg.folds):
        directories.take_in(run.folder, run.cfg, number)
    return {
        "argv": command.argv,
        "cfg": known | {"devices": cfg.devices, "strategy": cfg.strategy},
        "folder": str(run.folder),
        "rows": len(ids),
        "folds_file": str(file or run.folder / merge.FOLDS),
        "spec": run.data.spec,
        "metric": run.cfg.metric or run.data.metric_name or metrics.DEFAULTS[run.data.task],
        "skipped": cfg.bad_images == "skip",
        "fingerprint": run.data.fingerprint,
        "gpus": gpu_names(torch.cuda.device_count()) if apart and forecast.on_gpu(cfg) else [],
        **_forecast(run),
    }


def _forecast(run: Run) -> dict[str, float]:
    """Seconds of the training steps of one fold, by the speed measured now."""
    cfg, world = run.cfg, forecast.world_size(run.cfg)
    micro = cfg.global_batch_size // world // run.data.accumulation(world)
    speed = forecast.images_per_second(run.model, cfg, micro if forecast.on_gpu(cfg) else min(micro, 8))
    together = world if forecast.on_gpu(cfg) else cfg.num_nodes
    steps = cfg.epochs * run.data.steps_per_epoch
    return {"speed": speed, "steps": steps, "forecast_seconds": steps * cfg.global_batch_size / (speed * together)}


def conclude(known: dict[str, Any], places: dict[int, Path], seconds: list[float], *, whole: bool) -> None:
    """Merge the finished folds, write result.json, print the result. Raises ValueError or OSError."""
    folder, cfg = Path(known["folder"]), known["cfg"]
    results = [run_directory.result(place) for place in places.values()]
    merged = merge.merge(folder, places, known["spec"], known["metric"], skipped=known["skipped"])
    values = {
        "model": cfg["model"],
        "data": cfg["data"],
        "params": results[0].get("params"),
        "gmacs": results[0].get("gmacs"),
        "best": merged["overall"],
        **merged,
        "folds": cfg["folds"],
        "folds_finished": len(places),
        "epochs": cfg["epochs"],
        "lr": cfg["lr"],
        "global_batch_size": cfg["global_batch_size"],
        "train_seconds": round(sum(_values(results, "train_seconds")), 2),
        "seconds_per_epoch": _mean(results, "seconds_per_epoch", 3),
        "images_per_sec": _mean(results, "images_per_sec", 1),
        "peak_memory_mb": max(_values(results, "peak_memory_mb"), default=None),
        "fold_seconds": [round(each, 1) for each in seconds],
        "seed": cfg["seed"],
        "split_seed": cfg["split_seed"],
        "commit": run_directory.commit(),
        "version": run_directory.version(),
        "data_fingerprint": known["fingerprint"],
        "finished": whole and len(places) == cfg["folds"],
    }
    run_directory.write_result(folder, values)
    data = None
    with warn_on_error("the pictures of report.html"):
        data = decide.listed(read([*known["argv"]]))
    with warn_on_error("report.html"):
        run_page.make(folder, known["spec"], "finished" if whole else "preempted", data=data)

    def shown(value: float) -> str:
        return format_value(merged["metric"], value)

    scores = [shown(each) for each in merged["fold_scores"] if each is not None]
    print(
        f"{merged['metric']} {shown(merged['overall'])} over {merged['oof_rows']:,} rows, 95 % interval "
        f"{shown(merged['ci_low'])} to "
        f"{shown(merged['ci_high'])} ({merged['n_boot']} resamples of the rows); of each fold {', '.join(scores)}"
    )
    if len(places) < cfg["folds"]:
        print(
            f"this is of {len(places)} of {cfg['folds']} folds ({', '.join(map(str, places))}): the run is not "
            f"finished, the same command goes on"
        )
    print(
        f"{folder / merge.OOF}"
        + f", {folder / merge.PREDICTIONS} ({merged['test_rows']:,} rows, the mean of {len(places)} folds)"
        * bool(merged["test_rows"])
        + f"; result in {folder / run_directory.RESULT}",
        flush=True,
    )
    if merged["test_rows"] and len(places) == cfg["folds"]:
        print(f"next: {invocation('submit')} {folder}", flush=True)
    trackers.over_folds(folder, values)


def _values(results: list[dict[str, Any]], key: str) -> list[float]:
    return [each[key] for each in results if each.get(key) is not None]


def _mean(results: list[dict[str, Any]], key: str, digits: int) -> float | None:
    found = _values(results, key)
    return round(float(np.mean(found)), digits) if found else None
