"""Drawings of lines, dots, boxes and words, written as SVG into a page or as pixels into a file or a tracker.

A unit is a pixel of an SVG shown at its size and a point of a font; y grows downward. Colours are named: a page has
them in a light and a dark form (`COLOURS`), pixels are light. matplotlib, which makes the pixels, writes an SVG 30
times slower than `svg` and three times as long, and a page is written after every epoch.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

COLOURS = {  # on a light page, on a dark one
    "ink": ("#1c2126", "#e5e8eb"),
    "soft": ("#5a6570", "#9ba5af"),
    "line": ("#dde2e7", "#363d44"),
    "page": ("#ffffff", "#16191c"),
    "raw": ("#1f5fbf", "#6ea8ff"),
    "ema": ("#c2570c", "#ff9d5c"),
    "train": ("#76818c", "#98a3ae"),
    "good": ("#1a7a45", "#5cc98d"),
    "bad": ("#b02a2a", "#ff8a80"),
    "wait": ("#8a6100", "#e0b341"),
    "s0": ("#0072b2", "#4fb3f0"),
    "s1": ("#d55e00", "#ff9149"),
    "s2": ("#009e73", "#3fd0a5"),
    "s3": ("#cc79a7", "#eaa6cb"),
    "s4": ("#8c6d00", "#cfae3c"),
    "s5": ("#56b4e9", "#9fd6ff"),
    "s6": ("#7f3c8d", "#c792d6"),
    "s7": ("#e73f74", "#ff8aad"),
    "s8": ("#11a579", "#5fdcb6"),
    "s9": ("#555555", "#b4b4b4"),
}
WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 32  # around the axes
FONT, GLYPH = 11, 0.6  # size, and the width of a letter as a share of it
SCALE = 2  # pixels a unit
MOST_POINTS, MOST_DOTS = 300, 1500
LOG_SCALE = 20.0  # largest over smallest from which an axis may be logarithmic
Points = Sequence[tuple[float, float]]
ANCHORS = {"start": "left", "middle": "center", "end": "right"}


@dataclass(frozen=True)
class Line:
    """A line through points; `gaps`: dots at them instead."""

    points: Points
    colour: str
    width: float = 1.0
    dash: str = ""
    opacity: float = 1.0
    gaps: bool = False

    def svg(self) -> str:
        places = [f"{x:.1f},{y:.1f}" for x, y in self.points]
        path = "".join(f"M{place}h0" for place in places) if self.gaps else f"M{'L'.join(places)}"
        dash = f' stroke-dasharray="{self.dash}"' if self.dash else ' stroke-linecap="round"' * self.gaps
        return f'<path class="{self.colour}" stroke-width="{self.width:g}"{dash}{_opacity(self.opacity)} d="{path}"/>'

    def artist(self) -> Any:
        from matplotlib.lines import Line2D

        xs, ys = zip(*self.points)
        line = Line2D(xs, ys, color=COLOURS[self.colour][0], linewidth=self.width, alpha=self.opacity)
        if self.dash:
            line.set_linestyle((0, [float(length) for length in self.dash.split()]))
        if self.gaps:
            line.set(linestyle="none", marker="o", markersize=self.width, markeredgewidth=0)
        return line


@dataclass(frozen=True)
class Dot:
    """A point; a page shows `words` on hover."""

    x: float
    y: float
    colour: str
    words: str = ""
    radius: float = 2.2

    def svg(self) -> str:
        title = f"<title>{escape(self.words[:200])}</title>" if self.words else ""
        return f'<circle class="{self.colour}" cx="{self.x:.1f}" cy="{self.y:.1f}" r="{self.radius}">{title}</circle>'

    def artist(self) -> Any:
        from matplotlib.patches import Circle

        return Circle((self.x, self.y), self.radius, color=COLOURS[self.colour][0], linewidth=0)


@dataclass(frozen=True)
class Box:
    x: float
    y: float
    width: float
    height: float
    colour: str
    opacity: float = 1.0

    def svg(self) -> str:
        return (
            f'<rect class="{self.colour}" x="{self.x:.1f}" y="{self.y:.1f}" width="{self.width:.1f}" '
            f'height="{self.height:.1f}"{_opacity(self.opacity)}/>'
        )

    def artist(self) -> Any:
        from matplotlib.patches import Rectangle

        colour = COLOURS[self.colour][0]
        return Rectangle((self.x, self.y), self.width, self.height, color=colour, alpha=self.opacity, linewidth=0)


@dataclass(frozen=True)
class Text:
    """One line of words on a base line; in pixels it shrinks to fit the drawing. `upright`: it reads upward."""

    x: float
    y: float
    words: str
    anchor: str = "start"
    colour: str = "ink"
    size: float = FONT
    upright: bool = False
    bold: bool = False

    def svg(self) -> str:
        anchor = "" if self.anchor == "start" else f' text-anchor="{self.anchor}"'
        colour = "" if self.colour == "ink" else f' class="{self.colour}"'
        size = "" if self.size == FONT else f' font-size="{self.size:g}"'
        turned = f' transform="rotate(-90 {self.x:.1f} {self.y:.1f})"' if self.upright else ""
        weight = ' font-weight="600"' if self.bold else ""
        place = f'x="{self.x:.1f}" y="{self.y:.1f}"{anchor}'
        return f"<text{colour}{size}{weight}{turned} {place}>{escape(self.words)}</text>"

    def artist(self) -> Any:
        from matplotlib.text import Text as Artist

        text = Artist(self.x, self.y, self.words, color=COLOURS[self.colour][0], fontsize=self.size, parse_math=False)
        text.set(horizontalalignment=ANCHORS[self.anchor], fontweight="bold" if self.bold else "normal")
        text.set(rotation=90 if self.upright else 0, rotation_mode="anchor")
        return text


def _opacity(value: float) -> str:
    return "" if value == 1 else f' opacity="{value:.2f}"'


@dataclass
class Key:
    """An entry of a legend: the form of its mark (line, box or dash), words, and a value as people read it."""

    colour: str
    words: str
    value: float | None = None
    form: str = "line"


@dataclass
class Drawing:
    """Marks in their order, other drawings and images (H, W, 3) uint8 at places inside, a title and a legend.

    A page writes the title and the legend around the SVG, which has the marks alone; pixels have images too.
    """

    title: str = ""
    width: float = WIDTH
    height: float = HEIGHT
    percent: bool = False
    marks: list[Line | Dot | Box | Text] = field(default_factory=list)
    legend: list[Key] = field(default_factory=list)
    inner: list[tuple[float, float, "Drawing"]] = field(default_factory=list)
    images: list[tuple[float, float, float, float, np.ndarray]] = field(default_factory=list)  # x, y, width, height

    def svg(self) -> Markup:
        """The SVG of the marks."""
        drawn = "".join(mark.svg() for mark in self.marks)
        size = f"{self.width:g} {self.height:g}"
        return Markup(f'<svg viewBox="0 0 {size}" role="img" aria-label="{escape(self.title)}">{drawn}</svg>')

    def pixels(self) -> np.ndarray:
        """(H, W, 3) uint8: the marks, the drawings inside and the images, on white, SCALE pixels a unit."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure((self.width / 72, self.height / 72), dpi=72 * SCALE)  # a unit is a point
        canvas = FigureCanvasAgg(figure)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box stands for it
            self._add(figure, 0, 0, self.height)
            canvas.draw()
        drawn = np.asarray(canvas.buffer_rgba())[..., :3].copy()
        for x, y, width, height, image in self.images:
            size = round(width * SCALE), round(height * SCALE)
            resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
            left, top = round(x * SCALE), round(y * SCALE)
            drawn[top : top + size[1], left : left + size[0]] = np.asarray(resized)[
                : len(drawn) - top, : drawn.shape[1] - left
            ]
        return drawn

    def _add(self, figure: Any, x: float, y: float, whole: float) -> None:
        """Add the marks as artists; `whole` is the height of the outer drawing."""
        from matplotlib.transforms import Affine2D

        place = Affine2D().translate(x, y - whole).scale(SCALE, -SCALE)
        for mark in self.marks:
            artist = mark.artist()
            artist.set_transform(place)
            figure.add_artist(artist)
            artist.set_clip_on(False)
            artist.set_zorder(len(figure.get_children()))  # in their order
            if isinstance(mark, Text):
                _fit(artist, figure)
        for right, down, drawing in self.inner:
            drawing._add(figure, x + right, y + down, whole)


def _fit(text: Any, figure: Any) -> None:
    """Shrink a text that leaves the figure."""
    box, whole = text.get_window_extent(), figure.bbox
    spare = max(whole.x0 - box.x0, box.x1 - whole.x1, 0), max(whole.y0 - box.y0, box.y1 - whole.y1, 0)
    if max(spare) > 1 and box.width and box.height:
        kept = min(1 - spare[0] * (2 if text.get_ha() == "center" else 1) / box.width, 1 - spare[1] / box.height)
        text.set_fontsize(text.get_fontsize() * max(kept, 0.3) * 0.98)


def letters(words: str, size: float = FONT) -> float:
    """About the width of words."""
    return GLYPH * size * len(words)


# Axes


@dataclass(frozen=True)
class Axis:
    """From low to high, with a name. `numbers`: the values to write, else round ones."""

    low: float
    high: float
    name: str = ""
    percent: bool = False
    log: bool = False
    numbers: Sequence[int] | None = None

    def share(self, value: float) -> float:
        """0 at low, 1 at high."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        if self.numbers is not None:
            return [(value, str(value)) for value in self.numbers]
        if not self.log:
            return ticks(self.low, self.high, self.percent)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 2, 5) if self.high / self.low < 200 else (1,)
        places = [step * 10.0**power for power in powers for step in steps]
        return [(value, f"{value:g}") for value in places if self.low <= value <= self.high]


def ticks(low: float, high: float, percent: bool = False, about: int = 4) -> list[tuple[float, str]]:
    """Round values from low to high, about so many, and how they are written."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= rough * 0.999)
    return [
        (k * step, _tick(k * step, step, percent))
        for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def _tick(value: float, step: float, percent: bool = False) -> str:
    """Format a value of an axis with the digits that values `step` apart need."""
    value, step, unit = (100 * value, 100 * step, " %") if percent else (value, step, "")
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if not percent and step >= size / 4 and abs(value) >= 10 * size:
            value, step, unit = value / size, step / size, letter
            break
    digits = next(digits for digits in range(20) if abs(round(step, digits) - step) < 1e-6 * step)
    return f"{value:.3g}{unit}" if digits > 5 else f"{value:.{digits}f}" + unit


def span(values: Iterable[float], floor: float | None = None, ceiling: float | None = None) -> tuple[float, float]:
    """Lowest and highest with a little room, which stays within floor and ceiling."""
    values = list(values)
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = low - room, high + room
    return (low if floor is None else max(low, floor)), (high if ceiling is None else min(high, ceiling))


class Chart(Drawing):
    """A drawing with axes, grid lines at round values of y, and values of x below."""

    def __init__(self, title: str, x: Axis, y: Axis):
        super().__init__(title, percent=y.percent)
        self.x, self.y = x, y
        for value, words in y.ticks():
            height = self.down(value)
            self.marks.append(Line([(LEFT, height), (WIDTH - RIGHT, height)], "line"))
            self.marks.append(Text(LEFT - 5, height + 4, words, "end"))
        for value, words in x.ticks():
            self.marks.append(Text(self.right(value), HEIGHT - BOTTOM + 14, words, "middle"))
        self.marks.append(Text(WIDTH - RIGHT, HEIGHT - 4, x.name, "end", "soft"))
        if y.name:
            self.marks.append(Text(LEFT + 4, TOP + 8, y.name, colour="soft"))

    def right(self, x: float) -> float:
        return LEFT + self.x.share(x) * (WIDTH - LEFT - RIGHT)

    def down(self, y: float) -> float:
        return TOP + (1 - self.y.share(y)) * (HEIGHT - TOP - BOTTOM)

    def line(self, points: Points, colour: str, width: float = 1.0, **how: Any) -> None:
        """A line through points (x, y) of the axes."""
        self.marks.append(Line([(self.right(x), self.down(y)) for x, y in points], colour, width, **how))

    def dot(self, x: float, y: float, colour: str, words: str = "", radius: float = 2.2) -> None:
        self.marks.append(Dot(self.right(x), self.down(y), colour, words, radius))

    def curve(self, name: str, points: Points, colour: str, dash: str = "") -> None:
        """A line with at most MOST_POINTS points; few ones are dots too, or a single one."""
        drawn = thinned(points)
        self.line(drawn, colour, 1.7, dash=dash)
        if len(drawn) == 1 or len(drawn) == len(points) <= 100:
            for x, y in drawn:
                self.dot(x, y, colour, f"{name}, {self.x.name} {x:g}: {plain(y, self.percent)}")


def plain(value: float, percent: bool = False) -> str:
    """A number as people read it."""
    return f"{100 * value:.2f} %" if percent else f"{int(value):,}" if float(value).is_integer() else f"{value:.4g}"


def finite(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def thinned(points: Points) -> Points:
    """At most MOST_POINTS: means of so many neighbours each."""
    group = -(-len(points) // MOST_POINTS)
    if group < 2:
        return points
    return [tuple(np.mean(points[k : k + group], axis=0)) for k in range(0, len(points), group)]


# Charts of one run


def curves(
    title: str, series: dict[str, tuple[str, Points]], *, percent: bool = False, mark: float | None = None
) -> Drawing | None:
    """Lines over optimizer steps: name -> (colour, points (step, value)). Values that are not finite are left out; None
    when there are no others. `mark`: the best epoch's step."""
    kept = {name: (colour, finite(points)) for name, (colour, points) in series.items()}
    kept = {name: (colour, points) for name, (colour, points) in kept.items() if points}
    if not kept:
        return None
    every = [point for _, points in kept.values() for point in points]
    low, high = span((y for _, y in every), 0.0 if min(y for _, y in every) >= 0 else None)
    chart = Chart(title, Axis(0, max(x for x, _ in every) or 1, "optimizer steps"), Axis(low, high, percent=percent))
    if mark is not None:
        chart.line([(mark, low), (mark, high)], "good")
    for name, (colour, points) in kept.items():
        chart.curve(name, points, colour)
        chart.legend.append(Key(colour, name, points[-1][1]))
    if mark is not None:
        chart.legend.append(Key("good", "best epoch"))
    return chart


def ranges(title: str, rows: list[tuple[float, float, float, str]], x_name: str) -> Drawing:
    """Ranges around 0 with their middle, side by side, from 1 on: (low, middle, high, words on hover)."""
    low, high = span([value for row in rows for value in row[:3]] + [0.0])
    chart = Chart(title, Axis(0.5, len(rows) + 0.5, x_name, numbers=range(1, len(rows) + 1)), Axis(low, high))
    chart.line([(0.5, 0), (len(rows) + 0.5, 0)], "soft", dash="4 3")
    for place, (bottom, middle, top, words) in enumerate(rows, 1):
        chart.line([(place, bottom), (place, top)], "train", 3)
        chart.dot(place, middle, "raw", words, 4)
    chart.legend = [Key("raw", "mean"), Key("train", "10 % to 90 %")]
    return chart


def reliability(counts: np.ndarray, confidence: np.ndarray, right: np.ndarray, names: tuple[str, str]) -> Drawing:
    """Share of right answers against confidence, in bins; empty ones are left out. A bar is as wide as its bin; a
    calibrated network has its dots on the diagonal. `names` of both axes."""
    x_name, y_name = names
    chart, bins = Chart("Reliability", Axis(0, 1, x_name, True), Axis(0, 1, y_name, True)), len(counts)
    for k in np.flatnonzero(counts):
        left, width = chart.right(k / bins), chart.right(1 / bins) - chart.right(0)
        opacity = 0.25 + 0.75 * counts[k] / counts.max()
        top = chart.down(right[k])
        chart.marks.append(Box(left + 0.5, top, width - 1, chart.down(0) - top, "raw", opacity))
        words = f"{int(counts[k]):,} at {100 * confidence[k]:.2f} %: {100 * right[k]:.2f} % {y_name}"
        chart.dot(confidence[k], right[k], "ema", words)
    chart.line([(0, 0), (1, 1)], "soft", dash="4 3")
    chart.legend = [Key("raw", "darker: more images", form="box"), Key("ema", "mean confidence of the bin")]
    return chart


def scatter(title: str, true: np.ndarray, predicted: np.ndarray, most: int = MOST_DOTS) -> Drawing:
    """Predicted against true, both (N,); of many points evenly picked ones."""
    low, high = span([*true, *predicted])
    chart, step = Chart(title, Axis(low, high, "true"), Axis(low, high, "predicted")), -(-len(true) // most)
    few = len(true) <= 100
    points = list(zip(true[::step], predicted[::step]))
    chart.line(points, "raw", 5 if few else 3, opacity=0.8 if few else 0.45, gaps=True)
    chart.line([(low, low), (high, high)], "soft", dash="4 3")
    chart.legend = [Key("raw", f"{len(points):,} of {len(true):,} images")]
    return chart


def dots(
    title: str, scores: list[float | None], overall: float | None, low: float | None, high: float | None, percent: bool
) -> Drawing | None:
    """A dot a fold, the score over all rows as a line, its interval as a band; None without any score."""
    there = [(k, score) for k, score in enumerate(scores) if score is not None and math.isfinite(score)]
    if not there:
        return None
    ends = [value for value in (overall, low, high) if value is not None and math.isfinite(value)]
    bottom, top = span([*(score for _, score in there), *ends])
    folds = Axis(-0.5, len(scores) - 0.5, "fold", numbers=range(0, len(scores), -(-len(scores) // 12)))
    chart = Chart(title, folds, Axis(bottom, top, percent=percent))
    if len(ends) == 3:
        middle, lower, upper = ends
        size = WIDTH - LEFT - RIGHT, chart.down(lower) - chart.down(upper)
        chart.marks.append(Box(LEFT, chart.down(upper), *size, "raw", 0.15))
        chart.line([(-0.5, middle), (len(scores) - 0.5, middle)], "good")
    for k, score in there:
        chart.dot(k, score, "raw", f"fold {k}: {plain(score, percent)}", 4)
    chart.legend = [Key("raw", "fold"), Key("good", "all rows"), Key("raw", "95 % interval", form="box")]
    return chart


# Several drawings, images and tables


def sheet(drawings: Sequence[Drawing], columns: int, legend: Sequence[tuple[str, str, str]] = ()) -> Drawing:
    """Drawings side by side with their titles above, and below them a legend: (colour, dash, words)."""
    columns, above, gap = max(1, min(columns, len(drawings) or 2)), 22, 14
    rows = -(-len(drawings) // columns)
    size = max((each.width for each in drawings), default=WIDTH), max((each.height for each in drawings), default=0)
    lines = -(-len(legend) // columns)
    whole = Drawing("", gap + columns * (size[0] + gap), gap + rows * (size[1] + above + gap) + 16 * lines)
    for place, each in enumerate(drawings):
        x, y = gap + place % columns * (size[0] + gap), gap + place // columns * (size[1] + above + gap)
        whole.marks.append(Text(x + LEFT * (each.width > LEFT * 3), y + 12, each.title, bold=True))
        whole.inner.append((x, y + above, each))
    for place, (colour, dash, words) in enumerate(legend):
        x, y = gap + place % columns * (size[0] + gap), whole.height - 16 * (lines - place // columns)
        whole.marks += [Line([(x, y), (x + 28, y)], colour, 2.5, dash), Text(x + 34, y + 4, words)]
    return whole


def matrix(
    counts: np.ndarray, share: np.ndarray, rows: list[str], columns: list[str], title: str, names: tuple[str, str]
) -> Drawing:
    """Counts (R, C) as numbers in boxes, the darker the larger their share (R, C); `names` of the rows and columns."""
    cell = max(28.0, letters(f"{counts.max():,}", 8) + 10)
    left, upright = 24 + max(map(letters, rows)), max(map(letters, columns)) > cell - 2
    above = 50 + (max(map(letters, columns)) if upright else FONT)
    width = max(left + cell * counts.shape[1] + 8, 320.0)
    drawing = Drawing(title, width, above + cell * len(counts) + 8)
    drawing.marks += [Text(8, 16, title, bold=True), Text(left, 34, names[1], colour="soft")]
    drawing.marks.append(Text(left - 8, above - 6, names[0], "end", "soft"))
    for column, words in enumerate(columns):
        x = left + cell * (column + 0.5)
        drawing.marks.append(
            Text(x + 4, above - 6, words, upright=True) if upright else Text(x, above - 6, words, "middle")
        )
    for row, words in enumerate(rows):
        y = above + cell * row
        drawing.marks.append(Text(left - 6, y + cell / 2 + 4, words, "end"))
        for column, count in enumerate(counts[row]):
            x = left + cell * column
            drawing.marks += [
                Box(x, y, cell - 1, cell - 1, "line", 0.5),
                Box(x, y, cell - 1, cell - 1, "raw", float(share[row, column])),
            ]
            if count:
                colour = "page" if share[row, column] > 0.55 else "ink"
                drawing.marks.append(Text(x + cell / 2 - 0.5, y + cell / 2 + 3, f"{count:,}", "middle", colour, 8))
    return drawing


def gallery(
    images: list[np.ndarray | None], captions: list[list[tuple[str, str]]], columns: int = 8, side: float = 104
) -> Drawing:
    """Images (H, W, 3) uint8, None for none, in rows, the caption lines (words, colour) of each above it."""
    columns, above = max(1, min(columns, len(images))), 6 + 11 * max(map(len, captions), default=0)
    rows = -(-len(images) // columns)
    drawing = Drawing("", 8 + columns * (side + 8), 8 + rows * (side + above))
    for place, (image, lines) in enumerate(zip(images, captions)):
        x, y = 8 + place % columns * (side + 8), place // columns * (side + above)
        for k, (words, colour) in enumerate(lines):
            size = min(8.0, side / max(1.0, letters(words, 1)))
            drawing.marks.append(Text(x + side / 2, y + 12 + 11 * k, words, "middle", colour, size))
        if image is not None:
            scale = side / max(image.shape[:2])
            width, height = image.shape[1] * scale, image.shape[0] * scale
            drawing.images.append((x + (side - width) / 2, y + above + (side - height) / 2, width, height, image))
    return drawing
