"""A teacher's answers, written down once (prepare.py teacher) and read in the teacher's place.

A cache is a folder with cache.json, which says what it is valid for, and shards: one for each epoch and rank, or, where
the teacher saw one fixed view of each picture, one for each rank. Legend: B pictures, C outputs, K of them stored, n
rows of a shard; row = index * copies + copy.
"""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from models.spec import Spec

ABOUT, FORMAT = "cache.json", 1
HALF = torch.finfo(torch.float16).max
TRANSFORM = (
    "crop_scale",
    "hflip",
    "rand_augment",
    "random_erasing",
    "augment_args",
    "train_size",
    "mixup",
    "cutmix",
    "cache_side",
    "augment",
)
COMMON = (
    "task",
    "class_names",
    "target_names",
    "data",
    "data_args",
    "fingerprint",
    "sizes",
    "image_size",
    "mean",
    "std",
    "interpolation",
)
KEPT = ("num_outputs", "target_range", "encoding", "crop_pct", "crop_mode")  # kept beside those
KNOBS = {  # what must be equal, by the view of the pictures that the teacher saw
    "replayed": (
        *COMMON,
        *TRANSFORM,
        "repeated_augment",
        "seed",
        "global_batch_size",
    ),  # the very pictures of training, another view in each epoch
    "still": (*COMMON, *TRANSFORM),  # those of training, where it shows a picture in one way only
    "evaluation": (*COMMON, "crop_pct", "crop_mode"),  # of the evaluation transform
}
PLACE = ("world_size", "pass_size")  # decide which pictures are mixed with which


def identity(
    config: dict[str, Any], data: dict[str, Any], spec: Spec, *, world_size: int, pass_size: int, device: str
) -> dict[str, Any]:
    """Everything about a run that decides which pictures its teacher sees, as plain values.

    Args:
        config: the resolved config; data: the data module's `identity`; spec: its `spec`.
        pass_size: pictures in one pass of one rank. device: `cpu` or `cuda`, whose noise fills erased boxes.
    """
    names = {
        *TRANSFORM,
        "repeated_augment",
        "data",
        "data_args",
        "seed",
        "global_batch_size",
        "val_fraction",
        "split_seed",
        "epochs",
    }
    whole = {key: config[key] for key in names} | {key: data[key] for key in ("fingerprint", "sizes")}
    whole["augment"] = data.get("augment")  # what the file says, wherever it is
    whole |= {key: spec.get(key) for key in (*COMMON, *KEPT) if key not in whole}
    return json.loads(json.dumps(whole | {"world_size": world_size, "pass_size": pass_size, "device": device}))


def identity_of(
    data: Any, there: dict[str, Any], *, epochs: int, world_size: int, pass_size: int, device: str
) -> dict[str, Any]:
    """`identity` of a training with a data module, for a cache made for the identity `there`. What the data module does
    not know of itself (its name and own keywords) is taken from there: the fingerprint stands for it."""
    whole = {key: getattr(data, key, value) for key, value in there.items()} | data.identity
    whole |= {key: value for key, value in data.spec.items() if key in there}
    whole["augment"] = data.identity.get("augment")
    whole |= {"epochs": epochs, "world_size": world_size, "pass_size": pass_size, "device": device}
    return json.loads(json.dumps(whole))


def differences(there: dict[str, Any], here: dict[str, Any], view: str) -> list[str]:
    """The differences, a line each, that keep a view written for the identity `there` from being that of `here`."""
    keys = [*KNOBS[view]]
    if view == "replayed":
        keys += [*PLACE] * bool(here["mixup"] or here["cutmix"])
        keys += ["device"] * bool(here["random_erasing"] and here["augment_args"].get("erasing_mode") != "const")
        keys += ["epochs"] * ("-" in str(here["train_size"]))  # the crops grow by the share of the epochs that is over
    if there["fingerprint"] != here["fingerprint"]:
        keys += ["val_fraction", "split_seed"]
    differing = [f"{key} {short(there.get(key))} -> {short(here[key])}" for key in keys if there.get(key) != here[key]]
    if view == "evaluation" and (here["mixup"] or here["cutmix"]):
        differing.append("mixup or cutmix: the teacher has seen unmixed pictures")
    if view == "replayed" and here["epochs"] > there["epochs"]:
        differing.append(f"epochs: {there['epochs']} are stored, {here['epochs']} asked for")
    return differing


def short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:48]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


def is_cache(path: str | Path) -> bool:
    return (Path(path) / ABOUT).is_file()


def read_about(folder: str | Path) -> dict[str, Any]:
    """The content of cache.json. Raises ValueError where it is not one."""
    file = Path(folder) / ABOUT
    try:
        about = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is no description of a teacher cache: {error}") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"{file} is no description of a teacher cache in format {FORMAT}")
    return about


def shard_file(folder: str | Path, about: dict[str, Any], epoch: int, rank: int) -> Path:
    """The shard that one rank wrote of an epoch; in a fixed view of all epochs."""
    return Path(folder) / (
        f"epoch{epoch:04d}-rank{rank}.safetensors" if about["view"] == "replayed" else f"fixed-rank{rank}.safetensors"
    )


def missing(folder: str | Path, about: dict[str, Any], epochs: int) -> list[Path]:
    """Shards of the first epochs that are not there."""
    every = [
        shard_file(folder, about, epoch, rank)
        for epoch in range(epochs if about["view"] == "replayed" else 1)
        for rank in range(about["identity"]["world_size"])
    ]
    return [file for file in every if not file.is_file()]


def compress(logits: Tensor, topk: int, task: str) -> dict[str, Tensor]:
    """The tensors that are stored for logits (B, C).

    classification: `value` (B, C) float16, the log probabilities; where topk < C, (B, K + 1) of the K likeliest classes
    and, last, of each other class if these share what is left; then `index` (B, K) int16 (int32 of more than 32768
    classes). Other tasks: `value`, the float32 logits (B, C), of a regression float64 in own units (B, T).
    """
    if task != "classification":
        return {"value": logits}
    logits, classes = logits.float().log_softmax(-1), logits.shape[-1]
    if topk >= classes:
        return {"value": _half(logits)}
    value, index = logits.topk(topk)
    rest = logits.scatter(1, index, -math.inf).logsumexp(1, keepdim=True) - math.log(classes - topk)  # (B, 1)
    return {
        "value": _half(torch.cat([value, rest], 1)),
        "index": index.to(torch.int16 if classes <= 2**15 else torch.int32),
    }


def _half(values: Tensor) -> Tensor:
    return values.clamp(min=-HALF).half()


def restore(value: Tensor, index: Tensor | None, num_outputs: int) -> Tensor:
    """The output of `compress` -> logits (B, C) float32, of a regression float64 in own units (B, T). What the stored
    classes leave is spread evenly over the others, as TinyViT does (microsoft/Cream TinyViT/main.py:320-330)."""
    if index is None:
        return value.float() if value.dtype == torch.float16 else value
    value = value.float()
    return value[:, -1:].expand(-1, num_outputs).scatter(1, index.long(), value[:, :-1])


def write_shard(file: Path, tensors: dict[str, Tensor], digest: str) -> None:
    """Write whole or not at all. `digest` is that of the cache it belongs to."""
    content = save(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        {"cache": json.dumps([digest, file.name, _sha256(tensors)])},
    )
    partial = file.with_name(f".{file.name}.partial")
    with open(partial, "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    os.replace(partial, file)


def read_shard(file: Path, digest: str) -> dict[str, Tensor]:
    """Raises ValueError where the shard is missing, damaged or of another cache."""
    try:
        with safe_open(file, "pt") as content:
            stored = json.loads((content.metadata() or {}).get("cache", "[null, null, null]"))
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        what = "is not there" if not file.exists() else f"cannot be read ({error})"
        raise ValueError(f"teacher cache: {file} {what}; {AGAIN}") from None
    if stored[:2] != [digest, file.name]:
        raise ValueError(
            f"teacher cache: {file} belongs to another cache than the {ABOUT} beside it, or to another epoch or rank"
        )
    if stored[2] != _sha256(tensors):
        raise ValueError(f"teacher cache: {file} is damaged; delete it, and {AGAIN}")
    return tensors


AGAIN = "the command that made the cache (prepare.py teacher) writes what is missing"


def _sha256(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def digest_of(about: dict[str, Any]) -> str:
    """Names a cache by what it is valid for."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


class CachedTeacher:
    """Stands for the teacher in training: the logits it gave to the very pictures of a batch.

    One epoch's answers lie on the device, as a table by row. Raises ValueError for a folder that is no cache.
    """

    def __init__(self, folder: str | Path):
        self.folder, self.about = Path(folder), read_about(folder)
        self.digest, self.checked = digest_of(self.about), False
        self.device, self._epoch = torch.device("cpu"), -1
        self._value: Tensor | None = None
        self._index: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "CachedTeacher":
        return self

    def to(self, device: torch.device | str) -> "CachedTeacher":
        """Set the device of the tables; call it in the LightningModule's `setup`."""
        if torch.device(device) != self.device:
            self.device, self._epoch = torch.device(device), -1
        return self

    def check(self, here: dict[str, Any]) -> None:
        """Raises ValueError that names each difference between the run it was made for and this one (`identity`), an
        original teacher that has changed since, and shards that are missing."""
        differing = differences(self.about["identity"], here, self.about["view"])
        if here["task"] == "regression" and self.about.get("units") != "own":
            differing.append(
                "its answers are logits, as once was done: those of a regression are kept in the targets' own units now"
            )
        for teacher in self.about["teachers"]:
            file = teacher.get("file")
            if file and Path(file).is_file() and sha256_of(file) != teacher["sha256"]:
                differing.append(f"the teacher: {file} has changed since")
        if differing:
            raise ValueError(
                f"--teacher {self.folder} was made for another run:\n  "
                + "\n  ".join(differing)
                + "\nMake one for this run: prepare.py teacher --out ANOTHER, with the flags of this run"
            )
        if gone := missing(self.folder, self.about, here["epochs"]):
            raise ValueError(
                f"--teacher {self.folder} is not complete: {len(gone)} shards are missing, the first is "
                f"{gone[0].name}; {AGAIN}"
            )
        self.checked = True

    def __call__(self, index: Tensor, epoch: int, copy: Tensor | None = None) -> Tensor:
        """index, copy (B,) of a batch on the device -> what `restore` makes of it; NaN for a picture that the epoch
        does not have.

        Raises ValueError at an epoch's first batch for a shard that is missing or damaged. Nothing waits for the device
        in between.
        """
        if self.about["view"] != "replayed":
            epoch = 0
        if epoch != self._epoch:
            self._load(epoch)
        assert self._value is not None
        row = row_of(index, copy, self.about["copies"])
        return restore(
            self._value[row], None if self._index is None else self._index[row], self.about["identity"]["num_outputs"]
        )

    def _load(self, epoch: int) -> None:
        """One epoch of all ranks: any number of ranks may read it."""
        self._value = self._index = None  # the epoch before goes first
        ranks = range(self.about["identity"]["world_size"])
        shards = [read_shard(shard_file(self.folder, self.about, epoch, rank), self.digest) for rank in ranks]
        row = torch.cat([shard["row"] for shard in shards]).long()
        if len(row) != self.about["rows"]:
            raise ValueError(
                f"teacher cache: {self.folder} has {len(row)} pictures in epoch {epoch}, not {self.about['rows']}"
            )
        tables = {}
        for name in shards[0].keys() - {"row"}:
            content = torch.cat([shard[name] for shard in shards])
            table = content.new_full(
                (self.about["identity"]["sizes"]["train"] * self.about["copies"], content.shape[1]),
                math.nan if content.is_floating_point() else 0,
            )
            table[row] = content
            tables[name] = table.to(self.device)
        self._value, self._index, self._epoch = tables["value"], tables.get("index"), epoch


def row_of(index: Tensor, copy: Tensor | None, copies: int) -> Tensor:
    """(B,) index and copy of pictures -> (B,) row."""
    return index if copies == 1 or copy is None else index * copies + copy


def sha256_of(file: str | Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while chunk := content.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
