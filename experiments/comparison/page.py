# ruff: noqa: E501
"""index.html: the comparison as one page, with its pictures inside and nothing fetched."""

from html import escape
from pathlib import Path

from experiments.comparison import charts as compare_charts
from experiments.comparison.charts import Chart, data_address
from experiments.comparison.pairs import Matrix, Pair
from experiments.comparison.tables import Comparison, shown
from experiments.comparison.text import FULL_MATRIX, Table, cut, groups_table, headline, matrix_table, runs_table

LONG = 44  # characters of a cell; the whole is in its title
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #555; --page: #fff; --head: #f4f4f4; --edge: #d9d9d9; --line: #ececec;
  --better: #d3ecd9; --worse: #f7d9d3; --unknown: #f1f1f1; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e8eb; --soft: #9ba5af; --page: #16191c; --head: #20252a; --edge: #454d55; --line: #2b3137;
    --better: #1d4a2e; --worse: #5c2a24; --unknown: #2b3137; }
  figure img, .legend svg { filter: invert(0.9) hue-rotate(180deg); } }
body { font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto;
  max-width: 1240px; padding: 12px 16px 40px; }
h1 { font-size: 20px; margin: 8px 0; } h2 { font-size: 16px; margin: 28px 0 8px; } p, ul { margin: 6px 0 10px; max-width: 75em; }
p, li, h1 { overflow-wrap: anywhere; }
.scroll { overflow: auto; max-height: 85vh; border: 1px solid var(--edge); border-radius: 4px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 9px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); vertical-align: top;
  background: var(--page); }
th { font-weight: 600; background: var(--head); position: sticky; top: 0; z-index: 2; } th.name { z-index: 3; } tr:last-child td { border-bottom: 0; }
.name, .last { text-align: left; }
.name { position: sticky; left: 0; z-index: 1; border-right: 1px solid var(--edge); white-space: normal; overflow-wrap: anywhere;
        min-width: 280px; }
.last { white-space: normal; min-width: 14em; }
.matrix :not(.name) { text-align: center; min-width: 58px; }
.matrix small { display: block; color: var(--soft); font-size: 12px; }
.better { background: var(--better); } .worse { background: var(--worse); } .unknown { background: var(--unknown); color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 14px; }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: 2px; } img { width: 100%; height: auto; display: block; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 2px 18px; max-width: none; } .legend svg { vertical-align: middle; }
@media (max-width: 600px) {
  body { padding: 8px 8px 30px; font-size: 13px; } .name { min-width: 118px; max-width: 38vw; } th, td { padding: 3px 6px; } }
"""


def write_page(path: Path, found: Comparison, pairs: Matrix, charts: list[Chart]) -> None:
    """Write the page; it works from a disk without a network, and from 400 px of width on."""
    scored = [group for group in found.groups if group.runs]
    parts = [f"<h1>{escape(headline(found))}</h1>"]
    if found.notes + pairs.notes:
        parts.append("<ul>" + "".join(f"<li>{escape(note)}</li>" for note in found.notes + pairs.notes) + "</ul>")
    seeds, runs = any(len(group.runs) > 1 for group in found.groups), ["<h2>Runs</h2>", _table(runs_table(found))]
    if seeds:
        parts += [
            "<h2>Seeds folded</h2><p>Mean ± standard deviation of a sample, number of runs in brackets; a run over "
            "all folds counts once, "
            "with its score over all rows.</p>",
            _table(groups_table(found)),
        ]
    else:
        parts += runs
    if len(scored) > 1:
        parts += [
            f"<h2>Better, worse or noise</h2><p>Row against column: the difference of the metric, first less second, "
            f"and its interval. "
            f"{escape(pairs.what)}</p>",
            _matrix(found, pairs),
        ]
    parts += [
        "<h2>Curves and costs</h2>",
        _legend(found),
        '<div class="charts">',
        *map(_figure, charts),
        "</div>",
        *(runs if seeds else []),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width, initial-scale=1">'
        f"<title>{escape(headline(found))}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    path.write_text(page, encoding="utf-8", errors="replace")


def _table(table: Table) -> str:
    """A table that scrolls sideways, its second column staying; columns that are empty throughout are left out."""
    header, rows = table
    kept = [place for place in range(len(header)) if place == 1 or any(row[place] for row in rows)]

    def line(cells: list[str], tag: str) -> str:
        kinds = {1: ' class="name"', len(header) - 1: ' class="last"'}
        texts = [text if place == 1 else _cut(text) for place, text in enumerate(cells)]
        shown_cells = (
            f"<{tag}{kinds.get(place, '')}{_whole(cells[place], texts[place])}>{escape(texts[place])}</{tag}>"
            for place in kept
        )
        return f"<tr>{''.join(shown_cells)}</tr>"

    return f'<div class="scroll"><table>{line(header, "th")}{"".join(line(row, "td") for row in rows)}</table></div>'.replace(
        "+-", "±"
    )


def _cut(text: str) -> str:
    return text if " " in text else cut(text, LONG)


def _whole(text: str, shown_text: str) -> str:
    return f' title="{escape(text)}"' if text != shown_text else ""


def _matrix(found: Comparison, pairs: Matrix) -> str:
    header, rows = matrix_table(found, pairs)
    scored, full = [group for group in found.groups if group.runs], len(header) - 1 <= FULL_MATRIX
    heads = "".join(f'<th title="{escape(group.name)}">{group.number}</th>' for group in scored)
    lines = [f'<tr><th class="name"></th>{heads}</tr>']
    for row, texts in zip(scored, rows):
        cells = "".join(
            "<td></td>" if row is column else _cell(pairs.pairs[row.name, column.name], found, full)
            for column in scored
        )
        lines.append(f'<tr><td class="name">{escape(texts[0])}</td>{cells}</tr>')
    return f'<div class="scroll"><table class="matrix">{"".join(lines)}</table></div>'


def _cell(pair: Pair, found: Comparison, full: bool) -> str:
    difference, reach = shown(found.metric, pair.difference, True), ""
    if pair.low is not None:
        reach = f"[{shown(found.metric, pair.low, True)}, {shown(found.metric, pair.high, True)}]"
    basis = ", ".join(
        filter(None, (pair.by, f"{pair.rows:,} rows" if pair.rows else "", pair.why if not pair.by else ""))
    )
    title = f"{pair.first} against {pair.second}: {pair.verdict} {difference} {reach} ({basis})"
    return (
        f'<td class="{pair.verdict}" '
        f'title="{escape(title)}">{pair.verdict}<small>{difference}{f"<br>{reach}" if full else ""}</small></td>'
    )


def _legend(found: Comparison) -> str:
    items = []
    for group in found.groups:
        colour, dashes = compare_charts.style(group)
        line = (
            f'<line x1="0" y1="6" x2="28" y2="6" stroke="{colour}" stroke-width="2.5" '
            f'stroke-dasharray="{compare_charts.DASH_ARRAYS[dashes]}"/>'
        )
        items.append(
            f'<li><svg width="28" height="12" aria-hidden="true">{line}</svg> {group.number} {escape(group.name)}</li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _figure(chart: Chart) -> str:
    return (
        f'<figure><figcaption>{escape(chart.title)}</figcaption><img alt="{escape(chart.text)}" '
        f'src="{data_address(chart)}"></figure>'
    )
