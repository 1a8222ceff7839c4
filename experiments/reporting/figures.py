"""Pictures for a tracker: what is taken for what, predicted against true, and a sheet of examples. Drawn with
matplotlib into arrays (H, W, 3) uint8; names are only text in them.
"""

import warnings

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.reporting.media_tables import Table, confusion, recall_precision_f1, words, worst_confused
from experiments.reporting.scored import MOST_TARGETS, Scored

MOST_CLASSES, MOST_POINTS, DOTS = 30, 5000, 110


def confused(scored: Scored) -> np.ndarray:
    """Of classes and labels a matrix, of a regression predicted against true."""
    return pixels({"classification": _classes, "multilabel": _labels, "regression": _targets}[scored.task](scored))


def pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box stands for it
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _classes(scored: Scored) -> Figure:
    classes = len(scored.names)
    picked = worst_confused(scored.target, scored.likeliest, classes, MOST_CLASSES)
    if not len(picked):
        return _words(f"All {len(scored.target):,} rows are right.")
    counts = confusion(scored.target, scored.likeliest, classes, picked)
    names = [words(scored.names[k], 24) for k in picked]
    some = len(picked) < classes
    right = (scored.target == scored.likeliest).mean()
    title = (
        f"{100 * right:.2f} % of {len(scored.target):,} rows right"
        + f"; the {len(picked)} of {classes:,} classes confused most" * some
    )
    return _matrix(
        counts if some else counts[:, :-1], names, names + ["any other"] * some, title, "taken for", "true class"
    )


def _labels(scored: Scored) -> Figure:
    """A line for each label: the pictures with it and those without, each as said and not said; the labels with the
    smallest F1."""
    there, said = scored.target > 0.5, scored.prediction > 0.5
    counts = np.stack(
        [(there & said).sum(0), (there & ~said).sum(0), (~there & said).sum(0), (~there & ~said).sum(0)], 1
    )  # (K, 4)
    f1 = recall_precision_f1(there.sum(0), said.sum(0), counts[:, 0])[2]
    worst = np.sort(np.argsort(np.nan_to_num(f1, nan=2), kind="stable")[:MOST_CLASSES])
    some = f"; the {len(worst)} of {len(f1):,} labels with the smallest F1" * (len(worst) < len(f1))
    share = counts[worst] / np.repeat(np.stack([there.sum(0), (~there).sum(0)], 1)[worst], 2, axis=1).clip(1)
    return _matrix(
        counts[worst],
        [words(scored.names[k], 24) for k in worst],
        ["has it:\nsaid", "has it:\nmissed", "has it not:\nsaid", "has it not:\nnot said"],
        f"{len(there):,} rows, said of above 50 %{some}",
        "",
        "label",
        share,
    )


def _matrix(
    counts: np.ndarray,
    rows: list[str],
    columns: list[str],
    title: str,
    below: str,
    beside: str,
    share: np.ndarray | None = None,
) -> Figure:
    """Counts (R, C) as numbers, coloured by their share of the row, or by `share`."""
    coloured = counts / counts.sum(1, keepdims=True).clip(1) if share is None else share
    upright = len(columns) <= 4 and max(len(line) for name in columns for line in name.splitlines()) <= 14
    cell = max(0.38, 0.075 * len(f"{counts.max():,}") + 0.12)
    wide, below_cells = 1.0 if upright else cell, 0.4 if upright else 0.3 + 0.065 * max(map(len, columns))
    figure = Figure(
        (
            max(4.5, 1.7 + 0.065 * max(map(len, rows)) + wide * len(columns)),
            0.5 + below_cells + max(1.5, cell * len(rows)),
        ),
        dpi=DOTS,
        layout="constrained",
    )
    axes = figure.add_subplot()
    drawn = axes.imshow(coloured, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in zip(*np.nonzero(counts)):
        axes.text(
            column,
            row,
            f"{counts[row, column]:,}",
            ha="center",
            va="center",
            fontsize=7.5,
            color="white" if coloured[row, column] > 0.55 else "black",
        )
    axes.set_xticks(range(len(columns)), columns, rotation=0 if upright else 90, fontsize=8, parse_math=False)
    axes.set_yticks(range(len(rows)), rows, fontsize=8, parse_math=False)
    axes.set_xticks(np.arange(0.5, len(columns) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(rows) - 1), minor=True)
    axes.grid(which="minor", color="0.88", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.set_xlabel(below)
    axes.set_ylabel(beside)
    axes.set_title(title, fontsize=9)
    scale = figure.colorbar(
        drawn, ax=axes, shrink=min(1.0, 3.5 / figure.get_figheight()), format=lambda value, _: f"{100 * value:.0f} %"
    )
    scale.set_label("of the row" if share is None else "of those that have it, or have it not", fontsize=8)
    return figure


def _targets(scored: Scored) -> Figure:
    names = scored.names[:MOST_TARGETS]
    figure = Figure((5.2 * min(2, len(names)), 5.0 * -(-len(names) // 2)), dpi=DOTS, layout="constrained")
    step = -(-len(scored.target) // MOST_POINTS)
    for t, name in enumerate(names):
        axes = figure.add_subplot(-(-len(names) // 2), min(2, len(names)), t + 1)
        _against(axes, scored.target[::step, t], scored.prediction[::step, t])
        error = float(np.sqrt(((scored.prediction[:, t] - scored.target[:, t]) ** 2).mean()))
        shown = f"{len(scored.target[::step]):,} of " * (step > 1)
        axes.set_title(
            f"{words(name, 36)}\nRMSE {error:.4g}, {shown}{len(scored.target):,} rows", fontsize=9, parse_math=False
        )
    return figure


def _against(axes: Axes, true: np.ndarray, predicted: np.ndarray) -> None:
    low, high = min(true.min(), predicted.min()), max(true.max(), predicted.max())
    room = 0.04 * (high - low) or 1.0
    axes.plot([low, high], [low, high], color="0.5", linewidth=1, label="predicted = true")
    axes.scatter(true, predicted, s=9, alpha=min(1.0, max(0.15, 200 / len(true))), linewidths=0, color="#1f5fae")
    axes.set(
        xlim=(low - room, high + room),
        ylim=(low - room, high + room),
        xlabel="true",
        ylabel="predicted",
        aspect="equal",
    )
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, loc="upper left")


def sheet(table: Table, columns: int = 8) -> np.ndarray:
    """The pictures of `media_tables.examples`, each with what it is and what was said; a wrong one in red."""
    place = {name: k for k, name in enumerate(table.columns)}
    figure, axes = places(min(columns, len(table.rows)), -(-len(table.rows) // columns), above=0.42)
    for each, row in zip(axes.flat, table.rows):
        if row[0] is not None:
            each.imshow(row[0])
        said = [row[place[name]] for name in table.columns if name.startswith(("target", "prediction"))][:2]
        told = [f"{each:.4g}" if isinstance(each, float) else words(each, 20) for each in said]
        colour = "black" if "right" not in place or row[place["right"]] else "#b00020"
        each.set_title(f"{told[0]}\n\u2192 {told[1]}", fontsize=7, color=colour, parse_math=False, pad=2)
    return pixels(figure)


def places(
    across: int, down: int, *, width: float = 1.45, height: float = 1.45, above: float = 0.3, left: float = 0.05
) -> tuple[Figure, np.ndarray]:
    """Axes (down, across) without frames, each width x height inches with room above for a title, and room at the left
    of all."""
    size = left + (width + 0.08) * across, (height + above) * down + 0.05
    figure = Figure(size, dpi=DOTS)  # laid out by hand: a layout engine takes seconds
    axes = np.empty((down, across), object)
    for row, column in np.ndindex(down, across):
        corner = left + (width + 0.08) * column, size[1] - (height + above) * (row + 1)
        axes[row, column] = figure.add_axes(
            (corner[0] / size[0], corner[1] / size[1], width / size[0], height / size[1])
        )
        axes[row, column].axis("off")
    return figure, axes


def _words(line: str) -> Figure:
    figure = Figure((5, 1), dpi=DOTS)
    figure.text(0.5, 0.5, line, ha="center", va="center")
    return figure
