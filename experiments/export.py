"""A trained network as one safetensors file: python experiments/export.py runs/digits-vit_nano4-s0 --out
digits.safetensors

The file holds the tensors under timm's names and, beside them, what is needed to use them: models.load and --init read
it back.
"""

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":  # a checkout need not be installed
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from safetensors.torch import save_file

import models
from datamodules.loading.files import sha256_of, whole_file
from experiments.cli.errors import Parser, piped
from experiments.config import SPLIT
from models import pretrained


def export(source: str | Path, out: str | Path | None = None, use_ema: bool | None = None) -> Path:
    """Write the weights of a run directory (its best checkpoint) or of one checkpoint; returns the file.

    Args:
        source: run directory or checkpoint.
        out: left out: `model.safetensors` in the run directory, or beside the checkpoint.
        use_ema: as for `models.load`.

    Raises:
        FileNotFoundError, ValueError: there are no such weights, or they are not a vitlab checkpoint's.
        RuntimeError: the weights do not fit their model, tensor by tensor (torch.nn.Module.load_state_dict).
        OSError: `out` cannot be written.
    """
    file = pretrained.checkpoint_in(source)
    network, spec = models.load(file, use_ema)  # strict
    content = pretrained.read_checkpoint(file, mapped=file.suffix != ".safetensors")
    out = Path(out or (Path(source) if Path(source).is_dir() else file.parent) / "model.safetensors")
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out}: the name must end in .safetensors")
    config = content["config"]
    kept = (
        "model",
        "model_args",
        "image_size",
        "init",
        "teacher",
        *SPLIT,
    )  # the split, so that nobody scores it on what it has learned
    about = {
        "config": {key: config[key] for key in kept if key in config},
        "spec": spec,
        "fingerprint": pretrained.read_about(file)["fingerprint"],
        "use_ema": pretrained.chooses_ema(content, use_ema),
        "epoch": content.get("epoch"),
        "step": content.get("global_step"),
        "source": file.name,
        "source_sha256": sha256_of(file),
    }
    shown = {
        "model": config["model"],
        "model_args": config["model_args"],
        "classes": spec["class_names"],
        "image_size": spec["image_size"],
        "mean": spec["mean"],
        "std": spec["std"],
        "crop_pct": spec["crop_pct"],
        "source_sha256": about["source_sha256"],
    }
    metadata = {"format": "pt", "vitlab": json.dumps(about), **{key: json.dumps(value) for key, value in shown.items()}}
    weights = {name: tensor.detach().clone().contiguous() for name, tensor in network.state_dict().items()}
    with whole_file(out) as partial:
        save_file(weights, partial, metadata)
    return out


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", help="run directory (its best checkpoint) or one checkpoint")
    parser.add_argument(
        "--use_ema",
        choices=["true", "false"],
        help="averaged or raw weights; left out: the averaged where the run kept them",
    )
    parser.add_argument("--out", help="file to write; left out: model.safetensors in the run directory")
    args = parser.parse_args(argv)
    try:
        out = export(args.run, args.out, None if args.use_ema is None else args.use_ema == "true")
    except (ValueError, OSError, RuntimeError) as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 2
    print(f"{args.run} -> {out}, {out.stat().st_size / 2**20:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(piped(main))
