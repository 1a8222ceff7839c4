"""Curves of every run, and scores against what they cost: curves.png and the pictures of the page."""

import base64
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from experiments.comparison.record import Record, number
from experiments.comparison.tables import Comparison, Group, in_percent

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#56b4e9", "#7f3c8d", "#e73f74", "#11a579", "#555555")
DASHES = ("-", "--", ":", "-.")
DASH_ARRAYS = {"-": "", "--": "6 3", ":": "2 2", "-.": "6 2 2 2"}  # the same for the page's legend
LOG_SCALE = 20.0  # largest over smallest from which an axis is logarithmic
STYLE = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "vitlab",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "figure.dpi": 100,
}


@dataclass(frozen=True)
class Chart:
    """A picture: its title, what it says to those who do not see it, and how it is drawn on axes: at once, and what
    `draw` returns when all axes have their places."""

    title: str
    text: str
    draw: Callable[[Axes], Callable[[], None]] = field(repr=False)


def style(group: Group) -> tuple[str, str]:
    """(colour, dashes): different for the first forty groups."""
    place = group.number - 1
    return COLOURS[place % len(COLOURS)], DASHES[place // len(COLOURS) % len(DASHES)]


def charts(found: Comparison) -> list[Chart]:
    """The pictures that these runs have numbers for."""
    percent = in_percent(found.metric)
    made = []
    for title, keys, scale in (
        (_by_epoch(found), _metric_keys(found), 100 if percent else 1),
        ("val/loss", ("val_ema/loss", "val/loss"), 1),
    ):
        lines = [
            (group, *line)
            for group in reversed(found.groups)
            for run in (*group.rest, *group.runs)
            for line in curves(run, keys)
        ]
        if lines and title not in [chart.title for chart in made]:
            made.append(
                Chart(
                    title,
                    f"{title} of each run by epoch",
                    _curve_drawer(lines, scale, title + " (%)" * percent * (scale > 1)),
                )
            )
    for key, words, factor in (
        ("params", "parameters (millions)", 1e-6),
        ("gmacs", "GMACs", 1),
        ("images_per_sec", "images/s in training", 1),
        ("hours", "minutes of training", 60),
    ):
        points = [
            (group, mean(xs) * factor, stdev(xs) * factor if len(xs) > 1 else 0, *_percent(group, percent))
            for group in found.groups
            if group.runs and (xs := group.of(key))
        ]
        if points:
            said = f"{found.metric} against {words}: mean of each group, bars of one standard deviation over seeds"
            made.append(
                Chart(
                    f"{found.metric} against {words}",
                    said,
                    _point_drawer(points, words, found.metric + " (%)" * percent),
                )
            )
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


def _percent(group: Group, percent: bool) -> tuple[float, float]:
    middle, apart = group.spread()
    return middle * (100 if percent else 1), (apart or 0.0) * (100 if percent else 1)


def curves(run: Record, keys: tuple[str, ...]) -> list[tuple[list[float], list[float]]]:
    """(epochs done, values) of a run, or of each of its folds; of the first key that its history has, its own metric
    before the others."""
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
    return [tuple(map(list, zip(*points)))] if points else []


def _curve_drawer(
    lines: list[tuple[Group, list[float], list[float]]], scale: float, words: str
) -> Callable[[Axes], Callable[[], None]]:
    def draw(axes: Axes) -> Callable[[], None]:
        for group, xs, ys in lines:
            colour, dashes = style(group)
            axes.plot(
                xs,
                [scale * y for y in ys],
                color=colour,
                linestyle=dashes,
                linewidth=1.3,
                alpha=0.85,
                marker="o" if len(xs) < 3 else None,
                markersize=3,
            )
        axes.set_xlabel("epochs")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(words)
        values = [y for _, _, ys in lines for y in ys]
        if min(values) > 0 and max(values) / min(values) > LOG_SCALE and words.endswith("loss"):
            axes.set_yscale("log")
            _plain_ticks(axes.yaxis)
        return lambda: None

    return draw


def _plain_ticks(axis: Axis) -> None:
    """0.1, 1, 10 on a logarithmic axis, where matplotlib would write formulas."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _point_drawer(
    points: list[tuple[Group, float, float, float, float]], across: str, up: str
) -> Callable[[Axes], Callable[[], None]]:
    def draw(axes: Axes) -> Callable[[], None]:
        for group, x, x_apart, y, y_apart in points:
            axes.errorbar(
                x,
                y,
                xerr=x_apart or None,
                yerr=y_apart or None,
                fmt="o",
                color=style(group)[0],
                markersize=5,
                capsize=2,
                elinewidth=1,
            )
        xs = [point[1] for point in points]
        if min(xs) > 0 and max(xs) / min(xs) > LOG_SCALE:
            axes.set_xscale("log")
            _plain_ticks(axes.xaxis)
        elif max(xs) == min(xs):
            axes.set_xlim(0, 2 * xs[0] or 1)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.margins(x=0.12, y=0.1)
        return lambda: _number(axes, points)

    return draw


def _number(axes: Axes, points: list[tuple[Group, float, float, float, float]]) -> None:
    """The group's number beside each point, where it covers no other number or point."""
    places = axes.transData.transform([(x, y) for _, x, _, y, _ in points])
    unit = axes.figure.dpi / 72
    taken = [tuple(place) for place in places]
    offsets = sorted(
        ((dx, dy) for dx in range(-50, 51, 5) for dy in range(-30, 31, 5) if abs(dx) > 8 or abs(dy) > 8),
        key=lambda each: (abs(each[0] - 10) + abs(each[1]), each),
    )
    for own, ((group, x, _, y, _), (px, py)) in enumerate(zip(points, places)):
        others = taken[:own] + taken[own + 1 :]
        free = [
            each
            for each in offsets
            if all(
                abs(px + each[0] * unit - tx) > 11 * unit or abs(py + each[1] * unit - ty) > 9 * unit
                for tx, ty in others
            )
        ]
        dx, dy = (free or [(10, 0)])[0]
        taken.append((px + dx * unit, py + dy * unit))
        far = abs(dx) + abs(dy) > 15
        axes.annotate(
            str(group.number),
            (x, y),
            (dx, dy),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9,
            color=style(group)[0],
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.4},
            arrowprops={"arrowstyle": "-", "color": style(group)[0], "linewidth": 0.5, "shrinkB": 2} if far else None,
        )


def data_address(chart: Chart) -> str:
    """The picture as an SVG inside a data: address."""
    content = io.BytesIO()
    with rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.6), layout="constrained")
        finish = chart.draw(figure.subplots())
        figure.draw_without_rendering()
        finish()
        figure.savefig(content, format="svg", metadata={"Date": None}, transparent=True)  # the page is light or dark
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()


def write_png(path: Path, found: Comparison, made: list[Chart]) -> None:
    """All pictures on one sheet, two a row, with the legend below."""
    names = [
        f"{group.number}  {group.name if len(group.name) < 50 else group.name[:49] + '…'}" for group in found.groups
    ]
    columns = 2 if max(map(len, names)) > 30 else 3
    lines, rows = -(-len(names) // columns), max(1, -(-len(made) // 2))  # without any picture the legend alone
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of a name in letters that the font has not
        figure = Figure(figsize=(11, 3.7 * rows + 0.22 * lines + 0.3), layout="constrained")
        later = []
        for axes, chart in zip(figure.subplots(rows, 2, squeeze=False).flat, [*made, *[None] * (2 * rows - len(made))]):
            if chart is None:
                axes.set_axis_off()
                continue
            axes.set_title(chart.title, fontsize=10)
            later.append(chart.draw(axes))
        handles = [
            Line2D([], [], color=style(group)[0], linestyle=style(group)[1], marker="o", markersize=4)
            for group in found.groups
        ]
        figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
        figure.draw_without_rendering()
        for finish in later:
            finish()
        figure.savefig(path, dpi=110)
