"""A figure of where a vision transformer looks: each image as the network sees it, the attention of its last block, and
the rollout over all blocks."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from datamodules.base import PictureData
from datamodules.loading.files import whole_file
from datamodules.transforms.on_device import OnDevice
from experiments.prediction.inference import Views
from experiments.reporting.drawing import Drawing, Text
from experiments.reporting.media_tables import words
from experiments.reporting.scored import output_names
from lightning_modules.callbacks.prediction_table import fixed_rows
from models import attention
from models.spec import Spec

NAME, COUNT, ACROSS = "attention.png", 8, 8
SIDE, GAP, ABOVE, LEFT = 104, 6, 22, 140  # units: height of an image, around it, titles above and at the left
Named = list[tuple[str, Image.Image]]


def split_of(data: PictureData) -> str:
    """The split that is shown: labelled test, else val. Raises ValueError where there is neither."""
    found = next((name for name in ("test", "val") if data.sizes[name]), None)
    if found is None:
        raise ValueError("attention is shown for pictures of test or val, and these data have neither")
    return found


def of_split(data: PictureData, count: int = COUNT) -> Named:
    """Pictures of the split with what they are, the same ones for every network. Raises PictureError for one that
    cannot be read."""
    split = data.splits[split_of(data)]
    ids = split.names.tolist() if split.ids is None else list(split.ids)
    rows = fixed_rows(
        [each.decode("utf-8", "surrogateescape") if isinstance(each, bytes) else each for each in ids], count
    )
    return [(_label(split.targets[row], data.spec), split.open(split.names[row])) for row in rows]


def _label(target: np.ndarray, spec: Spec) -> str:
    names = output_names(spec)
    if spec["task"] == "classification":
        return str(names[int(target)])
    if spec["task"] == "multilabel":
        return ", ".join(str(names[k]) for k in np.flatnonzero(target > 0.5)) or "none"
    return ", ".join(f"{value:.4g}" for value in np.atleast_1d(target)[:4])


def draw(model: nn.Module, spec: Spec, images: Named) -> np.ndarray:
    """(H, W, 3) uint8: each image as the network sees it, and two maps over it. Raises ValueError for a network without
    attention between all patches."""
    views = Views(dict(spec), "none")
    prepare = OnDevice(tuple(spec["mean"]), tuple(spec["std"]), erasing_mode="pixel", mixer=None, seed=0)
    device, size = next(model.parameters()).device, (spec["image_size"][0], spec["image_size"][1])
    lines = ("input", "last block, " + ("class token" if attention.asks_class_token(model) else "mean"), "rollout")
    width, across = SIDE * size[1] / size[0], min(ACROSS, len(images))
    band = ABOVE + len(lines) * (SIDE + GAP)
    drawing = Drawing("", LEFT + across * (width + GAP), -(-len(images) // across) * band + GAP)
    for place, (title, image) in enumerate(images):  # one by one: the maps of a large network fill the memory
        seen = views(image)  # (1, 3, H, W) uint8
        batch: Any = {"image": seen.to(device)}
        maps = attention.attention_maps(model, prepare.after(batch)["image"])
        pixels = seen[0].permute(1, 2, 0).numpy()
        heats = [
            _heat(pixels, attention.on_grid(model, each, size)[0].cpu().numpy())
            for each in (maps[-1].mean(1), attention.rollout(maps))
        ]
        x, y = LEFT + place % across * (width + GAP), place // across * band
        drawing.marks.append(Text(x + width / 2, y + ABOVE - 6, words(title, 18), "middle", size=9))
        for line, shown in enumerate([pixels, *heats]):
            top = y + ABOVE + line * (SIDE + GAP)
            drawing.images.append((x, top, width, SIDE, shown))
            if x == LEFT:
                drawing.marks.append(Text(LEFT - 8, top + SIDE / 2, lines[line], "end", size=9))
    return drawing.pixels()


def _heat(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values (rows, columns) of patches over the greys of an image (H, W, 3) uint8; the brightest is the largest."""
    from matplotlib import colormaps

    size = image.shape[1], image.shape[0]
    smooth = Image.fromarray((values / (values.max() or 1)).astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    heat = colormaps["inferno"](np.asarray(smooth))[..., :3] * 255
    return (0.35 * image.mean(2, keepdims=True) + 0.65 * heat).round().astype(np.uint8)


def write(drawn: np.ndarray, path: Path) -> None:
    """A PNG, whole or not at all."""
    with whole_file(path) as partial:
        Image.fromarray(drawn).save(partial, "PNG")


def no_maps(model: nn.Module, data: PictureData, image_size: tuple[int, int]) -> list[str]:
    """What speaks against attention maps at the end of a run; the network may be on the meta device."""
    problems = []
    for check in (lambda: split_of(data), lambda: attention.check(model, image_size)):
        try:
            with torch.no_grad():
                check()
        except ValueError as error:
            problems.append(f"--logger_args.attention: {error}")
    return problems
