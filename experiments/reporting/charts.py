"""Parts of a run's page as HTML and SVG text, without script: charts, tables, pictures. A chart is drawn for 360 px, so
that its letters are read on a telephone; several stand side by side on a wide screen.

Whatever a person may have named (classes, files, columns) passes through `text`.
"""

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 210, 50, 12, 10, 32
MOST_POINTS, MOST_LETTERS = 300, 60
SHORT = 6  # letters of a class name that stands over a column
PICTURE_SIDE, PICTURE_BYTES, LOSSLESS_SIDE = 160, 20_000, 48
Points = list[tuple[float, float]]


def text(value: Any, most: int = MOST_LETTERS) -> str:
    """Escaped for HTML, inside quotes too; what is longer than `most` letters is cut, as `abc...`."""
    words = str(value)
    return html.escape(words if len(words) <= most else words[: most - 3] + "...", quote=True)


def number(value: float | None, percent: bool = False) -> str:
    """A number as a person reads it, the whole of it in the element's `value`; `-` for none."""
    if value is None or not math.isfinite(value):
        return "-"
    whole = float(value).is_integer() and not percent
    return f'<data value="{int(value) if whole else repr(float(value))}">{plain(value, percent)}</data>'


def plain(value: float, percent: bool = False) -> str:
    return f"{100 * value:.2f} %" if percent else f"{int(value):,}" if float(value).is_integer() else f"{value:.4g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Cells are HTML already. The first column is the rows' names."""
    lines = "".join(
        "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for tag, cell in zip(["th", *["td"] * len(row)], row)) + "</tr>\n"
        for row in rows
    )
    names = "".join(f"<th>{name}</th>" for name in head)
    return (
        f'<div class="wide"><table '
        f'class="{kind}"><thead><tr>{names}</tr></thead><tbody>\n{lines}</tbody></table></div>\n'
    )


def section(identity: str, title: str, body: str) -> str:
    return f'<section id="{identity}">\n<h2>{title}</h2>\n{body}</section>\n' if body else ""


def figure(title: str, drawing: str, legend: str = "", height: int = HEIGHT) -> str:
    """A chart with its name, and what its colours mean."""
    label = text(title, 200)
    return (
        f'<figure class="chart"><figcaption>{label}</figcaption><p class="legend">{legend}</p>\n'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{drawing}</svg></figure>\n'
    )


def key(kind: str, words: str) -> str:
    return f'<span><span class="key {kind}"></span>{words}</span> '


@dataclass(frozen=True)
class Frame:
    """Values -> pixels of a chart, its grid and its letters."""

    x: tuple[float, float]
    y: tuple[float, float]
    percent: bool = False
    percent_x: bool = False

    def at(self, x: float, y: float) -> str:
        return f"{self.left(x):.1f},{self.top(y):.1f}"

    def left(self, x: float) -> float:
        return LEFT + (x - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)

    def top(self, y: float) -> float:
        return TOP + (self.y[1] - y) / (self.y[1] - self.y[0]) * (HEIGHT - TOP - BOTTOM)

    def dot(self, x: float, y: float, kind: str, words: str, radius: float = 2.2) -> str:
        """A point, `words` on hover."""
        return (
            f'<circle class="dot {kind}" cx="{self.left(x):.1f}" cy="{self.top(y):.1f}" '
            f'r="{radius}"><title>{text(words, 200)}</title></circle>'
        )

    def grid(self, x_label: str, y_label: str = "", numbers: range | None = None) -> str:
        """Lines at round values of y, values of x below (round ones, or `numbers`), and what they are."""
        parts = [
            f'<path class="grid" d="M{LEFT} {self.top(y):.1f}H{WIDTH - RIGHT}"/>'
            f'<text x="{LEFT - 5}" y="{self.top(y) + 4:.1f}" text-anchor="end">{words}</text>'
            for y, words in ticks(*self.y, self.percent)
        ]
        parts += [
            f'<text x="{self.left(x):.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{words}</text>'
            for x, words in (ticks(*self.x, self.percent_x) if numbers is None else ((x, str(x)) for x in numbers))
        ]
        parts.append(
            f'<text class="soft" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{text(x_label)}</text>'
        )
        if y_label:
            parts.append(f'<text class="soft" x="{LEFT + 4}" y="{TOP + 8}">{text(y_label)}</text>')
        return "".join(parts)


def ticks(low: float, high: float, percent: bool = False, about: int = 4) -> list[tuple[float, str]]:
    """Round values from low to high, about so many, and how they are written."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= rough * 0.999)
    return [
        (k * step, tick(k * step, step, percent))
        for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def tick(value: float, step: float, percent: bool = False) -> str:
    """A value beside an axis, with the digits that values `step` apart need."""
    value, step, unit = (100 * value, 100 * step, " %") if percent else (value, step, "")
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if not percent and step >= size / 4 and abs(value) >= 10 * size:
            value, step, unit = value / size, step / size, letter
            break
    digits = next(digits for digits in range(20) if abs(round(step, digits) - step) < 1e-6 * step)
    return f"{value:.3g}{unit}" if digits > 5 else f"{value:.{digits}f}" + unit


def span(values: Iterable[float], floor: float | None = None, ceiling: float | None = None) -> tuple[float, float]:
    """Lowest and highest with a little room, which does not go beyond floor and ceiling."""
    values = list(values)
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = low - room, high + room
    return (low if floor is None else max(low, floor)), (high if ceiling is None else min(high, ceiling))


def curves(
    title: str, series: dict[str, tuple[str, Points]], *, percent: bool = False, mark: float | None = None
) -> str:
    """Lines over optimizer steps: name -> (colour, points (step, value)). With many points each one drawn is a mean of
    neighbours. Values that are not finite are left out; "" when there are none. `mark`: the best epoch's step."""
    series = {name: (kind, [(x, y) for x, y in points if math.isfinite(y)]) for name, (kind, points) in series.items()}
    series = {name: (kind, points) for name, (kind, points) in series.items() if points}
    if not series:
        return ""
    every = [point for _, points in series.values() for point in points]
    frame = Frame(
        (0, max(x for x, _ in every) or 1),
        span((y for _, y in every), 0.0 if min(y for _, y in every) >= 0 else None),
        percent,
    )
    parts, legend = [frame.grid("optimizer steps")], []
    if mark is not None:
        parts.append(f'<path class="mark" d="M{frame.left(mark):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
    for name, (kind, points) in series.items():
        drawn = thinned(points)
        parts.append(f'<polyline class="line {kind}" points="{" ".join(frame.at(*point) for point in drawn)}"/>')
        if len(drawn) == 1 or len(drawn) == len(points) <= 100:
            parts += [frame.dot(x, y, kind, f"{name}, step {x:g}: {plain(y, percent)}") for x, y in drawn]
        legend.append(key(kind, f"{text(name)} {number(points[-1][1], percent)}"))
    return figure(title, "".join(parts), "".join(legend) + (key("mark", "best epoch") if mark is not None else ""))


def thinned(points: Points) -> Points:
    """At most MOST_POINTS: means of so many neighbours each."""
    group = -(-len(points) // MOST_POINTS)
    return (
        [tuple(np.mean(points[k : k + group], axis=0)) for k in range(0, len(points), group)] if group > 1 else points
    )


def ranges(title: str, rows: list[tuple[float, float, float, str]], x_label: str) -> str:
    """Ranges around 0 with their middle, side by side, from 1 on: (low, middle, high, words on hover)."""
    frame = Frame((0.5, len(rows) + 0.5), span([value for row in rows for value in row[:3]] + [0.0]))
    parts = [
        frame.grid(x_label, numbers=range(1, len(rows) + 1)),
        f'<path class="axis" d="M{LEFT} {frame.top(0):.1f}H{WIDTH - RIGHT}"/>',
    ]
    for place, (low, middle, high, words) in enumerate(rows, 1):
        parts.append(
            f'<path class="range" d="M{frame.at(place, low)}L{frame.at(place, high)}"/>'
            + frame.dot(place, middle, "raw", words, 4)
        )
    return figure(title, "".join(parts), key("raw", "mean") + key("range", "10 % to 90 %"))


def reliability(counts: np.ndarray, confidence: np.ndarray, right: np.ndarray, x_label: str, y_label: str) -> str:
    """Share that is right against how sure the network was, in bins; empty ones left out. The width of a bar is its
    bin, the line is honesty."""
    frame, bins = Frame((0, 1), (0, 1), True, True), len(counts)
    parts = [frame.grid(x_label, y_label)]
    for k in np.flatnonzero(counts):
        low, high = frame.left(k / bins), frame.left((k + 1) / bins)
        words = f"{int(counts[k]):,} at {100 * confidence[k]:.2f} %: {100 * right[k]:.2f} % {y_label}"
        parts.append(
            f'<rect class="bar" x="{low + 0.5:.1f}" y="{frame.top(right[k]):.1f}" width="{high - low - 1:.1f}" '
            f'height="{frame.top(0) - frame.top(right[k]):.1f}" '
            f'opacity="{0.25 + 0.75 * counts[k] / counts.max():.2f}"/>'
            + frame.dot(confidence[k], right[k], "ema", words)
        )
    parts.append(f'<path class="axis" d="M{frame.at(0, 0)}L{frame.at(1, 1)}"/>')
    return figure(
        "Reliability", "".join(parts), key("bar", "darker: more pictures") + key("ema", "mean confidence of the bin")
    )


def scatter(title: str, true: np.ndarray, predicted: np.ndarray) -> str:
    """Predicted against true, both (N,); of many points evenly picked ones."""
    ends = span([*true, *predicted])
    frame, step = Frame(ends, ends), -(-len(true) // 1500)
    points = "".join(f"M{frame.at(x, y)}h0" for x, y in zip(true[::step], predicted[::step]))
    line = f'<path class="axis" d="M{frame.at(ends[0], ends[0])}L{frame.at(ends[1], ends[1])}"/>'
    drawing = f'{frame.grid("true", "predicted")}<path class="cloud{" few" * (len(true) <= 100)}" d="{points}"/>{line}'
    return figure(title, drawing, f"{len(true[::step]):,} of {len(true):,} pictures")


def dots(title: str, scores: list[float | None], overall: float, low: float, high: float, percent: bool) -> str:
    """A dot a fold, the score over all rows as a line, its interval as a band."""
    there = [(k, score) for k, score in enumerate(scores) if score is not None and math.isfinite(score)]
    ends = [value for value in (overall, low, high) if value is not None and math.isfinite(value)]
    if not there:
        return ""
    frame = Frame((-0.5, len(scores) - 0.5), span([*(score for _, score in there), *ends]), percent)
    parts = [frame.grid("fold", numbers=range(0, len(scores), -(-len(scores) // 12)))]
    if len(ends) == 3:
        tall = frame.top(low) - frame.top(high)
        parts.append(
            f'<rect class="band" x="{LEFT}" y="{frame.top(high):.1f}" width="{WIDTH - LEFT - RIGHT}" '
            f'height="{tall:.1f}"/>'
            f'<path class="mark" d="M{LEFT} {frame.top(overall):.1f}H{WIDTH - RIGHT}"/>'
        )
    parts += [frame.dot(k, score, "raw", f"fold {k}: {plain(score, percent)}", 4) for k, score in there]
    return figure(title, "".join(parts), key("raw", "fold") + key("mark", "all rows") + key("band", "95 % interval"))


def matrix(names: list[str], counts: np.ndarray) -> str:
    """Confusion (K, K), rows true: the number of pictures, coloured by its share of the row. Over the columns stand the
    names where they are short, else numbers that the rows carry too."""
    share, short = counts / counts.sum(1, keepdims=True).clip(1), max(map(len, names)) <= SHORT
    rows = []
    for k, name in enumerate(names):
        cells = [
            f'<span class="cell{" deep" * bool(share[k, j] > 0.5)}" style="--s:{share[k, j]:.3f}" title="{text(name)} '
            f'as {text(names[j])}">'
            f"{counts[k, j] or ''}</span>"
            for j in range(len(names))
        ]
        rows.append([text(name, 20) + f" <small>{k + 1}</small>" * (not short), *cells])
    heads = [text(name) if short else f'<span title="{text(name)}">{k + 1}</span>' for k, name in enumerate(names)]
    return table(["true \\ predicted", *heads], rows, "matrix")


def picture(image: Image.Image) -> str:
    """A data URI: small pictures as they are (PNG), larger ones as JPEG of at most PICTURE_SIDE pixels and
    PICTURE_BYTES."""
    image = image.convert("RGB")
    if max(image.size) <= LOSSLESS_SIDE:
        return _uri(image, "PNG")
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BICUBIC)
    for quality in (85, 60, 30):
        uri = _uri(image, "JPEG", quality=quality)
        if len(uri) <= PICTURE_BYTES:
            return uri
    return _uri(image.resize([max(1, side // 2) for side in image.size]), "JPEG", quality=60)


def _uri(image: Image.Image, kind: str, **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def pictures(rows: list[tuple[Image.Image | None, str, str]]) -> str:
    """Small pictures, each (picture or None, caption as HTML, words on hover); a table where there is no picture at
    all."""
    if not any(image for image, *_ in rows):
        return table(["", ""], [[text(words), caption] for _, caption, words in rows], "unseen")
    parts = []
    for image, caption, words in rows:
        shown, words = '<p class="none">no picture</p>', text(words, 200)
        if image is not None:
            tiny = ' class="tiny"' if max(image.size) <= LOSSLESS_SIDE else ""
            shown = f'<img{tiny} src="{picture(image)}" alt="{words}" title="{words}">'
        parts.append(f"<figure>{shown}<figcaption>{caption}</figcaption></figure>\n")
    return f'<div class="pictures">\n{"".join(parts)}</div>\n'
