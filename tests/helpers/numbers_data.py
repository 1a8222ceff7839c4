"""A data set for tests of multilabel and regression: pictures whose colours are the targets, in memory, without a
file."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

import datamodules
from datamodules.base import PictureData
from datamodules.loading.images import Split

LINE = (
    "--data numbers --image_size 16 --model vit_nano4 --model_args.embed_dim 32 --model_args.depth 2 --recipe none "
    "--accelerator cpu "
    "--global_batch_size 8 --lr 2e-3 --workers 0 --logger csv"
)
SIZES = {"train": 40, "val": 13, "predict": 7}


@dataclass(kw_only=True, eq=False, repr=False)
class DataModule(PictureData):
    """kind: `regression`, of red (and of two targets green) in 0 to `high`; `multilabel`, which of three colours are
    bright; `classification`, whether red is. table: with ids, as a csv has them. labelled: a test split of 9 more."""

    in_memory: ClassVar[bool] = True
    kind: str = "regression"
    targets: int = 1
    high: float = 100.0
    table: bool = True
    labelled: bool = False

    def read(self) -> tuple[list[str] | None, dict[str, Split]]:
        self.task, self.id_column = self.kind, "Id" if self.table else None
        sizes, splits = SIZES | ({"test": 9} if self.labelled else {}), {}
        for seed, (name, count) in enumerate(sizes.items()):
            colour = np.random.default_rng(seed).integers(0, 200, (count, 3))
            content = {f"{name}-{n:02}".encode(): colour[n] for n in range(count)}
            ids = np.array([f"{name[0]}{n:02}" for n in range(count)]) if self.table else None
            splits[name] = Split(
                np.array([*content]),
                self._targets(colour, name),
                lambda key, content=content: picture(content[key]),
                ids,
            )
        if self.kind == "regression":
            self.target_names = ["red", "green"][: self.targets]
            self.target_range = [[0.0, float(self.high)]] * self.targets
            return None, splits
        return ["red", "green", "blue"] if self.kind == "multilabel" else ["dark", "bright"], splits

    def _targets(self, colour: np.ndarray, split: str) -> np.ndarray:
        colour = colour * (split != "predict")
        if self.kind == "regression":
            return (colour[:, : self.targets] / 200 * self.high).astype(np.float32)
        return (colour > 100).astype(np.float32) if self.kind == "multilabel" else (colour[:, 0] > 100).astype(np.int64)


def picture(colour: np.ndarray) -> Image.Image:
    noise = np.random.default_rng(int(colour.sum())).integers(0, 56, (16, 16, 3))
    return Image.fromarray((colour + noise).astype(np.uint8))


def register() -> None:
    """Make it the data set `numbers` in this process."""
    names, data_class = datamodules.names, datamodules.data_class
    datamodules.names = lambda: [*names(), "numbers"]
    datamodules.data_class = lambda name: DataModule if name == "numbers" else data_class(name)
