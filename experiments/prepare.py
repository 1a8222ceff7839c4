"""Work done once, ahead of training: python experiments/prepare.py teacher --out DIR <the flags of run.py, with
--teacher>"""

import sys
from pathlib import Path

if __name__ == "__main__":  # a checkout need not be installed
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from experiments.cli.errors import Parser, dispatch, piped, positive
from experiments.config import read
from lightning_modules.callbacks.signals import listening


def teacher(argv: list[str]) -> int:
    """Write down what the teacher of a run answers, so that the run trains without it (`--teacher DIR`)."""
    parser = Parser(
        prog="prepare.py teacher",
        description=teacher.__doc__,
        allow_abbrev=False,
        usage="prepare.py teacher --out DIR [--topk K] [--view fixed] [--check_cache N] <the flags of run.py>",
        epilog="The other flags are those of the run that will use it (run.py --help), --teacher among them. "
        "The same command again goes on where it was stopped.",
    )
    parser.add_argument("--out", required=True, help="folder of the cache")
    parser.add_argument(
        "--topk",
        type=positive,
        default=10,
        help="likeliest classes to keep of each picture; as many as there are keeps all",
    )
    parser.add_argument(
        "--view",
        choices=["fixed"],
        help="fixed: the teacher sees each picture once, as for evaluation; left out: the very "
        "pictures of training, epoch by epoch, and once where training never changes them",
    )
    parser.add_argument(
        "--check_cache",
        type=positive,
        metavar="N",
        help="write nothing: run the teacher again on N pictures, tell how far the cache is from it, exit 1 if far",
    )
    args, flags = parser.parse_known_args(argv)
    command = read([*flags, "--runs_dir", args.out, "--dry_run"], "prepare.py")
    from experiments.preparing import teacher_shards  # torch and lightning: seconds, so after --help and mistakes

    return teacher_shards.main(command, args.out, topk=args.topk, fixed=args.view == "fixed", check=args.check_cache)


def duplicates(argv: list[str]) -> int:
    """Write groups of pictures that are (nearly) the same, so that no split parts them (`--group groups.csv`)."""
    parser = Parser(
        prog="prepare.py duplicates",
        description=duplicates.__doc__,
        allow_abbrev=False,
        usage="prepare.py duplicates --data_dir DIR [--out groups.csv] [--threshold 0.9] [--model RUN]",
        epilog="Other flags say what the table means, as those of run.py do (--target, --image, --group ...). A group "
        "column of the table is united with what is found.",
    )
    parser.add_argument("--out", default="groups.csv", help="file to write: the id column and group")
    parser.add_argument(
        "--threshold",
        type=float,
        help="least share of equal bits of a perceptual hash of 256 bits, 0.9 where left out; with "
        "--model least cosine, 0.97",
    )
    parser.add_argument(
        "--model", help="compare the features of a network instead: a run, a file, or a name with its published weights"
    )
    args, flags = parser.parse_known_args(argv)
    if args.threshold is not None and not 0 < args.threshold <= 1:
        parser.error(f"--threshold {args.threshold}: above 0 and up to 1")
    command = read([*flags, "--recipe", "none"], "prepare.py")
    from experiments.preparing import duplicates as work  # torch: seconds, so after --help and mistakes

    try:
        return work.main(command, args.out, threshold=args.threshold, model=args.model)
    except (ValueError, FileNotFoundError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2


def cache(argv: list[str]) -> int:
    """Decode and resize the pictures of a run once, so that its training reads no picture file (`--cache_dir DIR`)."""
    parser = Parser(
        prog="prepare.py cache",
        description=cache.__doc__,
        allow_abbrev=False,
        usage="prepare.py cache --cache_dir DIR --data_dir DIR --model NAME <the other flags of the run>",
        epilog="Side and filter of the pictures follow from the flags of the run that uses them (run.py --help): "
        "--model, --image_size, --crop_pct, --augment_args.train_size, --data_args.interpolation, or a recipe; "
        "--data_args.cache_side gives the side itself. The same command again goes on where it was stopped.",
    )
    parser.add_argument("--cache_dir", required=True, help="folder of all caches")
    args, flags = parser.parse_known_args(argv)
    command = read([*flags, "--cache_dir", args.cache_dir], "prepare.py")
    if command.config.model is None:
        print(
            "prepare.py: --model is missing: side and filter of the cached pictures follow from the flags of the run, "
            "so give those here "
            "(--help tells which count)",
            file=sys.stderr,
        )
        return 2
    from experiments.preparing import image_cache

    return image_cache.main(command)


VERBS = {"teacher": teacher, "cache": cache, "duplicates": duplicates}


@listening()
def main(argv: list[str] | None = None) -> int:
    """Run the verb that the first word names. Returns the exit code."""
    return dispatch("prepare.py", VERBS, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(piped(main))
