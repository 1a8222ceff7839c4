"""A competition's folder from real pictures: train.csv, test.csv, sample_submission.csv, train/ and test/.

python tests/real/make_competition.py labels|multilabel DIR_OF_CLASS_FOLDERS OUT [--per_class 250]
    CIFAR-10's class folders: string labels, or the labels animal, vehicle and flies joined by spaces; a fifth of the
    pictures is test, and its labels are in OUT_solution.csv.
python tests/real/make_competition.py compress DIR_OF_PHOTOS OUT
    any photos: the target is how well one compresses, bytes per pixel of it as a JPEG of 256x256 at quality 75, to be
    told from 64x64 pixels.
"""

import argparse
import csv
import io
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

VEHICLES, FLYING = {"airplane", "automobile", "ship", "truck"}, {"airplane", "bird"}
ANIMALS = {"bird", "cat", "deer", "dog", "frog", "horse"}
TARGETS = {"labels": "label", "multilabel": "labels", "compress": "bytes_per_pixel"}


def words(name: str) -> str:
    """The labels of one of CIFAR-10's classes."""
    return " ".join([("vehicle" if name in VEHICLES else "animal"), *["flies"] * (name in FLYING)])


def jpeg_bytes(file: Path) -> int:
    written = io.BytesIO()
    Image.open(file).convert("RGB").resize((256, 256), Image.Resampling.BICUBIC).save(written, "JPEG", quality=75)
    return len(written.getvalue())


def pictures_in(folder: Path) -> list[Path]:
    return sorted(
        file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in Image.registered_extensions()
    )


def rows_of(kind: str, source: Path, per_class: int) -> list[tuple[Path, str]]:
    """(file, target) of each picture. Raises ValueError for a folder that does not hold what is wanted."""
    if not source.is_dir():
        raise ValueError(f"{source} is no folder")
    if kind == "compress":
        files = sorted(file for file in source.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg"))
        if len(files) < 10:
            raise ValueError(f"{source} holds {len(files)} JPEGs; wanted are ten photos at least, in it or below it")
        return [(file, f"{jpeg_bytes(file) / 256**2:.5f}") for file in files]
    classes = {folder.name: pictures_in(folder)[:per_class] for folder in sorted(source.iterdir()) if folder.is_dir()}
    empty = [name for name, files in classes.items() if not files]
    if empty or len(classes) < 2:
        below = next(
            (source / name for name in empty if any(each.is_dir() for each in (source / name).iterdir())), None
        )
        found = f"no pictures in {empty[0]}/" if empty else f"{len(classes)} folders"
        raise ValueError(
            f"{source} holds {found}; wanted is a folder of pictures for each class, as airplane/*.jpg"
            + f": {below} may be meant" * bool(below)
        )
    if kind == "multilabel" and (strange := sorted({*classes} - VEHICLES - ANIMALS)):
        known = ", ".join(sorted(VEHICLES | ANIMALS))
        raise ValueError(f"{source} has a class {strange[0]}; wanted are CIFAR-10's ({known}), whose labels are known")
    return [(file, name if kind == "labels" else words(name)) for name, files in classes.items() for file in files]


def write(kind: str, rows: list[tuple[Path, str]], folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Pictures and tables of a competition in a new folder, and solution.csv; returns (id, target) of train and of
    test."""
    tables: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for split in tables:
        (folder / split).mkdir(parents=True)
    for place, row in enumerate(np.random.RandomState(0).permutation(len(rows))):
        split = "test" if place < len(rows) // 5 else "train"
        file, value = rows[row]
        name = f"{kind}_{row:05d}"
        if kind == "compress":
            Image.open(file).convert("RGB").resize((64, 64), Image.Resampling.BICUBIC).save(
                folder / split / f"{name}.png"
            )
        else:
            shutil.copyfile(file, folder / split / f"{name}{file.suffix.lower()}")
        tables[split].append((name, value))
    filler, target = "0.0" if kind == "compress" else tables["train"][0][1], TARGETS[kind]
    for name, header, content in (
        ("train", ["id", target], tables["train"]),
        ("test", ["id"], [row[:1] for row in tables["test"]]),
        ("sample_submission", ["id", target], [(row[0], filler) for row in tables["test"]]),
        ("solution", ["id", target], tables["test"]),
    ):
        with open(folder / f"{name}.csv", "w", newline="") as out:
            csv.writer(out).writerows([header, *content])
    return tables


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["labels", "multilabel", "compress"])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--per_class", type=int, default=250)
    args = parser.parse_args(argv)
    partial, solution = (
        args.out.with_name(f".{args.out.name}.partial"),
        args.out.with_name(f"{args.out.name}_solution.csv"),
    )
    try:
        if args.out.exists():
            raise ValueError(f"{args.out} is there already: another OUT, or delete it")
        rows = rows_of(args.kind, args.source, args.per_class)
        shutil.rmtree(partial, ignore_errors=True)
        tables = write(args.kind, rows, partial)
        os.replace(partial / "solution.csv", solution)
        os.replace(partial, args.out)
    except (ValueError, OSError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        print(f"make_competition.py: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {len(tables['train'])} training and {len(tables['test'])} test pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
