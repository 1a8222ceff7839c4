"""Compares runs: python experiments/compare.py runs --out comparison

A place is a run directory, a folder of them, a .wandb file or a folder of those, or a W&B project as entity/project.
Written into DIR: runs.csv (one row a run), groups.csv (mean over seeds), runs.md, curves.png and index.html (one page,
which works without a network).
"""

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":  # a checkout need not be installed
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from experiments.cli.errors import Parser, piped
from experiments.comparison import pairs as compare_pairs
from experiments.comparison import records, tables, text


def compare(
    places: list[str], out: str | Path, metric: str | None = None
) -> tuple[tables.Comparison, compare_pairs.Matrix]:
    """Read the runs, write the files into `out`, and return what they show.

    Args:
        places: run directories, folders of them, .wandb files, or W&B's entity/project.
        metric: key of result.json to compare by; left out: the commonest of the runs' own.

    Raises:
        UsageError (ValueError), FileNotFoundError: a place without runs, or no run with a score.
        OSError: `out` cannot be written.
    """
    from experiments.comparison import charts as compare_charts  # matplotlib
    from experiments.comparison import page

    found = tables.compare(records.find(places), metric)
    pairs = compare_pairs.matrix(found)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tables.write_runs(out / "runs.csv", found)
    tables.write_groups(out / "groups.csv", found)
    text.write_markdown(out / "runs.md", found, pairs)
    charts = compare_charts.charts(found)
    compare_charts.write_png(out / "curves.png", found, charts)
    page.write_page(out / "index.html", found, pairs, charts)
    return found, pairs


def main(argv: list[str] | None = None) -> int:
    """Compare and print the table. Returns the exit code."""
    parser = Parser(
        prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "places", nargs="+", metavar="RUN_OR_FOLDER_OR_entity/project", help="Runs to compare, from one or more places."
    )
    parser.add_argument(
        "--out", default="comparison", metavar="DIR", help="Folder for the files written. Default: comparison."
    )
    parser.add_argument(
        "--metric",
        metavar="KEY",
        help="Key of result.json to compare by, such as test/acc1. Default: the most common metric of the runs.",
    )
    parser.add_argument(
        "--report", action="store_true", help="Also make a report and a workspace in W&B, for the entity/project given."
    )
    args = parser.parse_args(argv)
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        if args.report:
            from experiments.comparison import wandb_report

            project = wandb_report.ready(args.places)
        found, pairs = compare(args.places, args.out, args.metric)
        print(text.terminal(found, pairs))
        written = ("index.html", "runs.csv", "groups.csv", "runs.md", "curves.png")
        print(f"\nwritten: {', '.join(str(Path(args.out) / name) for name in written)}")
        if args.report:
            print("\n".join(wandb_report.save(project, found)))
    except (ValueError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(piped(main))
