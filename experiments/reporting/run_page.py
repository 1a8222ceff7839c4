"""report.html: a run on one page. It is written before the first step with the images that the network is about to
see, again now and then and at the end, always from the files of the run directory; those images are kept from the page
before."""

import json
import os
from dataclasses import fields
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from datamodules.base import PictureData
from datamodules.loading.files import write_text
from experiments.config import Config, plain
from experiments.reporting import drawing, page
from experiments.reporting import scored as scored_numbers
from experiments.reporting.page import number
from experiments.running import run_directory
from experiments.running.build import Run
from lightning_modules.callbacks.first_images import FirstImages
from lightning_modules.callbacks.signals import INTERRUPTED, PREEMPTED
from lightning_modules.loggers.formats import format_duration, in_percent
from lightning_modules.loggers.history import read_history
from lightning_modules.loggers.messages import warn_on_error
from models import cost
from models.spec import Spec

PAGE = "report.html"
KEPT = "<!-- seen -->", "<!-- end of seen -->"
STATES = {PREEMPTED: "preempted", INTERRUPTED: "stopped"}  # by exit code; any other is a failure
COLOURS = {"train": "train", "val": "raw", "val_ema": "ema"}  # of a stage's lines
PERFORMANCE = ("images_per_sec", "data_wait_share", "step_seconds", "tflops_per_device", "mfu")
CHARTED = {"epoch", "step", "train/loss", "val/loss", "val_ema/loss", *(f"perf/{name}" for name in PERFORMANCE[:3])}
MOST_EPOCHS = 40  # in the table
SHORT = 6  # letters of a class name that fits over a column of the matrix
Rows = list[dict[str, float]]


def write(run: Run, state: str, seen: FirstImages | None = None) -> None:
    """The page of a run as it stands. Never raises: what goes wrong is a warning."""
    with warn_on_error(PAGE):
        make(run.folder, run.data.spec, state, data=run.data, params=cost.parameters(run.model), seen=seen)


def refresh(run: Run) -> None:
    """Write the page of a finished run that ended before it could."""
    with warn_on_error(PAGE):
        page = run.folder / PAGE
        if not page.is_file() or page.stat().st_mtime < (run.folder / run_directory.RESULT).stat().st_mtime:
            write(run, "finished")


def make(
    folder: Path,
    spec: Spec,
    state: str,
    *,
    data: PictureData | None = None,
    params: int | None = None,
    seen: FirstImages | None = None,
) -> None:
    """Write `folder`/report.html, whole or not at all.

    Args:
        spec: of the data, as in a checkpoint. state: `training`, `finished`, `failed`, `preempted`, `stopped` (Ctrl-C).
        data: for the pictures of the worst errors and the names of those seen; without it there are none.
        seen: the first pictures. Those of an earlier page are kept, unless these are from before the first step.
    """
    written = folder / run_directory.RESULT
    result = json.loads(written.read_text()) if written.is_file() else {}
    config, rows = run_directory.stored(folder), read_history(folder / "metrics.csv")
    not_finite = result.get("not_finite")
    result = {} if not_finite else result
    kept = _kept(folder / PAGE)
    if seen is not None and (seen.step == 0 or not kept):
        kept = page.render("seen.html", **_seen(seen, spec, data))
    scored = scored_numbers.read(folder, spec, _split(result)) if result else None
    made = page.render(
        "run.html",
        title=folder.name,
        state=state,
        not_finite=not_finite,
        facts=_facts(config, result, rows, params),
        best=_best(result),
        folds=_folds(result),
        curves=_curves(rows, result),
        time=_time(rows, config),
        others=_others(rows),
        marks=[Markup(mark) for mark in KEPT],
        kept=Markup(kept),
        scored=_scored(scored, data) if scored else None,
        config=_config(config),
    )
    write_text(folder / PAGE, made)


def _split(result: dict[str, Any]) -> str:
    """What predictions.csv is of: labelled test, else val; "" where the result does not say."""
    return next((name for name in ("test", "val") if any(key.startswith(f"{name}/") for key in result)), "")


def _kept(page: Path) -> str:
    """The section of first images of an earlier page as HTML; '' for none. No name can hold the marks: its < is
    escaped."""
    before = page.read_text() if page.is_file() else ""
    start, end = before.find(KEPT[0]), before.find(KEPT[1])
    return before[start + len(KEPT[0]) : end] if 0 <= start < end else ""


def opened(data: PictureData | None, ids: list[str]) -> list[Image.Image | None]:
    """The images of these ids of test or val, or of another fold's rows; None for one that is missing or cannot be
    read."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in ("test", "val", "train"):
        if data is None or name not in data.splits or name == "train" and data.splits[name].ids is None:
            continue  # names of files may be those of val too, ids of a table are not
        split, wanted = data.splits[name], {*ids} - found.keys()
        known = [os.fsdecode(each) for each in split.names] if split.ids is None else map(str, split.ids)
        found |= {identity: (split, split.names[row]) for row, identity in enumerate(known) if identity in wanted}
    pictures: list[Image.Image | None] = []
    for identity in ids:
        try:
            split, name = found[identity]
            pictures.append(split.open(name))
        except Exception:  # a picture that is gone costs its place on the page, no more
            pictures.append(None)
    return pictures


@cache
def _commit() -> str | None:
    return run_directory.commit()


def _facts(config: dict[str, Any], result: dict[str, Any], rows: Rows, params: int | None) -> list[tuple[str, str]]:
    """(name, value) of the list at the head; what is not known is left out."""
    last = rows[-1] if rows else {}
    facts: list[tuple[str, Any]] = [
        ("model", result.get("model", config.get("model"))),
        ("data", result.get("data", config.get("data"))),
    ]
    facts += [
        (key, number(value, in_percent(key)))
        for key, value in result.items()
        if key.split("/")[0] in ("val", "val_ema", "test")
        and key != result.get("metric")
        and isinstance(value, int | float)
    ]
    seconds = result.get("train_seconds")
    duration = Markup('<data value="{}">{}</data>').format(seconds, format_duration(seconds)) if seconds else "-"
    facts += [
        ("parameters", number(result.get("params", params))),
        ("GMACs", number(result.get("gmacs"))),
        ("images/s", number(result.get("images_per_sec", last.get("perf/images_per_sec")))),
        ("time of training", duration),
        ("steps", number(result.get("steps", last.get("step")))),
        ("epochs", number(result.get("epochs", config.get("epochs")))),
        ("seed", number(result.get("seed", config.get("seed")))),
        ("processes", number(result.get("world_size"))),
        ("peak memory, MB", number(result.get("peak_memory_mb"))),
        ("commit", (result.get("commit") if result else _commit()) or "-"),
        ("written", datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")),
    ]
    return [(name, value) for name, value in facts if value != "-"]


def _best(result: dict[str, Any]) -> dict[str, Any] | None:
    """The metric that the run is judged by, and in which epoch it was best."""
    if not (metric := result.get("metric")):
        return None
    value = result["overall"] if result.get("overall") is not None else result.get("best")
    epoch = None if result.get("best_epoch") is None else result["best_epoch"] + 1
    return {"name": metric, "value": number(value, in_percent(metric)), "epoch": epoch, "epochs": result.get("epochs")}


def _points(rows: Rows, column: str) -> drawing.Points:
    return [(row["step"], row[column]) for row in rows if column in row]


def _drawn(*found: drawing.Drawing | None) -> list[drawing.Drawing]:
    return [each for each in found if each]


def _watched(rows: Rows, result: dict[str, Any]) -> str:
    """The metric's name without its stage: the result's, or of an unfinished run the first that is not a loss."""
    columns = dict.fromkeys(column for row in rows for column in row if column.startswith(("val/", "val_ema/")))
    first = next((column for column in columns if not column.endswith("/loss")), "val/loss")
    return str(result.get("metric") or first).split("/")[-1]


def _curves(rows: Rows, result: dict[str, Any]) -> dict[str, Any]:
    """Drawings of metric, loss and learning rate, and at most 40 epochs as a table."""
    metric = _watched(rows, result)
    best = next((row["step"] for row in reversed(rows) if row["epoch"] == result.get("best_epoch")), None)
    rates = sorted({column for row in rows for column in row if column == "lr" or column.startswith("lr/")})[:8]
    drawn = [
        drawing.curves(
            name,
            {f"{stage}/{name}": (colour, _points(rows, f"{stage}/{name}")) for stage, colour in COLOURS.items()},
            percent=in_percent(name),
            mark=best,
        )
        for name in dict.fromkeys([metric, "loss"])
    ]
    lines = {rate: ("train" if k else "raw", _points(rows, rate)) for k, rate in enumerate(rates)}
    drawn.append(drawing.curves("learning rate", lines))
    ends = [row for row in rows if any(column.startswith("val") for column in row)] or rows
    picked = sorted({*np.linspace(0, len(ends) - 1, min(len(ends), MOST_EPOCHS)).round().astype(int)})
    wanted = dict.fromkeys(["epoch", "step", f"val/{metric}", f"val_ema/{metric}", "val/loss", "train/loss", "lr"])
    columns = [column for column in wanted if any(column in row for row in ends)]
    people = [{**ends[k], "epoch": ends[k]["epoch"] + 1} if "epoch" in ends[k] else ends[k] for k in picked]
    return {
        "drawings": _drawn(*drawn),
        "columns": columns,
        "rows": [[number(row.get(column), in_percent(column)) for column in columns] for row in people],
        "epochs": len(ends) if len(picked) < len(ends) else None,
    }


def _time(rows: Rows, config: dict[str, Any]) -> dict[str, Any] | None:
    """Where the time of a step goes, as far as the run has measured it."""
    columns = {name: _points(rows, f"perf/{name}") for name in PERFORMANCE}
    if not (speeds := columns["images_per_sec"]):
        return None

    def middle(points: drawing.Points) -> float:
        return float(np.median([value for _, value in points]))

    batch, waits, steps = config.get("global_batch_size"), columns["data_wait_share"], columns["step_seconds"]
    step = middle(steps) if steps else batch / middle(speeds) if batch and middle(speeds) else None
    share = float(np.mean([wait for _, wait in waits])) if waits else None
    facts = [("images/s, median of the rows", number(middle(speeds))), ("seconds a step", number(step))]
    if points := columns["tflops_per_device"]:
        facts.append(("10¹² operations/s a device", number(middle(points))))
    if points := columns["mfu"]:
        facts.append(("of its peak (MFU)", number(middle(points), True)))
    return {
        "facts": [*facts, ("of it waiting for data", number(share, True))],
        "share": share,
        "drawings": _drawn(
            drawing.curves("images/s, all devices", {"perf/images_per_sec": ("raw", speeds)}),
            drawing.curves("waiting for data, share of a step", {"perf/data_wait_share": ("ema", waits)}, percent=True),
            drawing.curves("seconds a step", {"perf/step_seconds": ("raw", steps)}),
        ),
    }


def _others(rows: Rows) -> list[drawing.Drawing]:
    """Every other column of the history, a chart each, train and val of one name together; at most 16."""
    watched = _watched(rows, {})
    found: dict[str, dict[str, tuple[str, drawing.Points]]] = {}
    for column in dict.fromkeys(column for row in rows for column in row):
        stage, _, name = column.rpartition("/")
        if column in CHARTED or column.split("/")[0] == "lr" or stage in COLOURS and name == watched:
            continue
        line = COLOURS.get(stage, "raw"), _points(rows, column)
        found.setdefault(name if stage in COLOURS else column, {})[column] = line
    drawn = (drawing.curves(name, lines, percent=in_percent(name)) for name, lines in list(found.items())[:16])
    return _drawn(*drawn)


def _seen(seen: FirstImages, spec: Spec, data: PictureData | None) -> dict[str, Any]:
    names = data.splits["train"].names if data is not None else None
    words = [os.fsdecode(names[row]) if names is not None else f"row {row}" for row in seen.index]
    rows = [
        {"id": word, "image": Image.fromarray(image), "target": _target(target, spec)}
        for word, image, target in zip(words, seen.image, seen.target)
    ]
    return {"rows": rows, "step": seen.step, "height": seen.image.shape[1], "width": seen.image.shape[2]}


def _target(target: np.ndarray, spec: Spec) -> list[tuple[str, str]]:
    """(name, value) of what a target says: the class, the shares of a mixed one (above 5 %, three at most), the labels,
    or the values."""
    names = scored_numbers.output_names(spec)
    if spec["task"] == "regression":
        values = list(zip(names, np.atleast_1d(target)))[:4]
        return [(name if len(names) > 1 else "", number(float(value))) for name, value in values]
    if np.ndim(target) == 0:
        return [(names[int(target)], "")]
    most = 3 if spec["task"] == "classification" else 6
    heaviest = [k for k in np.argsort(-target, kind="stable")[:most] if target[k] > 0.05]
    return [(names[k], "" if target[k] == 1 else number(float(target[k]), True)) for k in heaviest] or [("none", "")]


def _folds(result: dict[str, Any]) -> dict[str, Any] | None:
    """The score of each fold, the score over all rows and its interval."""
    scores, metric = result.get("fold_scores"), str(result.get("metric", ""))
    if not scores:
        return None
    low, high, overall = (result.get(key) for key in ("ci_low", "ci_high", "overall"))
    return {
        "metric": metric,
        "scores": scores,
        "overall": overall,
        "low": low,
        "high": high,
        "percent": in_percent(metric),
        "drawings": _drawn(drawing.dots("each fold and all rows", scores, overall, low, high, in_percent(metric))),
    }


def _scored(scored: scored_numbers.Scored, data: PictureData | None) -> dict[str, Any]:
    """The numbers on the scored split, with the images of the worst rows and the drawings."""
    found = scored_numbers.summary(scored)
    images = opened(data, [row["id"] for row in found["worst"]])
    found["worst"] = [{**row, "image": image} for row, image in zip(found["worst"], images)]
    if calibration := found.get("calibration"):
        names = ("probability of a label", "there") if scored.task == "multilabel" else ("confidence", "right")
        counts, mean, share = calibration["bins"]
        calibration |= {"names": names, "drawing": drawing.reliability(counts, mean, share, names)}
    for target in found.get("targets", ()):
        ranges = [
            (each["q10"], each["mean"], each["q90"], "true {low:g} to {high:g}: mean {mean:.4g}".format(**each))
            for each in target["deciles"]
        ]
        target["drawings"] = [
            drawing.scatter("Predicted against true", target["true"], target["predicted"]),
            drawing.ranges("Residual by tenths of the true value", ranges, "tenth"),
        ]
    about = {"task": scored.task, "file": scored.file, "rows": len(scored.ids), "dropped": scored.dropped}
    return {**found, **about, "names": scored.names, "short": max(map(len, scored.names)) <= SHORT}


def _config(config: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(knob, value, default) of each knob that is not at its default, whether by recipe, command line or data."""
    usual = plain(Config())
    apart = [key.name for key in fields(Config) if key.name in config and config[key.name] != usual[key.name]]
    return [(name, _spelled(config[name]), _spelled(usual[name])) for name in apart]


def _spelled(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
