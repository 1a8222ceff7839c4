"""Trained networks on pictures: what predict.py computes, in torch, timm, numpy and Pillow alone.

Legend: N rows, B pictures of a batch, V views of a picture, O outputs (classes, labels or targets).
"""

import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import five_crop

import models
from datamodules.loading.decode import USUALLY, Decoding, PictureError, open_picture
from datamodules.loading.workers import ignore_terminal_signals, worker_count
from datamodules.tables.columns import standardised
from datamodules.transforms.image_transforms import eval_transform
from datamodules.transforms.on_device import OnDevice
from lightning_modules.objectives import targets
from models import pretrained

PREPARATION = ("image_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
TTA = ("none", "hflip", "multicrop")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SECONDS_BETWEEN_LINES, WORKER_TIMEOUT_SECONDS = 30, 300


@dataclass(frozen=True)
class Source:
    """The weights of one network, and what they count in the mean; plain, so that it goes to another process.

    order: place of each of the first network's outputs among this one's.
    """

    file: str
    spec: dict[str, Any]
    weight: float
    order: list[int]


@dataclass(frozen=True)
class How:
    """What does not change what is predicted, but for `tta`."""

    tta: str = "none"
    precision: str = "auto"
    accelerator: str = "auto"
    use_ema: bool | None = None
    batch_size: int = 32
    workers: int | None = None
    bad_images: str = "error"
    decoding: Decoding = USUALLY


def weights_of(run: str) -> list[Path]:
    """The files of weights behind a run directory, the parent of `fold0`, `fold1` ..., or a file. Raises
    FileNotFoundError, ValueError."""
    pretrained.check_local(run)
    folds = [folder for folder in Path(run).glob("fold*") if folder.is_dir() and folder.name[4:].isdecimal()]
    return [
        pretrained.checkpoint_in(place)
        for place in sorted(folds, key=lambda folder: int(folder.name[4:])) or [Path(run)]
    ]


def sources(runs: list[str]) -> tuple[list[Source], dict[str, Any], list[str]]:
    """(what to average, config of the first network, notes for people). Every run counts the same, and so does every
    fold within one.

    Raises FileNotFoundError, or ValueError when a file is no vitlab checkpoint or the networks do not predict the same
    things.
    """
    found, first, config, notes = [], None, {}, []
    for run in runs:
        files = weights_of(run)
        for file in files:
            about = pretrained.read_about(file)
            if not about:
                raise ValueError(
                    f"{file} is not a vitlab checkpoint: it lacks config or spec (export.py writes files that have "
                    f"them)"
                )
            first, config = first or (str(file), about["spec"]), config or about["config"]
            order = order_of(about["spec"], str(file), first[1], first[0])
            found.append(Source(str(file), about["spec"], 1 / len(runs) / len(files), order))
            notes += _unfinished(file)
        folds = about["config"].get("folds") or 0
        notes += [f"{run}: {len(files)} of {folds} folds are there"] * (len(files) > 1 and len(files) < folds)
    return found, config, notes


def inputs_of(found: list[Source]) -> list[str]:
    """The columns of a table that the networks take beside the picture, each once."""
    return [*dict.fromkeys(name for source in found for name in (source.spec.get("columns") or {}).get("names", ()))]


def _unfinished(file: Path) -> list[str]:
    if file.parent.name != "checkpoints":
        return []
    result = file.parents[1] / "result.json"
    finished = result.is_file() and json.loads(result.read_text()).get("finished")
    return [] if finished else [f"{file.parents[1]} has not finished: its weights so far are used"]


def outputs_of(spec: dict[str, Any]) -> list[str]:
    """Names of what a network predicts: classes, labels or targets."""
    return [str(name) for name in spec["class_names"] or spec["target_names"]]


def order_of(spec: dict[str, Any], source: str, first: dict[str, Any], first_source: str) -> list[int]:
    """Place of each output of `first` among those of `spec`, by name. Raises ValueError, naming the difference, when
    they are not the same."""
    ours, theirs = outputs_of(first), outputs_of(spec)
    apart = [f"task {first['task']} and {spec['task']}"] * (first["task"] != spec["task"])
    for only, whose in (({*ours} - {*theirs}, "first"), ({*theirs} - {*ours}, "second")):
        apart += [f"{len(only)} outputs are only in the {whose} ({', '.join(sorted(only)[:5])})"] * bool(only)
    if apart:
        raise ValueError(f"{first_source} and {source} cannot be averaged: {'; '.join(apart)}")
    return [theirs.index(name) for name in ours]


def gpu_problem(place: int) -> str | None:
    """Why this PyTorch cannot use a GPU that it sees, or None. A P100 is seen and gives memory, and then has no kernel
    for the first sum."""
    capability = torch.cuda.get_device_capability(place)
    built = [
        (arch, tuple(divmod(int(digits[2]), 10)), digits[1])
        for arch in torch.cuda.get_arch_list()
        if (digits := re.match(r"(sm|compute)_(\d+)", arch))
    ]
    fits = [
        number[0] == capability[0] and number <= capability if kind == "sm" else number <= capability
        for _, number, kind in built
    ]
    if built and not any(fits):
        return (
            f"{torch.cuda.get_device_name(place)} (sm_{capability[0]}{capability[1]}) is none that this PyTorch "
            f"({torch.__version__}) is built "
            f"for: {', '.join(arch for arch, *_ in built)}"
        )
    try:
        torch.ones(8, device=f"cuda:{place}").sum().item()
    except RuntimeError as error:
        return f"{torch.cuda.get_device_name(place)} fails at a first sum: {str(error).splitlines()[0]}"
    return None


def usable_gpus(accelerator: str) -> tuple[int, list[str]]:
    """(GPUs to use, of a machine whose GPUs are alike; notes). Raises ValueError where a GPU is asked for and none can
    be used."""
    count = torch.cuda.device_count() if accelerator != "cpu" and torch.cuda.is_available() else 0
    problem = gpu_problem(0) if count else "there is no GPU that PyTorch sees"
    if accelerator == "gpu" and problem:
        raise ValueError(f"--accelerator gpu: {problem}")
    return (0 if problem else count), [f"predicting on CPU: {problem} (on Kaggle choose the accelerator T4 x2)"] * bool(
        count and problem
    )


def autocast_type(precision: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """(type of autocast or None, its name): bf16 where the device has it (sm_80 on), else fp16 (from sm_70 on), on CPU
    fp32. bf16 that a GPU has not becomes fp16: it would be emulated, slower than fp32."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if precision == "auto":
        precision = "fp32" if capability is None or capability < (7, 0) else "fp16" if capability < (8, 0) else "bf16"
    elif precision == "bf16" and capability is not None and capability < (8, 0):
        precision = "fp16"
    return PRECISIONS[precision], precision


class Views:
    """RGB picture -> (V, 3, H, W) uint8: the evaluation's picture, and for `multicrop` five crops of the size of the
    network out of the resized picture: corners (top left, top right, bottom left, bottom right), then the evaluation's
    own in the centre."""

    def __init__(self, spec: dict[str, Any], tta: str) -> None:
        prepared = {key: spec[key] for key in PREPARATION}
        self.size, self.multicrop = tuple(prepared.pop("image_size")), tta == "multicrop"
        if self.multicrop and (spec["crop_mode"] == "border" or spec["crop_pct"] > 1):
            raise ValueError(
                "--tta multicrop takes crops of the resized picture, but this network is shown the whole with a "
                "border: --tta hflip"
            )
        prepared.pop("std")
        self.transform = eval_transform(self.size, **prepared | {"mean": tuple(spec["mean"])})

    def __call__(self, picture: Image.Image) -> Tensor:
        if not self.multicrop:
            return self.transform(picture)[None]
        resize, _, to_tensor = self.transform.transforms
        return torch.stack([to_tensor(crop) for crop in five_crop(resize(picture), list(self.size))])


class Pictures(Dataset):
    """Place -> row, views (a tensor for each kind of preparation), columns (I,) of the row in own units, error ('' of a
    picture that could be read; else the views are black)."""

    def __init__(
        self, root: str, names: np.ndarray, rows: np.ndarray, views: list[Views], columns: np.ndarray, how: Decoding
    ) -> None:
        self.root, self.names, self.rows, self.views, self.columns, self.how = root, names, rows, views, columns, how

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        row, error = int(self.rows[place]), ""
        try:
            if not self.names[row]:
                raise PictureError("there is no picture")
            picture = open_picture(os.path.join(self.root, os.fsdecode(self.names[row])), self.how)
        except PictureError as problem:
            picture, error = Image.new("RGB", (64, 64)), str(problem)
        return {
            "row": row,
            "views": [views(picture) for views in self.views],
            "columns": self.columns[row],
            "error": error,
        }


class Ensemble:
    """Networks on a device; `__call__` averages what they say of a batch."""

    def __init__(self, found: list[Source], how: How, device: torch.device) -> None:
        self.how, self.device, self.kinds, self.members = how, device, [], []
        self.dtype, self.precision = autocast_type(how.precision, device)
        self.inputs = inputs_of(found)
        self.again = 0  # batches that 16 bits could not hold
        self.failed: set[str] = set()  # files whose network has given NaN or infinity
        for source in found:
            network, spec = models.load(source.file, how.use_ema)
            kind = {key: spec[key] for key in PREPARATION}
            if kind not in self.kinds:
                self.kinds.append(kind)
            prepare = OnDevice(tuple(spec["mean"]), tuple(spec["std"]), erasing_mode="pixel", mixer=None, seed=0)
            self.members.append((source, network.to(device), prepare, self.kinds.index(kind)))

    def views(self) -> list[Views]:
        """How the pictures are prepared, each kind once for all the networks that share it."""
        return [Views(kind, self.how.tta) for kind in self.kinds]

    @torch.inference_mode()
    def __call__(self, views: list[Tensor], columns: np.ndarray) -> Tensor:
        """For each kind (B, V, 3, H, W) uint8, and (B, I) columns `inputs` in own units -> (B, O) float64 on CPU:
        probabilities, or values in the targets' own units; the mean over views, then over networks by their weight.
        What is not finite stays so, and its file goes to `failed`."""
        views, total = [each.to(self.device, non_blocking=True) for each in views], 0
        if self.how.tta == "hflip":
            views = [torch.cat([each, each.flip(4)], 1) for each in views]
        for source, network, prepare, kind in self.members:
            images = [prepare.after({"image": image})["image"] for image in views[kind].unbind(1)]
            more = self._columns(columns, source.spec)
            values = self._mean(network, images, more, source.spec, self.dtype)
            if self.dtype is not None and not values.isfinite().all():
                self.again += 1
                values = self._mean(network, images, more, source.spec, None)
            if not values.isfinite().all():
                self.failed.add(source.file)
            total = total + source.weight * values[:, source.order]
        return total

    def _columns(self, columns: np.ndarray, spec: dict[str, Any]) -> tuple[Tensor, ...]:
        """(B, C) of those that a network takes, standardised as in its training; nothing where it takes none."""
        if not spec.get("columns"):
            return ()
        own = columns[:, [self.inputs.index(name) for name in spec["columns"]["names"]]]
        return (torch.from_numpy(standardised(own, spec["columns"])).to(self.device),)

    def _mean(
        self,
        network: nn.Module,
        images: list[Tensor],
        more: tuple[Tensor, ...],
        spec: dict[str, Any],
        dtype: torch.dtype | None,
    ) -> Tensor:
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            logits = [network(image, *more) for image in images]
        return torch.stack([targets.predict(each, spec).cpu().double() for each in logits]).mean(0)


def predict(
    ensemble: Ensemble,
    root: str,
    names: np.ndarray,
    rows: np.ndarray,
    local_ranks: int = 1,
    columns: np.ndarray | None = None,
) -> tuple[np.ndarray, dict[int, str]]:
    """((len(rows), O) float64 in the order of `rows`, {row: problem} of pictures that could not be read, whose values
    are NaN).

    columns: (N, I) of all rows, `ensemble.inputs` in own units.
    Raises PictureError for the first such picture with `bad_images` error; RuntimeError, with the count, where outputs
    are NaN or infinite.
    """
    columns = np.zeros((len(names), 0)) if columns is None else columns
    how, problems, parts, wrong, start, told = ensemble.how, {}, [], [], time.monotonic(), time.monotonic()
    workers = min(worker_count(how.workers, False, local_ranks), -(-len(rows) // how.batch_size))
    loader = DataLoader(
        Pictures(root, names, rows, ensemble.views(), columns, how.decoding),
        batch_size=how.batch_size,
        num_workers=workers,
        timeout=WORKER_TIMEOUT_SECONDS if workers else 0,
        worker_init_fn=ignore_terminal_signals,
        pin_memory=ensemble.device.type == "cuda",
        generator=torch.Generator().manual_seed(0),
    )
    for batch in loader:
        bad = {row: error for row, error in zip(batch["row"].tolist(), batch["error"]) if error}
        if bad and how.bad_images == "error":
            raise PictureError(
                f"{next(iter(bad.values()))} (row {next(iter(bad))}; --bad_images fill predicts the mean of the "
                f"others for it)"
            )
        values = ensemble(batch["views"], batch["columns"].numpy()).numpy()
        wrong += batch["row"].numpy()[~np.isfinite(values).all(1)].tolist()
        values[[error != "" for error in batch["error"]]] = np.nan
        problems |= bad
        parts.append(values)
        if time.monotonic() - told > SECONDS_BETWEEN_LINES:
            told, done = time.monotonic(), sum(map(len, parts))
            print(f"{done} of {len(rows)} pictures, {done / (told - start):.0f} a second", file=sys.stderr, flush=True)
    if wrong:
        shown = ", ".join(map(str, wrong[:5])) + ", ..." * (len(wrong) > 5)
        raise RuntimeError(
            f"{len(wrong)} of {len(rows)} pictures (rows {shown}, from 0) get NaN or infinity from "
            f"{', '.join(sorted(ensemble.failed))}, and nothing is written: its weights are too large"
        )
    return np.concatenate(parts) if parts else np.zeros((0, len(outputs_of(ensemble.members[0][0].spec)))), problems
