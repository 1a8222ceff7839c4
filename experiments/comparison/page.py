"""index.html: the comparison as one page, with its drawings inside."""

from pathlib import Path
from typing import Any

from datamodules.loading.files import write_text
from experiments.comparison.charts import style
from experiments.comparison.pairs import Matrix, Pair
from experiments.comparison.tables import Comparison, shown
from experiments.comparison.text import FULL_MATRIX, Table, cut, groups_table, headline, interval, runs_table
from experiments.reporting import page
from experiments.reporting.drawing import Drawing, Line

LONG = 44  # characters of a cell; the whole is in its title


def write_page(path: Path, found: Comparison, pairs: Matrix, charts: list[Drawing]) -> None:
    """Write the page; it works from a disk without a network, and from 400 px of width on."""
    scored = [group for group in found.groups if group.runs]
    made = page.render(
        "comparison.html",
        title=headline(found),
        notes=found.notes + pairs.notes,
        runs=_table(runs_table(found)),
        groups=_table(groups_table(found)) if any(len(group.runs) > 1 for group in found.groups) else None,
        scored=scored,
        pairs=[
            [None if row is column else _cell(pairs.pairs[row.name, column.name], found) for column in scored]
            for row in scored
        ],
        intervals=len(scored) <= FULL_MATRIX,
        what=pairs.what,
        legend=[(group, _line(*style(group))) for group in found.groups],
        charts=charts,
    )
    write_text(path, made)


def _table(table: Table) -> list[list[dict[str, Any]]]:
    """Rows of cells, the header first, without columns that are empty throughout. The second column is the name, the
    last the remarks; a long word is cut."""
    header, rows = table
    kept = [place for place in range(len(header)) if place == 1 or any(row[place] for row in rows)]
    kinds = {1: "name", len(header) - 1: "last"}

    def cell(text: str, place: int) -> dict[str, Any]:
        short = text if place == 1 or " " in text else cut(text, LONG)
        words = {"text": short.replace("+-", "\u00b1"), "whole": text if short != text else None}
        return {**words, "kind": kinds.get(place)}

    return [[cell(line[place], place) for place in kept] for line in (header, *rows)]


def _cell(pair: Pair, found: Comparison) -> dict[str, str]:
    difference, reach = shown(found.metric, pair.difference, True), interval(pair, found.metric)
    rows = f"{pair.rows:,} rows" if pair.rows else ""
    basis = ", ".join(filter(None, (pair.by, rows, "" if pair.by else pair.why)))
    title = f"{pair.first} against {pair.second}: {pair.verdict} {difference} {reach} ({basis})"
    return {"verdict": pair.verdict, "difference": difference, "interval": reach, "title": title}


def _line(colour: str, dash: str) -> Drawing:
    return Drawing(width=28, height=12, marks=[Line([(0, 6), (28, 6)], colour, 2.5, dash)])
