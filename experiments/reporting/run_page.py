"""report.html: a run on one page, in one file, without network or script. It is written before the first step with the
pictures the network is about to see, again now and then and at the end, always from what lies in the run's directory;
the pictures are kept from the page before."""

import json
import os
from contextlib import suppress
from dataclasses import fields
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from PIL import Image

from experiments.config import Config, plain
from experiments.reporting import charts
from experiments.reporting import scored as scored_page
from experiments.reporting.charts import number, section, text
from experiments.reporting.style import STYLE
from experiments.running import run_directory
from experiments.running.build import Run
from lightning_modules.callbacks.first_images import Glimpse, spared
from lightning_modules.callbacks.meter import clock
from lightning_modules.callbacks.signals import INTERRUPTED, PREEMPTED
from lightning_modules.loggers.csv_logger import read_history
from models import cost

PAGE = "report.html"
KEPT = "<!-- seen -->", "<!-- end of seen -->"
STATES = {PREEMPTED: "preempted", INTERRUPTED: "stopped"}  # by exit code; any other is a failure
NEUTRAL = ("epoch", "step")
COLOURS = {"train": "train", "val": "raw", "val_ema": "ema"}
Rows = list[dict[str, float]]


def write(run: Run, state: str, seen: Glimpse | None = None) -> None:
    """The page of a run as it stands. Never raises: what goes wrong is a warning."""
    with spared(PAGE):
        make(run.folder, run.data.spec, state, data=run.data, params=cost.parameters(run.model), seen=seen)


def refresh(run: Run) -> None:
    """Write the page of a finished run that ended before it could."""
    with spared(PAGE):
        page = run.folder / PAGE
        if not page.is_file() or page.stat().st_mtime < (run.folder / run_directory.RESULT).stat().st_mtime:
            write(run, "finished")


def make(
    folder: Path,
    spec: dict[str, Any],
    state: str,
    *,
    data: L.LightningDataModule | None = None,
    params: int | None = None,
    seen: Glimpse | None = None,
) -> None:
    """Write `folder`/report.html, whole or not at all.

    Args:
        spec: of the data, as in a checkpoint. state: `training`, `finished`, `failed`, `preempted`, `stopped` (Ctrl-C).
        data: for the pictures of the worst errors and the names of those seen; without it there are none.
        seen: the first pictures. Those of an earlier page are kept, unless these are from before the first step.
    """
    result = (
        json.loads((folder / run_directory.RESULT).read_text()) if (folder / run_directory.RESULT).is_file() else {}
    )
    config, rows = run_directory.stored(folder), read_history(folder / "metrics.csv")
    ended = f"<p>{text(result['not_finite'], 1000)}</p>\n" if "not_finite" in result else ""
    result = {} if ended else result
    kept = _kept(folder / PAGE)
    if seen is not None and (seen.step == 0 or not kept):
        kept = _seen(seen, spec, data)
    scored = scored_page.read(folder, spec, _split(result)) if result else None
    body = [
        _header(folder, state, config, result, rows, params),
        ended,
        _folds(result),
        _curves(rows, result),
        _time(rows, result, config),
        _others(rows),
        f"{KEPT[0]}{kept}{KEPT[1]}\n",
        scored_page.sections(scored, lambda ids: opened(data, ids)) if scored else "",
        _config(config),
    ]
    name = text(folder.name, 200)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; style-src '
        f"'unsafe-inline'\">\n"
        f"<title>{name}</title><style>{STYLE}</style></head>\n<body>\n{''.join(body)}</body></html>\n"
    )
    try:
        run_directory.write_text(folder / PAGE, page.encode("ascii", "xmlcharrefreplace").decode())
    finally:
        with suppress(OSError):  # half a page, where the disk is full
            (folder / f".{PAGE}.partial").unlink(missing_ok=True)


def _split(result: dict[str, Any]) -> str:
    """What predictions.csv is of: labelled test, else val; "" where the result does not say."""
    return next((name for name in ("test", "val") if any(key.startswith(f"{name}/") for key in result)), "")


def _kept(page: Path) -> str:
    """The pictures of an earlier page, as they stand there; '' for none. Nothing a person has named can hold the marks:
    its < is escaped."""
    before = page.read_text() if page.is_file() else ""
    start, end = before.find(KEPT[0]), before.find(KEPT[1])
    return before[start + len(KEPT[0]) : end] if 0 <= start < end else ""


def opened(data: L.LightningDataModule | None, ids: list[str]) -> list[Image.Image | None]:
    """The pictures of these ids of test or val, or of another fold's rows; None for one that is not there or cannot be
    read."""
    found: dict[str, tuple[Any, bytes]] = {}
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


def _header(
    folder: Path, state: str, config: dict[str, Any], result: dict[str, Any], rows: Rows, params: int | None
) -> str:
    metric, last = result.get("metric"), rows[-1] if rows else {}
    facts: list[tuple[str, str]] = [
        ("model", text(result.get("model", config.get("model")))),
        ("data", text(result.get("data", config.get("data")))),
    ]
    if metric:
        best = result["overall"] if result.get("overall") is not None else result.get("best")
        epoch = (
            f" in epoch {number(result['best_epoch'] + 1)} of {number(result['epochs'])}"
            if result.get("best_epoch") is not None
            else ""
        )
        facts.append((f"best {text(metric)}", f"<b>{number(best, _percent(metric))}</b>{epoch}"))
    facts += [
        (text(key), number(value, _percent(key)))
        for key, value in result.items()
        if key.split("/")[0] in ("val", "val_ema", "test") and key != metric and isinstance(value, int | float)
    ]
    seconds, speed = result.get("train_seconds"), result.get("images_per_sec", last.get("perf/images_per_sec"))
    facts += [
        ("parameters", number(result.get("params", params))),
        ("GMACs", number(result.get("gmacs"))),
        ("images/s", number(speed)),
        ("time of training", f'<data value="{seconds}">{clock(seconds)}</data>' if seconds else "-"),
        ("steps", number(result.get("steps", last.get("step")))),
        ("epochs", number(result.get("epochs", config.get("epochs")))),
        ("seed", number(result.get("seed", config.get("seed")))),
        ("processes", number(result.get("world_size"))),
        ("peak memory, MB", number(result.get("peak_memory_mb"))),
        ("commit", text((result.get("commit") if result else _commit()) or "-")),
        ("written", datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")),
    ]
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>\n" for name, value in facts if value != "-")
    return (
        f'<header><h1>{text(folder.name, 200)} <span class="state {text(state)}" id="state">{text(state)}</span></h1>\n'
        f'<dl id="facts">\n{listed}</dl></header>\n'
    )


def _percent(name: str) -> bool:
    """Accuracies are fractions in files, percent for people."""
    return name.split("/")[-1].startswith("acc")


def _points(rows: Rows, column: str) -> charts.Points:
    return [(row["step"], row[column]) for row in rows if column in row]


def _watched(rows: Rows, result: dict[str, Any]) -> str:
    """The metric's name without its stage: the result's, or of an unfinished run the first that is not a loss."""
    columns = dict.fromkeys(column for row in rows for column in row if column.startswith(("val/", "val_ema/")))
    return str(
        result.get("metric") or next((column for column in columns if not column.endswith("/loss")), "val/loss")
    ).split("/")[-1]


def _curves(rows: Rows, result: dict[str, Any]) -> str:
    metric = _watched(rows, result)
    best = next((row["step"] for row in reversed(rows) if row["epoch"] == result.get("best_epoch")), None)
    parts = [
        charts.curves(
            title,
            {f"{stage}/{name}": (colour, _points(rows, f"{stage}/{name}")) for stage, colour in COLOURS.items()},
            percent=_percent(name),
            mark=best,
        )
        for title, name in ((metric, metric), ("loss", "loss"))[: 1 if metric == "loss" else 2]
    ]
    rates = sorted({column for row in rows for column in row if column == "lr" or column.startswith("lr/")})[:8]
    parts.append(
        charts.curves(
            "learning rate", {rate: ("train" if k else "raw", _points(rows, rate)) for k, rate in enumerate(rates)}
        )
    )
    ends = [row for row in rows if any(column.startswith("val") for column in row)] or rows
    picked = sorted({*np.linspace(0, len(ends) - 1, min(len(ends), 40)).round().astype(int)})
    columns = [
        column
        for column in dict.fromkeys(
            ["epoch", "step", f"val/{metric}", f"val_ema/{metric}", "val/loss", "train/loss", "lr"]
        )
        if any(column in row for row in ends)
    ]
    people = [{**ends[k], "epoch": ends[k]["epoch"] + 1} if "epoch" in ends[k] else ends[k] for k in picked]
    table = charts.table(
        list(map(text, columns)),
        [[number(row.get(column), _percent(column)) for column in columns] for row in people],
        "history",
    )
    some = f" (of {len(ends):,} epochs some)" if len(picked) < len(ends) else ""
    count = "<p>Epochs are counted from 1 on this page and on the terminal, from 0 in metrics.csv and result.json.</p>"
    numbers = f"<details><summary>As numbers{some}</summary>{table}</details>"
    return (
        section("curves", "Curves", f'<div class="charts">{"".join(parts)}</div>{count}{numbers}\n')
        if any(parts)
        else ""
    )


def _time(rows: Rows, result: dict[str, Any], config: dict[str, Any]) -> str:
    """Where the time of a step goes, as far as the run has measured it."""
    speeds, waits, steps = (
        _points(rows, f"perf/{name}") for name in ("images_per_sec", "data_wait_share", "step_seconds")
    )
    if not speeds:
        return ""
    batch = config.get("global_batch_size")
    middle = float(np.median([speed for _, speed in speeds]))
    step = (
        float(np.median([seconds for _, seconds in steps])) if steps else batch / middle if batch and middle else None
    )
    facts = [("images/s, median of the rows", number(middle))] + [("seconds a step", number(step))] * (step is not None)
    for name, column in (("10¹² operations/s a device", "perf/tflops_per_device"), ("of its peak (MFU)", "perf/mfu")):
        if points := _points(rows, column):
            facts.append((name, number(float(np.median([value for _, value in points])), column.endswith("mfu"))))
    share, bar = float(np.mean([wait for _, wait in waits])) if waits else None, ""
    if share is not None:
        facts.append(("of it waiting for data", number(share, True)))
        width = 100 * min(max(share, 0), 1)
        bar = (
            f'<div class="split"><span class="wait" style="width:{width:.1f}%">data</span><span '
            f'class="work">network</span></div>'
        )
    else:
        bar = "<p>How long its steps waited for data this run has not measured.</p>"
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    drawn = charts.curves("images/s, all devices", {"perf/images_per_sec": ("raw", speeds)})
    drawn += charts.curves("waiting for data, share of a step", {"perf/data_wait_share": ("ema", waits)}, percent=True)
    drawn += charts.curves("seconds a step", {"perf/step_seconds": ("raw", steps)})
    return section("time", "Where a step's time goes", f'<dl>{listed}</dl>{bar}<div class="charts">{drawn}</div>\n')


def _others(rows: Rows) -> str:
    """Every other column of the history, a chart each, train and val of one name together; at most 16."""
    shown = {
        "perf/images_per_sec",
        "perf/data_wait_share",
        "perf/step_seconds",
        "train/loss",
        "val/loss",
        "val_ema/loss",
    }
    watched, found = _watched(rows, {}), {}
    for column in dict.fromkeys(column for row in rows for column in row):
        stage, _, name = column.rpartition("/")
        if column in NEUTRAL or column in shown or column.split("/")[0] == "lr" or stage in COLOURS and name == watched:
            continue
        found.setdefault(name if stage in COLOURS else column, {})[column] = (
            COLOURS.get(stage, "raw"),
            _points(rows, column),
        )
    drawn = "".join(charts.curves(name, series, percent=_percent(name)) for name, series in list(found.items())[:16])
    return (
        f'<section id="others"><details><summary>Other curves</summary><div '
        f'class="charts">{drawn}</div></details></section>\n'
        if drawn
        else ""
    )


def _seen(seen: Glimpse, spec: dict[str, Any], data: L.LightningDataModule | None) -> str:
    names = data.splits["train"].names if data is not None else None
    words = [os.fsdecode(names[row]) if names is not None else f"row {row}" for row in seen.index]
    rows = list(zip(map(Image.fromarray, seen.image), (_label(target, spec) for target in seen.target), words))
    height, width = seen.image.shape[1:3]
    when = "before the first step" if seen.step == 0 else f"after {seen.step:,} steps, when the run went on"
    return section(
        "seen",
        "What the network sees",
        f"<p>The first {len(seen.image)} training pictures {when}: {width} x {height} pixels, cropped, "
        f"augmented and mixed, and the targets it learns from (of mixed ones the largest "
        f"shares).</p>\n{charts.pictures(rows)}",
    )


def _label(target: np.ndarray, spec: dict[str, Any]) -> str:
    """A target as a person reads it: the class, the shares of a mixed one (above 5 %, three at most), the labels, or
    the values."""
    names = spec["class_names"] or spec["target_names"]
    if spec["task"] == "regression":
        values = list(zip(names, np.atleast_1d(target)))[:4]
        return "<br>".join(
            f"{text(name) + ' ' if len(names) > 1 else ''}{number(float(value))}" for name, value in values
        )
    if np.ndim(target) == 0:
        return text(names[int(target)])
    heaviest = [
        k
        for k in np.argsort(-target, kind="stable")[: 3 if spec["task"] == "classification" else 6]
        if target[k] > 0.05
    ]
    return (
        "<br>".join(
            f"{text(names[k])}{'' if target[k] == 1 else ' ' + number(float(target[k]), True)}" for k in heaviest
        )
        or "none"
    )


def _folds(result: dict[str, Any]) -> str:
    """A line a fold, the score over all rows and its interval."""
    scores, metric = result.get("fold_scores"), str(result.get("metric", ""))
    if not scores:
        return ""
    percent = _percent(metric)
    low, high, overall = (result.get(key) for key in ("ci_low", "ci_high", "overall"))
    rows = [
        [f"fold {k}", number(score, percent) if score is not None else "not trained"] for k, score in enumerate(scores)
    ]
    rows += [
        ["all rows", f'<b id="overall">{number(overall, percent)}</b>'],
        ["its 95 % interval", f"{number(low, percent)} to {number(high, percent)}"],
    ]
    drawn = charts.dots("each fold and all rows", scores, overall, low, high, percent)
    return section(
        "folds", "Folds", f'<div class="charts">{charts.table(["", text(metric)], rows, "folds")}{drawn}</div>\n'
    )


def _config(config: dict[str, Any]) -> str:
    """What differs from the defaults of every knob, whoever chose it: recipe, command line or data."""
    usual = plain(Config())
    apart = [key.name for key in fields(Config) if key.name in config and config[key.name] != usual[key.name]]
    rows = [
        [text(name), *(f"<code>{text(_spelled(each[name]), 300)}</code>" for each in (config, usual))] for name in apart
    ]
    return (
        section(
            "config",
            "Configuration",
            f"<p>The keys that differ from the defaults; config.yaml has all.</p>\n"
            f"{charts.table(['key', 'value', 'default'], rows, 'config')}",
        )
        if rows
        else ""
    )


def _spelled(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
