"""The plan of a run, how it ends, and its result on screen and in result.json."""

import math
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import lightning as L
import torch

import models
from datamodules.loading.decode import PictureError
from experiments.cli import early
from experiments.config import Config
from experiments.reporting import media, run_page
from experiments.running import forecast, memory, objects, run_directory, trackers
from experiments.running.build import Run
from lightning_modules.callbacks.averaging import Averaging
from lightning_modules.callbacks.checkpoints import LastCheckpoint
from lightning_modules.callbacks.ema import uses_ema
from lightning_modules.callbacks.finite import NotFinite
from lightning_modules.callbacks.meter import Meter, peak_memory_mb
from lightning_modules.callbacks.preemption import Preempted, disarm_launcher
from lightning_modules.callbacks.signals import PREEMPTED, notice
from lightning_modules.loggers.csv_logger import History
from lightning_modules.loggers.formats import format_duration, format_metric
from lightning_modules.objectives.metrics import MetricError
from models import cost, pretrained

KNOBS = {  # rows of the plan: how the network learns
    "optimizer": "optimizer optimizer_args schedule schedule_args warmup_epochs warmup_steps warmup_lr min_lr "
    "weight_decay layer_decay head_lr_scale clip_grad clip_mode freeze",
    "pictures": "crop_scale hflip rand_augment random_erasing repeated_augment mixup cutmix augment_args train_size",
    "loss": "loss loss_args label_smoothing metric teacher distill distill_args",
}
LOST_RANK = re.compile(
    "closed by peer|reset by peer|Broken pipe|connectFullMesh|Socket Timeout|Timed out waiting|NCCL.*remote process"
)


def dry_run(run: Run) -> int:
    """Print what the run would do, what it needs and how long it may take."""
    print(forecast.table([*_plan(run), ("run directory", f"{run.folder} ({_state(run)})")]))
    return 0


def _plan(run: Run) -> list[tuple[str, str]]:
    cfg, data, sizes, world = run.cfg, run.data, run.data.sizes, forecast.world_size(run.cfg)
    if cfg.eval_only:
        split = "test" if sizes["test"] else "val"
        return [("model", f"{cfg.model}, weights of {cfg.init}"), ("scores", f"{sizes[split]:,} pictures of {split}")]
    with torch.device("meta"):
        meta = models.create(cfg.model, data.spec["num_outputs"], cfg.size, **cfg.model_args)
    passes, steps = data.accumulation(world), cfg.epochs * data.steps_per_epoch
    micro = cfg.global_batch_size // world // passes
    batch = f"{cfg.num_nodes} nodes x {cfg.devices} devices x {passes} passes x {micro} pictures"
    fixed, each, free = (
        value / 2**30
        for value in (*memory.needed(meta, cfg, run.teacher), memory.free_bytes(cfg, assumed=bool(run.assumed)))
    )
    parts = f"(weights, gradients, moments, copies {fixed:.2f}; {micro} pictures {micro * each:.2f})"
    learning = f"peak lr {cfg.lr:g}, precision {cfg.precision}"
    parameters, gmacs = cost.parameters(run.model), objects.gmacs(cfg, data.spec)
    splits = ", ".join(f"{split} {sizes[split]:,}" for split in ("train", "val", "test"))
    return [
        *(("assumed", line) for line in run.assumed),
        ("model", f"{cfg.model}, {parameters:,} parameters, {gmacs:.2f} GMACs at {cfg.image_size}"),
        ("data", f"{cfg.data}, {splits}, {_targets(data.spec)}"),
        ("batch", f"{cfg.global_batch_size} = {batch}"),
        ("steps", f"{steps:,} = {cfg.epochs} epochs x {data.steps_per_epoch:,}, {learning}"),
        *((name, _knobs(cfg, keys)) for name, keys in KNOBS.items()),
        ("weights", _knobs(cfg, "init model_args ema_decay use_ema average_checkpoints") or "from scratch"),
        ("memory", f"about {fixed + micro * each:.2f} GB a device {parts}; {free:.2f} GB free"),
        ("time", _time(run, micro, steps)),
    ]


def _time(run: Run, micro: int, steps: int) -> str:
    """A forecast, from a speed measured where the run would be."""
    cfg, on_gpu = run.cfg, forecast.on_gpu(run.cfg)
    if forecast.lacks_gpus(cfg) and not on_gpu:
        return "not measured: none of its devices is here"
    speed = forecast.images_per_second(run.model, cfg, micro if on_gpu else min(micro, 8))
    seconds = steps * cfg.global_batch_size / (speed * (forecast.world_size(cfg) if on_gpu else cfg.num_nodes))
    measured = f"at {speed:.1f} images/s measured now on one device without data loading"
    return f"about {format_duration(seconds)} of training steps, {measured}"


def _targets(spec: dict[str, Any]) -> str:
    if spec["task"] != "regression":
        return f"{spec['num_outputs']} {'classes' if spec['task'] == 'classification' else 'labels'}"
    return ", ".join(
        f"{name} {low:.15g} to {high:.15g}" for name, (low, high) in zip(spec["target_names"], spec["target_range"])
    )


def _knobs(cfg: Config, keys: str) -> str:
    """Knobs and their values, without those that are off."""
    values = {key: getattr(cfg, key, None) for key in keys.split()}
    return ", ".join(f"{key} {value}" for key, value in values.items() if value not in (None, False, 0, {}, "none"))


def _state(run: Run) -> str:
    if run.finished:
        return "already finished"
    if run.cfg.overwrite:
        return "would be deleted and started again" if run.folder.exists() else "new"
    start = run_directory.resume_point(run.folder, run.cfg)
    return f"would resume from {start.file}" if start else "new"


def finished(run: Run) -> int:
    """Say that there is nothing left to do, and the result."""
    early.print_finished(run.folder)
    run_page.refresh(run)
    trackers.tell_agent(run)
    return 0


@contextmanager
def ending(run: Run, trainer: L.Trainer) -> Iterator[None]:
    """Close the tracker with the right state however the run ends. An image that cannot be read ends it with one line
    and exit 1; of several ranks all leave at once, so that none waits in a collective for another."""
    code = 1
    try:
        if trainer.is_global_zero:
            print(f"run directory {run.folder}" + (f", resumed from {run.resume}" if run.resume else ""), flush=True)
            run_directory.write_skipped(run.folder, getattr(run.data, "skipped", None))
        yield
        code = 0
    except Preempted as asked:
        code = asked.code
        raise
    except PictureError as error:
        lines = [line for line in str(error).splitlines() if "cannot read picture" in line]
        line = lines[-1][lines[-1].find("cannot read picture") :]  # after a worker's own traceback
        hint = "--bad_images skip leaves out what cannot be read, an empty file too: the same command with it goes on"
        _exit(f"{line} ({hint})" if hasattr(run.data, "listed") else line)
    except BrokenPipeError as error:
        _exit(f"nobody reads the output any more ({error}); the same command goes on")
    except MetricError as error:
        saved = f"The training is saved up to step {trainer.global_step}, the scores of its epoch are not"
        _stop(trainer, f"{error}. {saved}: mend the function, and the same command goes on")
    except NotFinite as error:
        _not_finite(error, run, trainer)
        raise SystemExit(1) from None
    except Exception as error:
        code = PREEMPTED if notice.asked > 1 else 1
        if trainer.world_size == 1 and code == 1:
            raise
        _print_error(error, trainer)
        raise SystemExit(code) from None
    finally:
        disarm_launcher(trainer)
        if code and trainer.is_global_zero:
            run_page.write(run, run_page.STATES.get(code, "failed"))
        trackers.close(trainer, code)
        if code == PREEMPTED or code and trainer.world_size > 1:
            sys.stdout.flush()
            os._exit(code)  # leaving in good order would wait for ranks that are gone, or for a tracker's network


def _exit(line: str) -> NoReturn:
    print(f"run.py: {line}", file=sys.stderr, flush=True)
    raise SystemExit(1) from None


def _stop(trainer: L.Trainer, line: str) -> NoReturn:
    """As `_exit`, the line from rank 0 alone."""
    if trainer.is_global_zero:
        _exit(line)
    raise SystemExit(1) from None


def _not_finite(error: NotFinite, run: Run, trainer: L.Trainer) -> None:
    """One sentence: what was not finite, what to try, which sound weights there are; also in result.json, which says
    that it has not finished."""
    if not trainer.is_global_zero:
        return
    cfg, kept, line = run.cfg, [], f"{error}. "
    if trainer.state.fn == "fit":
        tries = [
            f"a lower --lr ({cfg.lr / 10:g})",
            *["--clip_grad 1"] * (cfg.clip_grad is None),
            "a longer --warmup_epochs",
            *["--precision 32-true"] * (cfg.precision != "32-true"),
        ]
        line += f"Try {', '.join(tries[:-1])} or {tries[-1]}, with --name for a new run or --overwrite. "
    else:
        line += f"{'Try --precision 32-true' if cfg.precision != '32-true' else 'The weights are too large'}. "
    for name in ("best.ckpt", *pretrained.LAST):
        with suppress(ValueError, OSError):
            file = run.folder / "checkpoints" / name
            kept += [f"{file} (step {pretrained.read_checkpoint(file, mapped=True)['global_step']})"] * file.is_file()
    line += f"Sound weights are kept: {', '.join(kept)}" if kept else "No weights had been saved yet"
    run_directory.write_result(
        run.folder, {"model": cfg.model, "data": cfg.data, "seed": cfg.seed, "finished": False, "not_finite": line}
    )
    print(f"run.py: {line}", file=sys.stderr, flush=True)


def _print_error(error: Exception, trainer: L.Trainer) -> None:
    """Print the traceback of the rank that failed; one line for those that have only lost it."""
    words = f":\n{''.join(traceback.format_exception(error))}"
    if LOST_RANK.search(str(error)):
        words = f": another rank has left, its own words tell why ({str(error).splitlines()[0][:150]})"
    print(f"rank {trainer.global_rank}{words}", file=sys.stderr, flush=True)


def result(run: Run, task: L.LightningModule, trainer: L.Trainer) -> None:
    """Score what is to be scored, write result.json, print the result. A run is not finished without its last step on
    disk: exit 1, and the same command resumes from the last step that is."""
    saving, again = trainer.strategy.checkpoint_io, "run the same command again"
    if any(callback.unsaved for callback in trainer.callbacks if isinstance(callback, LastCheckpoint)):
        room = f"Make room or give the right to write, and {again}: it goes on from the last step that was saved"
        _stop(trainer, f"the last step is not saved, {saving.error}. {room}")
    scores = _evaluate(run, task, trainer)
    if not trainer.is_global_zero:
        return
    cfg, steps = run.cfg, trainer.global_step
    values: dict[str, Any] = {
        "model": cfg.model,
        "data": cfg.data,
        "params": cost.parameters(task.model),
        "gmacs": round(objects.gmacs(run.cfg, run.data.spec), 4),
        **scores,
        "epochs": 0 if cfg.eval_only else cfg.epochs,
        "steps": steps,
        "lr": cfg.lr,
        "global_batch_size": cfg.global_batch_size,
        **_timing(run, trainer),
        "peak_memory_mb": round(peak_memory_mb(trainer.strategy.root_device)),
        "world_size": trainer.world_size,
        "seed": cfg.seed,
        "commit": run_directory.commit(),
        "version": run_directory.version(),
        "data_fingerprint": run.data.fingerprint,
        "failed_saves": saving.failures,
        "skipped_images": len(getattr(run.data, "skipped", ())),
        "asked": run.asked,
        "finished": True,
    }
    file = run.folder / run_directory.RESULT
    try:
        run_directory.write_result(run.folder, values)
    except OSError as error:
        why = error.strerror or error
        _stop(trainer, f"{file} cannot be written: {why}. The training is saved; the same command again scores it")
    for callback in trainer.callbacks:
        if isinstance(callback, Averaging):
            callback.clear()
    trackers.conclude(run, trainer, values)
    ends = ("/acc1", "/acc5", f"/{task.metric.name}")
    scored = {key: value for key, value in values.items() if value is not None and key.endswith(ends)}
    line = ", ".join(format_metric(key, value) for key, value in scored.items())
    if steps:
        duration = format_duration(values["train_seconds"])
        line += f" after {duration} of training at {values['images_per_sec']:.0f} images/s"
    kept = f"result in {file}, a page on it in report.html beside it"
    if cfg.fast_dev_run:
        sizes = f"{run.data.sizes['val']} pictures of val and {run.data.sizes['test']} of test"
        kept = f"fast_dev_run: {steps} steps, {sizes}; nothing is kept"
    print(f"{line}\n{kept}")
    if saving.failures:
        why = "the warnings say which and why"
        print(f"{saving.failures} saves of checkpoints failed on the way ({why}); the last step is saved")
    run_page.write(run, "finished")
    media.log(run, task, trainer)


def _evaluate(run: Run, task: L.LightningModule, trainer: L.Trainer) -> dict[str, Any]:
    """`val/*` of the best checkpoint (read from the history), `test/*` where there is a labelled test split, and which
    epoch was best. With averaged checkpoints `val/*` and `test/*` are theirs, and `best` stays that of the epoch. With
    these weights a table's val is predicted into oof.csv, and into predictions.csv what has no labels, else test, else
    val."""
    sizes = run.data.sizes
    if run.cfg.eval_only:
        stage = "test" if sizes["test"] else "val"
        (trainer.test if sizes["test"] else trainer.validate)(task, run.data, verbose=False)
        scores = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith(stage)}
        for logger in trainer.loggers:
            logger.log_metrics({"epoch": 0, **scores}, step=0)
        metric = f"{stage}/{task.metric.name}"
        return {"metric": metric, "best": scores[metric], "best_epoch": None, "stopped_epoch": None, **scores}
    averaged, state, epoch = _averaged(task, trainer), None, -1
    of_table, predicted = bool(run.data.spec["id_column"]), "predict" in run.data.splits
    if sizes["val"] or sizes["test"] or predicted:
        file = pretrained.checkpoint_in(run.folder, pretrained.FILES[1:])
        checkpoint = pretrained.read_checkpoint(file)
        try:
            state, epoch = (
                pretrained.network_state(checkpoint, uses_ema(run.cfg.ema_decay, run.cfg.use_ema), file),
                checkpoint["epoch"],
            )
        except ValueError as error:
            _stop(trainer, str(error))
    rows = next(logger.rows for logger in trainer.loggers if isinstance(logger, History))
    best = next((row for row in reversed(rows) if row["epoch"] <= epoch and task.monitor in row), {})
    scores = {
        "metric": task.monitor,
        "best": best.get(task.monitor),
        "best_epoch": int(best["epoch"]) if math.isfinite(best.get(task.monitor, math.nan)) else None,
        "stopped_epoch": trainer.current_epoch - 1,
    }
    if averaged:
        state, scores["averaged_epochs"] = (
            pretrained.network_state(averaged, None, file),
            " ".join(map(str, averaged["averaged_epochs"])),
        )
    else:
        scores |= {key: value for key, value in best.items() if key.startswith("val")}
    if state is not None:
        task.model.load_state_dict(state)
    for split, score, wanted in (
        ("val", trainer.validate, averaged or of_table or not sizes["test"]),
        ("test", trainer.test, True),
    ):
        if wanted and sizes[split]:
            score(task, run.data, verbose=False)
            if split == "test" or averaged:
                scores |= {
                    key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith(split)
                }
    if predicted:
        trainer.predict(task, datamodule=run.data, return_predictions=False)
    return scores


def _averaged(task: L.LightningModule, trainer: L.Trainer) -> dict[str, Any] | None:
    """The checkpoint averaged over several epochs, where the run makes one. Exit 1 when the disk does not take it, or a
    file is damaged."""
    try:
        return next(
            (callback.finish(trainer, task) for callback in trainer.callbacks if isinstance(callback, Averaging)), None
        )
    except (OSError, ValueError) as error:
        room = "Make room, or delete a damaged file (the others are averaged), and run the same command again"
        _stop(trainer, f"the weights are not averaged: {error}. {room}")


def _timing(run: Run, trainer: L.Trainer) -> dict[str, float | None]:
    seconds = next(callback.train_seconds for callback in trainer.callbacks if isinstance(callback, Meter))
    steps = trainer.global_step
    if not steps:
        return {"train_seconds": 0.0, "seconds_per_epoch": None, "images_per_sec": None}
    return {
        "train_seconds": round(seconds, 2),
        "seconds_per_epoch": round(seconds * run.data.steps_per_epoch / steps, 3),
        "images_per_sec": round(steps * run.cfg.global_batch_size / max(seconds, 1e-9), 1),
    }
