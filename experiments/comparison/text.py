"""The comparison in words: the tables for people, on the terminal and as Markdown (runs.md)."""

import json
import shutil
from pathlib import Path
from typing import Any

from datamodules.loading.files import write_text
from experiments.comparison.pairs import LEVEL, Matrix, Pair
from experiments.comparison.record import number
from experiments.comparison.tables import COST, Comparison, Group, shown, with_spread

Table = tuple[list[str], list[list[str]]]
FULL_MATRIX = (
    12  # groups; of more, Markdown has only the best against the others, and the page no intervals in its cells
)
TITLES = {"params": "parameters", "gmacs": "GMACs", "images_per_sec": "images/s", "hours": "hours"}
LONGEST = 28  # characters of a value on the terminal


def runs_table(found: Comparison) -> Table:
    """One row a run, best first: group, name, scores, what differs in the configs, costs, remarks."""
    tested, differing = found.tested[:1], [key for key in found.differing if key != "seed"]
    header = ["#", "run", "seed", found.metric, *tested, *differing, *(TITLES[key] for key in COST), "remarks"]
    rows = []
    for run in found.records:
        knobs = run.knobs()
        rows.append(
            [
                str(found.group_of(run).number),
                run.name,
                plain(run.value("seed")),
                shown(found.metric, found.score(run)) or run.state,
                *(shown(key, run.value(key) if number(run.value(key)) else None) for key in tested),
                *(plain(knobs.get(key)) for key in differing),
                *(cost(key, run.value(key)) for key in COST),
                "; ".join(run.notes + [f"{len(run.folds)} folds"] * bool(run.folds)),
            ]
        )
    return header, rows


def groups_table(found: Comparison) -> Table:
    """One row a group: mean +- standard deviation (number of runs)."""
    tested, differing = found.tested[:1], list(found.groups[0].knobs) if found.groups else []
    header = ["#", "group", found.metric, *tested, *differing, *(TITLES[key] for key in COST), "remarks"]
    rows = []
    for group in found.groups:
        means = {key: sum(values) / len(values) if (values := group.of(key)) else None for key in COST}
        rows.append(
            [
                str(group.number),
                group.name,
                with_spread(found.metric, group.scores),
                *(with_spread(key, group.of(key)) for key in tested),
                *(plain(group.knobs.get(key)) for key in differing),
                *(cost(key, means[key]) for key in COST),
                remarks(group),
            ]
        )
    return header, rows


def remarks(group: Group) -> str:
    seeds = [run.value("seed") for run in group.runs]
    notes = [f"{len(group.rest)} without a score"] * bool(group.rest)
    notes += ["folds: overall score"] * any(run.folds for run in group.runs)
    notes += ["the same seed twice: no independent runs"] * (len({*map(str, seeds)}) < len(seeds))
    return "; ".join(notes)


def plain(value: Any) -> str:
    """A config value for people; None is empty."""
    if value is None:
        return ""
    return (
        value
        if isinstance(value, str)
        else f"{value:g}"
        if isinstance(value, float)
        else json.dumps(value, default=str)
    )


def cut(text: str, length: int) -> str:
    """At most so many characters; of a path the end."""
    return text if len(text) <= length else "…" + text[1 - length :] if "/" in text else text[: length - 1] + "…"


def cost(key: str, value: Any) -> str:
    """Parameters in millions, the others to three digits."""
    if not number(value):
        return ""
    if key == "params":
        return f"{value / 1e6:.3g} M"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def verdict(pair: Pair, metric: str) -> str:
    """`better +1.20 [+0.40, +2.00]`, `noise ...`, `unknown`."""
    if pair.low is None:
        return pair.verdict
    return f"{pair.verdict} {shown(metric, pair.difference, True)} {interval(pair, metric)}"


def interval(pair: Pair, metric: str) -> str:
    """`[+0.40, +2.00]`, or nothing."""
    return "" if pair.low is None else f"[{shown(metric, pair.low, True)}, {shown(metric, pair.high, True)}]"


def against_best(found: Comparison, pairs: Matrix) -> Table:
    """The best group against each other one, a row each."""
    scored = [group for group in found.groups if group.runs]
    rows = []
    for other in scored[1:]:
        pair = pairs.pairs[scored[0].name, other.name]
        basis = f"{pair.by}{f', n = {pair.rows:,}' if pair.rows else ''}" if pair.by else pair.why
        difference, reach = shown(found.metric, pair.difference, True), interval(pair, found.metric)
        rows.append([str(other.number), other.name, pair.verdict, difference, reach, basis])
    return [
        "#",
        f"{scored[0].name} is, against" if scored else "",
        "",
        "difference",
        f"{LEVEL:.0%} interval",
        "by",
    ], rows


def matrix_table(found: Comparison, pairs: Matrix) -> Table:
    """Row against column."""
    scored = [group for group in found.groups if group.runs]
    header = ["", *(f"{group.number}" for group in scored)]
    return header, [
        [
            f"{row.number} {row.name}",
            *("" if row is column else verdict(pairs.pairs[row.name, column.name], found.metric) for column in scored),
        ]
        for row in scored
    ]


def markdown(table: Table) -> str:
    def line(cells: list[str]) -> str:
        return (
            "| "
            + " | ".join(
                cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;") for cell in cells
            )
            + " |"
        )

    header, rows = table
    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


def write_markdown(path: Path, found: Comparison, pairs: Matrix) -> None:
    """runs.md: what the page shows, for a README or an issue."""
    scored = [group for group in found.groups if group.runs]
    parts = [f"# {headline(found)}", *(f"* {note}" for note in found.notes + pairs.notes), markdown(runs_table(found))]
    if any(len(group.runs) > 1 for group in found.groups):
        parts += [
            "## Seeds folded: mean +- standard deviation of a sample (number of runs)",
            markdown(groups_table(found)),
        ]
    if len(scored) > 1:
        parts += ["## Better, worse or noise", pairs.what]
        parts += (
            [markdown(matrix_table(found, pairs))]
            if len(scored) <= FULL_MATRIX
            else [markdown(against_best(found, pairs))]
        )
    write_text(path, "\n\n".join([*parts, "![curves](curves.png)"]) + "\n")


def headline(found: Comparison) -> str:
    runs, groups = len(found.records), len(found.groups)
    return (
        f"{runs} run{'s' * (runs != 1)}"
        + f" in {groups} group{'s' * (groups != 1)}" * (groups != runs)
        + f" by {found.metric} ({'smaller' if found.smaller else 'larger'} is better)"
    )


def terminal(found: Comparison, pairs: Matrix) -> str:
    """What is printed; columns that the terminal has no room for stand in the files."""
    width = shutil.get_terminal_size((160, 24)).columns
    several = any(len(group.runs) > 1 for group in found.groups)
    parts = [headline(found), aligned(runs_table(found), width)]
    parts += (
        ["Seeds folded: mean +- standard deviation (number)", aligned(groups_table(found), width, say=False)]
        if several
        else []
    )
    parts += [f"{pairs.what}\n\n{aligned(against_best(found, pairs), width)}"] if pairs.pairs else []
    return "\n\n".join(
        [
            *parts,
            *(["\n".join(f"Note: {note}" for note in found.notes + pairs.notes)] if found.notes + pairs.notes else []),
        ]
    )


def aligned(table: Table, width: int, say: bool = True) -> str:
    """Columns side by side, numbers to the right. The config's come before the costs where there is no room for all,
    each from the left (`say`: and which are left out); long remarks are cut."""
    header, rows = table
    rows = [[cell if place == 1 else cut(cell, LONGEST) for place, cell in enumerate(row)] for row in rows]
    sizes = [max(len(each) for each in column) for column in zip(header, *rows)]
    filled = [place for place, column in enumerate(zip(*rows)) if any(column)]
    last = header.index(TITLES["params"]) if TITLES["params"] in header else 0
    first = (
        max((place for place, name in enumerate(header[:last]) if "/" in name), default=len(header)) + 1
    )  # after the scores
    kept = [place for place in filled if place < first or place == len(header) - 1 or not last]
    for place in sorted(filled, key=lambda place: (not first <= place < last, place)):
        if place not in kept and sum(sizes[each] + 2 for each in kept) + sizes[place] <= width:
            kept.append(place)
    left, dropped = {1, len(header) - 1}, [header[place] for place in filled if place not in kept]
    lines = [
        "  ".join(
            row[place].ljust(sizes[place]) if place in left else row[place].rjust(sizes[place])
            for place in sorted(kept)
        ).rstrip()
        for row in [header, *rows]
    ]
    return "\n".join([*lines, *([f"(no room here, in runs.csv: {', '.join(dropped)})"] if dropped and say else [])])
