"""One picture of where a vision transformer looks: each picture as the network sees it, its last block's attention, and
the rollout."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from datamodules.transforms.on_device import OnDevice
from experiments.prediction.inference import Views
from experiments.reporting.figures import pixels, places
from experiments.reporting.media_tables import words
from lightning_modules.callbacks.prediction_table import fixed_rows
from models import attention

NAME, COUNT, ACROSS = "attention.png", 8, 8
Named = list[tuple[str, Image.Image]]


def split_of(data: L.LightningDataModule) -> str:
    """The split that is shown: labelled test, else val. Raises ValueError where there is neither."""
    found = next((name for name in ("test", "val") if data.sizes[name]), None)
    if found is None:
        raise ValueError("attention is shown for pictures of test or val, and these data have neither")
    return found


def of_split(data: L.LightningDataModule, count: int = COUNT) -> Named:
    """Pictures of the split with what they are, the same ones for every network. Raises PictureError for one that
    cannot be read."""
    split = data.splits[split_of(data)]
    ids = split.names.tolist() if split.ids is None else list(split.ids)
    rows = fixed_rows(
        [each.decode("utf-8", "surrogateescape") if isinstance(each, bytes) else each for each in ids], count
    )
    return [(_told(split.targets[row], data.spec), split.open(split.names[row])) for row in rows]


def _told(target: np.ndarray, spec: dict[str, Any]) -> str:
    names = spec["class_names"] or spec["target_names"]
    if spec["task"] == "classification":
        return str(names[int(target)])
    if spec["task"] == "multilabel":
        return ", ".join(str(names[k]) for k in np.flatnonzero(target > 0.5)) or "none"
    return ", ".join(f"{value:.4g}" for value in np.atleast_1d(target)[:4])


def draw(model: nn.Module, spec: dict[str, Any], pictures: Named) -> np.ndarray:
    """(H, W, 3) uint8. Raises ValueError for a network without attention between all patches."""
    views = Views(spec, "none")
    prepare = OnDevice(tuple(spec["mean"]), tuple(spec["std"]), erasing_mode="pixel", mixer=None, seed=0)
    device, size, shown = next(model.parameters()).device, tuple(spec["image_size"]), []
    for title, picture in pictures:  # one by one: the maps of a large network fill a memory
        seen = views(picture)  # (1, 3, H, W) uint8
        maps = attention.attention_maps(model, prepare.after({"image": seen.to(device)})["image"])
        last, through = (
            attention.on_grid(model, each, size)[0].cpu().numpy()
            for each in (maps[-1].mean(1), attention.rollout(maps))
        )
        shown.append((title, seen[0].permute(1, 2, 0).numpy(), last, through))
    return pixels(_figure(shown, attention.asks_class_token(model)))


def _figure(shown: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]], by_class: bool) -> Figure:
    """Bands of up to 8 pictures, three lines each."""
    across, bands = min(ACROSS, len(shown)), -(-len(shown) // ACROSS)
    figure, axes = places(
        across, 3 * bands, height=1.45 * shown[0][1].shape[0] / shown[0][1].shape[1], above=0.22, left=0.95
    )
    lines = (
        "what the\nnetwork sees",
        "last block,\n" + ("class token" if by_class else "mean of patches"),
        "rollout over\nall blocks",
    )
    for place, (title, picture, *maps) in enumerate(shown):
        band, column = 3 * (place // across), place % across
        axes[band, column].imshow(picture)
        axes[band, column].set_title(words(title, 22), fontsize=8, parse_math=False, pad=3)
        for line, values in enumerate(maps, 1):
            _heat(axes[band + line, column], picture, values)
        for line, told in enumerate(lines if column == 0 else ()):
            axes[band + line, 0].text(
                -0.08, 0.5, told, transform=axes[band + line, 0].transAxes, ha="right", va="center", fontsize=8
            )
    return figure


def _heat(axes: Axes, picture: np.ndarray, values: np.ndarray) -> None:
    """Values (rows, columns) of patches over the greys of a picture (H, W, 3) uint8; the brightest is the largest
    value."""
    height, width = picture.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(picture.mean(2), cmap="gray", vmin=0, vmax=255, extent=extent)
    axes.imshow(
        values,
        cmap="inferno",
        alpha=0.65,
        vmin=0,
        vmax=float(values.max()) or 1.0,
        interpolation="bilinear",
        extent=extent,
    )


def write(drawn: np.ndarray, path: Path) -> None:
    """A PNG, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    Image.fromarray(drawn).save(partial, "PNG")
    partial.replace(path)


def no_maps(model: nn.Module, data: L.LightningDataModule, image_size: tuple[int, int]) -> list[str]:
    """What speaks against attention maps at the end of a run; the network may be on the meta device."""
    problems = []
    for check in (lambda: split_of(data), lambda: attention.check(model, image_size)):
        try:
            with torch.no_grad():
                check()
        except ValueError as error:
            problems.append(f"--logger_args.attention: {error}")
    return problems
