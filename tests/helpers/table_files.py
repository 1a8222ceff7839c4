"""Small competitions on disk, for tests."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

import datamodules

PAWPULARITY = next(
    (found for root in Path(__file__).parents[2:4] if (found := root / "shared/data/pawpularity").is_dir()),
    Path("shared/data/pawpularity"),
)
COMMON = {"image_size": 16, "workers": 0, "global_batch_size": 4}


def write_picture(path: Path, seed: int = 0, side: int = 12) -> None:
    """Noise, in the format of the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(seed).randint(0, 255, (side, side, 3)).astype(np.uint8)).save(path)


def write_comp(
    root: Path,
    train: dict,
    test: dict | None = None,
    sample: dict | None = None,
    pictures: str | None = "{split}/{Id}.jpg",
) -> Path:
    """train.csv, test.csv and sample_submission.csv of these columns in `root`, and a picture for each row. Returns the
    folder."""
    root.mkdir(exist_ok=True)
    for name, columns in (("train.csv", train), ("test.csv", test), ("sample_submission.csv", sample)):
        if columns is not None:
            pd.DataFrame(columns).to_csv(root / name, index=False)
    for split, columns in (("train", train), ("test", test if test is not None else sample)):
        for row, values in enumerate(
            pd.DataFrame(columns).to_dict("records") if columns is not None and pictures else ()
        ):
            write_picture(root / pictures.format(**{**values, "split": split}), row + 1000 * (split == "test"))
    return root


def table(root: Path, name: str = "csv", **knobs: Any) -> Any:
    """The data module of a folder."""
    return datamodules.create(name, **{**COMMON, "data_dir": str(root), **knobs})


def ids(count: int, prefix: str = "a") -> list[str]:
    return [f"{prefix}{number:03}" for number in range(count)]
