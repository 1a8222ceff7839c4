"""Figures of what a trained network does: python experiments/visualize.py attention runs/cats"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a checkout need not be installed
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from experiments.cli.errors import Parser, dispatch, piped, positive
from lightning_modules.callbacks.signals import listening


def attention(argv: list[str]) -> int:
    """Draw where a vision transformer looks: its last block's attention, and the rollout over all blocks."""
    parser = Parser(
        prog="visualize.py attention",
        description=attention.__doc__,
        allow_abbrev=False,
        usage="visualize.py attention RUN [--count 8] [--out F.png] [--overwrite] [--images F ... | --data_dir D]",
        epilog="Draws images of the run's test split, else of val: the same ones for every run on these data, as "
        "--logger_args.attention does.",
    )
    parser.add_argument("run", metavar="RUN", help="Run directory, checkpoint, or exported file.")
    parser.add_argument("--count", type=positive, default=8, help="Number of images to draw.")
    parser.add_argument("--out", help="PNG file to write. Default: attention.png in the run directory.")
    parser.add_argument("--overwrite", action="store_true", help="Overwrite an existing file.")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--images", nargs="+", metavar="F", help="Image files to draw instead of the split's images.")
    given.add_argument("--data_dir", help="Folder of the data. Default: the folder that the run was trained on.")
    args = parser.parse_args(argv)
    from datamodules.loading.decode import PictureError

    try:
        return _attention(args)
    except (ValueError, OSError, PictureError) as error:
        print(f"visualize.py: {error}", file=sys.stderr)
        return 2


def _attention(args: argparse.Namespace) -> int:
    import models  # torch, timm: seconds
    from datamodules.loading.decode import open_picture
    from experiments.reporting import attention_maps
    from models import pretrained

    file = pretrained.checkpoint_in(args.run)
    out = Path(args.out) if args.out else _folder(file) / attention_maps.NAME
    if out.suffix != ".png" or out.is_dir():
        raise ValueError(f"--out {out}: names the file to write, which ends in .png")
    if out.exists() and not args.overwrite:
        raise ValueError(f"{out} is there already: --out names another file, --overwrite writes over this one")
    model, spec = models.load(file)
    if args.images:
        pictures = [(Path(each).name, open_picture(each)) for each in args.images]
    else:
        pictures = attention_maps.of_split(
            _data(file, pretrained.read_about(file)["config"], args.data_dir), args.count
        )
    drawn = attention_maps.draw(model, spec, pictures)
    out.parent.mkdir(parents=True, exist_ok=True)
    attention_maps.write(drawn, out)
    print(f"attention of {len(pictures)} pictures -> {out}")
    return 0


def _folder(file: Path) -> Path:
    """The run directory of a checkpoint, or the folder of another file."""
    return file.parents[1] if file.parent.name == "checkpoints" else file.parent


def _data(file: Path, config: dict[str, Any], data_dir: str | None) -> Any:
    """The data set of the run, its folder listed."""
    from experiments.config import Config
    from experiments.running import objects

    known, folder = {key.name for key in fields(Config)}, _folder(file)
    cfg = Config.from_plain({key: value for key, value in config.items() if key in known})
    cfg = replace(
        cfg,
        eval_only=True,
        init=str(file),
        name=folder.name,
        runs_dir=str(folder.parent),
        cache_dir=None,
        cache_side=None,
    )
    return objects.datamodule(replace(cfg, data_dir=data_dir) if data_dir else cfg)


VERBS: dict[str, Callable[[list[str]], int]] = {"attention": attention}


@listening()
def main(argv: list[str] | None = None) -> int:
    """Draw what the first word names. Returns the exit code."""
    return dispatch("visualize.py", VERBS, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(piped(main))
