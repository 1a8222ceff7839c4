"""Predictions -> a checked submission.csv: python experiments/submit.py runs/cats-predict --sample
comp/sample_submission.csv

Joined by id, never by position. What is wrong is told and nothing is written (exit code 1); else the line that hands it
in is printed.
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a checkout need not be installed
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from datamodules.loading.files import write_text
from datamodules.tables.scheme import FILES
from datamodules.tables.table import read_table
from experiments.cli.errors import Parser, invocation, piped
from experiments.prediction.submission import KINDS, Options, submission

PREDICTIONS = "predictions.csv"


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        predictions, sample, spec, name = _inputs(args)
        options = Options(args.kind, args.threshold, args.separator, args.limits and tuple(args.limits), args.clip)
        outcome = submission(read_table(sample, strip=False), read_table(predictions), spec, options)
    except (ValueError, OSError) as error:
        print(f"submit.py: {error}", file=sys.stderr)
        return 2
    for warning in outcome.warnings:
        print(f"submit.py: warning: {warning}", file=sys.stderr)
    if outcome.table is None:
        print(
            f"submit.py: {predictions} makes no submission in the form of {sample}, nothing is written:",
            file=sys.stderr,
        )
        for problem in outcome.problems:
            print(f"  {problem}", file=sys.stderr)
        if outcome.again and args.run:
            print(
                f"to predict every row: {predicting(args.run, sample, outcome.again)}, and submit the directory it "
                f"names",
                file=sys.stderr,
            )
        return 1
    for fact in outcome.facts:
        print(fact)
    out = Path(args.out)
    try:
        write_text(out, outcome.table.to_csv(index=False, lineterminator="\n"))
    except OSError as error:
        print(f"submit.py: --out {out} cannot be written: {error.strerror or error}", file=sys.stderr)
        return 2
    print(f"{len(outcome.table)} rows -> {out}")
    print(handing_in(args, out, name))
    return 0


def handing_in(args: argparse.Namespace, out: Path, name: str) -> str:
    """The command line of the kaggle tool: the file itself, or in a code competition the version of the notebook that
    wrote it."""
    competition = args.competition or "COMPETITION"
    if args.kernel:
        words = ["-f", out.name, "-k", args.kernel, "-v", str(args.version)]
    else:
        words = ["-f", str(out)]
    line = shlex.join(["kaggle", "competitions", "submit", competition, *words, "-m", args.message or name])
    return (
        line
        if args.kernel
        else f"{line}\n  (a code competition takes a notebook that writes {out.name}: add -k USER/NOTEBOOK -v VERSION)"
    )


def predicting(run: str, sample: str, again: str) -> str:
    """The command line of predict.py for what the sample asks for (`Outcome.again`)."""
    try:
        runs = [os.path.relpath(each) for each in json.loads((Path(run) / "config.yaml").read_text())["runs"]]
    except (OSError, ValueError, KeyError, TypeError):
        runs = [run]
    words = ["--csv", sample] if again == "sample" else ["--data_dir", os.path.dirname(sample) or "."]
    return (
        f"{invocation('predict')} {shlex.join([*runs, *words, *(['--bad_images', 'fill'] if again == 'some' else [])])}"
    )


def _inputs(args: argparse.Namespace) -> tuple[str, str, dict[str, Any], str]:
    """(predictions, sample, spec or {}, a name). Raises ValueError, FileNotFoundError."""
    if (args.run is None) == (args.predictions is None):
        raise ValueError(f"give a run directory, or --predictions FILE{', not both' * bool(args.run)}")
    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold:g}: must lie between 0 and 1")
    if args.limits and not args.limits[0] < args.limits[1]:
        raise ValueError(f"--limits {args.limits[0]:g} {args.limits[1]:g}: LOW must be below HIGH")
    if os.path.isdir(args.out):
        raise ValueError(f"--out {args.out}: is a folder; it names the file to write")
    predictions = Path(args.predictions) if args.predictions else Path(args.run) / PREDICTIONS
    if args.run and not os.path.isdir(args.run):
        raise FileNotFoundError(
            f"there is no run directory {args.run}"
            + "; a table of predictions is --predictions" * os.path.exists(args.run)
        )
    if not predictions.is_file():
        raise FileNotFoundError(
            f"there is no {predictions}"
            + (
                f"; {invocation('predict')} {args.run} --data_dir DIR leaves a directory that has one"
                if args.run
                else ""
            )
        )
    spec, folder = about(predictions.parent)
    sample = args.sample or next(
        (str(file) for name in FILES["sample"] if folder and (file := Path(folder) / name).is_file()), None
    )
    if sample is None:
        raise ValueError(
            f"--sample is missing: there is no {FILES['sample'][0]} in {folder or 'a folder that is known'}"
        )
    if any(os.path.realpath(args.out) == os.path.realpath(each) for each in (sample, predictions)):
        raise ValueError(f"--out {args.out}: would be written over what it is made from; name another file")
    return str(predictions), sample, spec, predictions.absolute().parent.name


def about(folder: Path) -> tuple[dict[str, Any], str | None]:
    """(specification of the data, folder of the data) as a run directory keeps them: predict.py's, a run's or its first
    fold's checkpoint; ({}, None) where there is none."""
    try:
        content = json.loads((folder / "config.yaml").read_text())
        return content["spec"], content.get("data_dir")
    except (OSError, ValueError, KeyError, TypeError):
        pass
    for place in (folder, *sorted(folder.glob("fold*"))):
        if (place / "checkpoints").is_dir():
            from models import pretrained  # torch: seconds

            try:
                content = pretrained.read_about(place)
                return content["spec"], content["config"].get("data_dir")
            except (OSError, ValueError, KeyError):
                continue
    return {}, None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="submit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="run directory with a predictions.csv")
    parser.add_argument("--predictions", help="a table of predictions instead")
    parser.add_argument(
        "--sample", help="the competition's sample_submission.csv; left out: the one in the folder of the data"
    )
    parser.add_argument("--out", default="submission.csv", help="file to write")
    parser.add_argument(
        "--as",
        dest="kind",
        choices=KINDS,
        help="what a single column takes; left out: told from sample and task. numbers, whole "
        "(rounded), probability (of the second class), label (the likeliest), labels (above --threshold, joined)",
    )
    parser.add_argument("--threshold", type=float, default=0.5, help="probability from which a label is written")
    parser.add_argument("--separator", help="between labels; left out: as in train.csv, or the sample")
    parser.add_argument(
        "--limits",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="of the numbers; left out: those of the training targets",
    )
    parser.add_argument("--clip", action="store_true", help="cut numbers to the limits")
    parser.add_argument("--competition", help="its name on Kaggle, for the line that is printed")
    parser.add_argument("--kernel", help="USER/NOTEBOOK that wrote the file, in a code competition")
    parser.add_argument("--version", type=int, default=1, help="of that notebook")
    parser.add_argument("--message", help="description; left out: the run's name")
    return parser


if __name__ == "__main__":
    sys.exit(piped(main))
