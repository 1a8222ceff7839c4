"""Curves of every run, and scores against what they cost: curves.png and the drawings of the page."""

from pathlib import Path
from statistics import mean, stdev

from PIL import Image

from experiments.comparison import text
from experiments.comparison.record import Record, number
from experiments.comparison.tables import Comparison, Group
from experiments.reporting import drawing
from experiments.reporting.drawing import LOG_SCALE, Axis, Chart, Drawing, Line, Text
from lightning_modules.loggers.formats import in_percent

DASHES = ("", "6 3", "2 2", "6 2 2 2")
COSTS = {  # key: its name on an axis, factor
    "params": ("parameters (millions)", 1e-6),
    "gmacs": ("GMACs", 1.0),
    "images_per_sec": ("images/s in training", 1.0),
    "hours": ("minutes of training", 60.0),
}
Point = tuple[Group, float, float, float, float]  # x, its deviation, y, its deviation


def style(group: Group) -> tuple[str, str]:
    """(colour, dash): different for the first forty groups."""
    place = group.number - 1
    return f"s{place % 10}", DASHES[place // 10 % len(DASHES)]


def charts(found: Comparison) -> list[Drawing]:
    """The drawings that these runs have numbers for."""
    made: list[Drawing] = []
    for title, keys in ((_by_epoch(found), _metric_keys(found)), ("val/loss", ("val_ema/loss", "val/loss"))):
        lines = [
            (run.name, group, points)
            for group in reversed(found.groups)
            for run in (*group.rest, *group.runs)
            for points in curves(run, keys)
        ]
        if lines and title not in [chart.title for chart in made]:
            made.append(_curves(title, lines))
    for key, (words, factor) in COSTS.items():
        points: list[Point] = []
        for group in found.groups:
            if group.runs and (xs := [factor * value for value in group.of(key)]):
                middle, apart = group.spread()
                points.append((group, mean(xs), stdev(xs) if len(xs) > 1 else 0.0, middle or 0.0, apart or 0.0))
        if points:
            made.append(_points(f"{found.metric} against {words}", points, words, in_percent(found.metric)))
    return made


def _metric_keys(found: Comparison) -> tuple[str, ...]:
    base = found.metric.split("/")[-1]
    return tuple(dict.fromkeys([found.metric, f"val_ema/{base}", f"val/{base}"]))


def _by_epoch(found: Comparison) -> str:
    """The metric; of one that no run has by epoch, as test/acc1 or oof/rmse, its val."""
    histories = [
        each.history for group in found.groups for run in (*group.rest, *group.runs) for each in (run, *run.folds)
    ]
    return (
        found.metric
        if any(found.metric in row for history in histories for row in history)
        else f"val/{found.metric.split('/')[-1]}"
    )


def curves(run: Record, keys: tuple[str, ...]) -> list[list[tuple[float, float]]]:
    """Points (epochs done, value) of a run, or of each of its folds; of the first key that its history has, its own
    metric before the others."""
    if run.folds:
        return [line for fold in run.folds for line in curves(fold, keys)]
    mine = [
        key for key in ([run.metric] if run.metric in keys else []) + [*keys] if any(key in row for row in run.history)
    ]
    points = (
        [
            (row.get("epoch", row.get("step", 0)) + 1, row[mine[0]])
            for row in run.history
            if mine[0] in row and number(row[mine[0]])
        ]
        if mine
        else []
    )
    return [points] if points else []


def _curves(title: str, lines: list[tuple[str, Group, list[tuple[float, float]]]]) -> Drawing:
    values = [y for *_, points in lines for _, y in points]
    epochs = [x for *_, points in lines for x, _ in points]
    log = title.endswith("loss") and min(values) > 0 and max(values) / min(values) > LOG_SCALE
    low, high = (min(values) * 0.9, max(values) * 1.1) if log else drawing.span(values)
    last = max(max(epochs), min(epochs) + 1)
    across = Axis(min(epochs), last, "epochs", numbers=_whole(min(epochs), last))
    chart = Chart(title, across, Axis(low, high, percent=in_percent(title), log=log))
    for name, group, points in lines:
        colour, dash = style(group)
        chart.curve(name, points, colour, dash)
    return chart


def _whole(low: float, high: float) -> list[int]:
    """At most 7 whole numbers."""
    return sorted({round(value) for value, _ in drawing.ticks(low, high) if low <= round(value) <= high})


def _points(title: str, points: list[Point], words: str, percent: bool) -> Drawing:
    """The mean of each group with its number, bars of one standard deviation over seeds."""
    xs = [x for _, x, *_ in points]
    log = min(xs) > 0 and max(xs) / min(xs) > LOG_SCALE
    if log:
        low, high = min(xs) * 0.6, max(xs) * 1.7
    elif len({*xs}) == 1:
        low, high = 0.0, 2 * xs[0] or 1.0
    else:
        low, high = drawing.span(end for _, x, apart, *_ in points for end in (x - apart, x + apart))
    up = drawing.span(end for *_, y, apart in points for end in (y - apart, y + apart))
    chart = Chart(title, Axis(low, high, words, log=log), Axis(*up, percent=percent))
    for group, x, x_apart, y, y_apart in points:
        colour = style(group)[0]
        if x_apart:
            chart.line([(max(x - x_apart, low), y), (min(x + x_apart, high), y)], colour)
        if y_apart:
            chart.line([(x, y - y_apart), (x, y + y_apart)], colour)
        chart.dot(x, y, colour, f"{group.number} {group.name}: {drawing.plain(y, percent)}", 3.5)
    _number(chart, points)
    return chart


def _number(chart: Chart, points: list[Point]) -> None:
    """The group's number beside each point, where it covers no other number or point."""
    places = [(chart.right(x), chart.down(y)) for _, x, _, y, _ in points]
    taken = [*places]
    offsets = sorted(
        ((dx, dy) for dx in range(-50, 51, 5) for dy in range(-30, 31, 5) if abs(dx) > 8 or abs(dy) > 8),
        key=lambda each: (abs(each[0] - 10) + abs(each[1]), each),
    )
    for own, (group, *_) in enumerate(points):
        (x, y), others = places[own], taken[:own] + taken[own + 1 :]
        near = ((x + dx, y + dy) for dx, dy in offsets)
        free = (each for each in near if all(abs(each[0] - a) > 11 or abs(each[1] - b) > 9 for a, b in others))
        right, down = next(free, (x + 10, y))
        taken.append((right, down))
        colour = style(group)[0]
        if abs(right - x) + abs(down - y) > 15:
            chart.marks.append(Line([(x, y), (right, down)], colour, 0.5))
        chart.marks.append(Text(right, down + 3.5, str(group.number), "middle", colour, 9))


def write_png(path: Path, found: Comparison, made: list[Drawing]) -> None:
    """All drawings on one sheet, two a row, with the legend below."""
    names = [(*style(group), f"{group.number}  {text.cut(group.name, 50)}") for group in found.groups]
    Image.fromarray(drawing.sheet(made, 2, names).pixels()).save(path)
