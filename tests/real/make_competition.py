"""A competition's folder from real pictures: train.csv, test.csv, sample_submission.csv, train/ and test/.

python tests/real/make_competition.py labels|multilabel DIR_OF_CLASS_FOLDERS OUT [--per_class 250]
    CIFAR-10's class folders: string labels, or the labels animal, vehicle and flies joined by spaces; a fifth of the pictures is test,
    and its labels are in OUT_solution.csv.
python tests/real/make_competition.py compress DIR_OF_PHOTOS OUT
    any photos: the target is how well one compresses, bytes per pixel of it as a JPEG of 256x256 at quality 75, to be told from 64x64 pixels.
"""
import argparse
import csv
import io
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

VEHICLES, FLYING = {"airplane", "automobile", "ship", "truck"}, {"airplane", "bird"}


def words(name: str) -> str:
    """The labels of one of CIFAR-10's classes."""
    return " ".join([("vehicle" if name in VEHICLES else "animal"), *["flies"] * (name in FLYING)])


def jpeg_bytes(file: Path) -> int:
    written = io.BytesIO()
    Image.open(file).convert("RGB").resize((256, 256), Image.Resampling.BICUBIC).save(written, "JPEG", quality=75)
    return len(written.getvalue())


def rows_of(kind: str, source: Path, per_class: int) -> list[tuple[Path, str]]:
    """(file, target) of each picture."""
    if kind == "compress":
        files = sorted(file for file in source.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg"))
        return [(file, f"{jpeg_bytes(file) / 256**2:.5f}") for file in files]
    found = []
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        found += [(file, folder.name if kind == "labels" else words(folder.name)) for file in sorted(folder.iterdir())[:per_class]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["labels", "multilabel", "compress"])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--per_class", type=int, default=250)
    args = parser.parse_args()
    rows = rows_of(args.kind, args.source, args.per_class)
    order = np.random.RandomState(0).permutation(len(rows))
    target = {"labels": "label", "multilabel": "labels", "compress": "bytes_per_pixel"}[args.kind]
    suffix = "png" if args.kind == "compress" else "jpg"
    tables: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for place, row in enumerate(order):
        split = "test" if place < len(rows) // 5 else "train"
        file, value = rows[row]
        name = f"{args.kind}_{row:05d}"
        (args.out / split).mkdir(parents=True, exist_ok=True)
        if args.kind == "compress":
            Image.open(file).convert("RGB").resize((64, 64), Image.Resampling.BICUBIC).save(args.out / split / f"{name}.{suffix}")
        else:
            shutil.copyfile(file, args.out / split / f"{name}.{suffix}")
        tables[split].append((name, value))
    filler = "0.0" if args.kind == "compress" else tables["train"][0][1]
    for name, header, content in (("train", ["id", target], tables["train"]), ("test", ["id"], [row[:1] for row in tables["test"]]),
                                  ("sample_submission", ["id", target], [(row[0], filler) for row in tables["test"]]),
                                  ("solution", ["id", target], tables["test"])):
        folder = args.out.with_name(f"{args.out.name}_{name}") if name == "solution" else args.out / name
        with open(folder.with_suffix(".csv"), "w", newline="") as out:
            csv.writer(out).writerows([header, *content])
    print(f"{args.out}: {len(tables['train'])} training and {len(tables['test'])} test pictures")


if __name__ == "__main__":
    main()
