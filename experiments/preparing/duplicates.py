"""Find pictures of a table that are (nearly) the same, and write groups that keep them on one side of every split."""

import csv
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

import datamodules
import models
from datamodules.knobs import Table
from datamodules.loading import perceptual_hash
from datamodules.loading.cores import cores
from datamodules.loading.decode import PictureError
from datamodules.loading.files import whole_file
from datamodules.loading.workers import worker_count
from datamodules.tables import folds
from datamodules.transforms.image_transforms import eval_transform
from experiments.cli.errors import UsageError
from experiments.config import Command, Config
from experiments.running import objects
from models import pretrained

THRESHOLDS = {"hash": 0.9, "model": 0.97}
SHOWN = 5


def main(command: Command, out: str, *, threshold: float | None, model: str | None) -> int:
    """Compare the pictures of train.csv with each other and with those to predict; write (id, group) of every row,
    united with the table's own groups. Returns the exit code. Raises ValueError or FileNotFoundError for what a person
    must mend."""
    data = _data(command.config)
    parts = {name: data.splits[name] for name in ("train", "val", "predict", "test") if name in data.splits}
    least = THRESHOLDS["model" if model else "hash"] if threshold is None else threshold
    vectors, mirrored, readable = _embedded(parts, model, command.config.workers) if model else _hashed(parts)
    asked = np.repeat([name in ("predict", "test") for name in parts], [len(split) for split in parts.values()])
    ids = np.concatenate([split.ids for split in parts.values()])
    one, other, likes = _pairs(vectors, mirrored, readable, least if model else 2 * least - 1)
    likes = likes if model else (1 + likes) / 2
    inside = ~asked[one] & ~asked[other]
    of_train = ids[~asked]
    place = np.cumsum(~asked) - 1
    number = dict(zip(of_train, perceptual_hash.groups(len(of_train), place[one[inside]], place[other[inside]])))
    alone = iter(range(len(of_train), len(of_train) + len(data.train_ids)))
    group = np.array(
        [number[each] if each in number else next(alone) for each in data.train_ids]
    )  # a row without its picture stays alone
    sizes = np.bincount(group)
    what = f"cosine of {model}'s features" if model else "of 256 bits equal"
    print(
        f"{len(of_train):,} pictures of train: {int(inside.sum()):,} pairs alike (at least {least:g} {what}; mirrored "
        f"ones too), "
        f"{int((sizes > 1).sum()):,} groups, the largest of {sizes.max()}"
    )
    _tell(ids, one, other, likes, inside, data)
    if sizes.max() > max(10, len(of_train) / 20):
        print(
            f"the largest group holds {sizes.max()} of {len(of_train):,} pictures: if they are not the same, a higher "
            f"--threshold"
        )
    if leaks := len(np.unique(other[~asked[one] & asked[other]])):
        print(f"{leaks:,} pictures to predict are like one of train")
    if not readable.all():
        print(f"{int((~readable).sum()):,} pictures cannot be read and are in no group")
    own = data.table_scheme["group"]
    group = folds.union(group, data.groups) if data.groups is not None else folds.union(group)
    _write(Path(out), data.id_column, data.train_ids, group)
    print(
        f"{out}: group of {len(group):,} ids"
        + f", united with those of {own}" * bool(own)
        + f"; use it with --group {out}"
    )
    return 0


def _data(cfg: Config) -> Any:
    """The table; of the flags only those that say what it is."""
    if not cfg.data_dir:
        raise UsageError("--data_dir is missing: the folder with train.csv")
    of_table = {knob.name for knob in fields(Table)} - {"folds", "fold", "metric"}
    kept = {key: getattr(cfg, key) for key in ("data_dir", "data_args", "bad_images", *of_table)}
    small = Config(**kept, data=cfg.data or datamodules.detect(cfg.data_dir), model="vit_nano4", global_batch_size=1)
    data = objects.datamodule(small.filled(**models.preprocessing(small.model) | {"image_size": 32}))
    if data.id_column is None:
        raise UsageError(f"--data_dir {cfg.data_dir}: duplicates are for tables, folders with train.csv")
    return data


def _hashed(parts: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, 256) units of all pictures, of their mirror images, and which could be read."""
    blank, found = np.zeros((2, perceptual_hash.BITS), bool), []
    for name, split in parts.items():
        every = perceptual_hash.hashes(split.names.tolist(), split.open, threads=cores())
        found += _bar(every, f"hashes of {name}", len(split))
    bits = np.stack([blank if pair is None else np.stack(pair) for pair in found])  # (N, 2, 256)
    return (
        perceptual_hash.units(bits[:, 0]),
        perceptual_hash.units(bits[:, 1]),
        np.array([pair is not None for pair in found]),
    )


@torch.inference_mode()
def _embedded(parts: dict[str, Any], source: str, workers: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of a network's pooled features, (N, D) each of length 1: of a run or a file, or of a name with its
    published weights."""
    network, spec = _network(source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(device).eval()
    transform = eval_transform(
        tuple(spec["image_size"]), **{key: spec[key] for key in ("interpolation", "mean", "crop_pct", "crop_mode")}
    )
    mean, std = (torch.tensor(spec[key], device=device)[:, None, None] for key in ("mean", "std"))
    found, readable = [], []
    for name, split in parts.items():
        loader = DataLoader(Readable(split, transform), batch_size=32, num_workers=worker_count(workers, False, 1))
        for image, good in _bar(loader, f"features of {name}", len(loader)):
            image = (image.to(device).float() / 255 - mean) / std  # (B, 3, H, W)
            both = [
                network.forward_head(network.forward_features(each), pre_logits=True).float()
                for each in (image, image.flip(3))
            ]
            found.append(torch.stack([F.normalize(each, dim=1) for each in both], 1).cpu().numpy())  # (B, 2, D)
            readable.append(good.numpy())
    vectors = np.concatenate(found)
    return vectors[:, 0].copy(), vectors[:, 1].copy(), np.concatenate(readable)


class Readable(Dataset):
    """Row -> (image (3, H, W) uint8, whether it could be read)."""

    def __init__(self, split: Any, transform: Any):
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, bool]:
        try:
            return self.transform(self.split.open(self.split.names[row])), True
        except PictureError:
            return self.transform(Image.new("RGB", (64, 64))), False


def _network(source: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    if Path(source).exists():
        return models.load(source)
    models.check_name(source)
    network = models.create(source)
    pretrained.initialise(network, "pretrained", name=source, reset_head=True, whole=False)
    return network, models.preprocessing(source)


def _bar(every: Iterable[Any], what: str, count: int) -> Iterable[Any]:
    return tqdm(every, desc=what, total=count, unit="picture", disable=not sys.stderr.isatty())


def _pairs(
    vectors: np.ndarray, mirrored: np.ndarray, readable: np.ndarray, least: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each pair once (first row smaller), as it is or mirrored, with the larger of the two products; sorted by rows."""
    keys, products = [], []
    for against in (vectors, mirrored):
        one, other, product = perceptual_hash.alike(vectors, against, least - 1e-6)
        good = (one < other) & readable[one] & readable[other]
        keys.append(one[good] * len(vectors) + other[good])
        products.append(product[good])
    keys, products = np.concatenate(keys), np.concatenate(products)
    order = np.lexsort((-products, keys))
    keys, first = np.unique(keys[order], return_index=True)
    return keys // len(vectors), keys % len(vectors), products[order][first]


def _tell(
    ids: np.ndarray, one: np.ndarray, other: np.ndarray, likes: np.ndarray, inside: np.ndarray, data: Any
) -> None:
    """The pairs that are least alike, for a look at them, and how many have different targets."""
    if not inside.any():
        return
    pairs = np.flatnonzero(inside)
    shown = pairs[np.argsort(likes[pairs], kind="stable")[:SHOWN]]
    print("the least alike: " + ", ".join(f"{ids[one[k]]} and {ids[other[k]]} ({likes[k]:.3f})" for k in shown))
    row = {each: number for number, each in enumerate(data.train_ids)}
    first, second = (data.all_targets[[row[each] for each in ids[side[pairs]]]] for side in (one, other))
    if differ := int((first != second).reshape(len(pairs), -1).any(1).sum()):
        print(f"{differ:,} of the pairs have different targets")


def _write(path: Path, id_column: str, ids: list[str], group: np.ndarray) -> None:
    with whole_file(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([[id_column, "group"], *zip(ids, group.tolist())])
