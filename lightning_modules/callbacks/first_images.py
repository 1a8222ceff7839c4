"""The first training images as the network sees them: cropped, erased and mixed."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_modules.loggers.messages import warn_on_error
from models.spec import Spec


@dataclass(frozen=True)
class FirstImages:
    """`image` (N, H, W, 3) uint8, `target` as in the batch ((N,), mixed (N, K)), `index` (N,) rows of train, optimizer
    steps done before."""

    image: np.ndarray
    target: np.ndarray
    index: np.ndarray
    step: int


class FirstImagesCallback(Callback):
    """On rank 0, calls `callback(FirstImages)` once before the first optimizer step; then `callback(None)` at epoch
    ends, at most every `every_seconds`.

    The images, `count` or as many as the step has on rank 0, are copied from the device once. Nothing is drawn at
    random, and an error in `callback` is a warning: the training is the same without it.

    Args:
        spec: the data's; mean and std are undone, values outside of 0-1 (noise of erasing) cut.
    """

    def __init__(
        self, callback: Callable[[FirstImages | None], None], spec: Spec, count: int = 32, every_seconds: float = 300.0
    ):
        self.callback, self.spec, self.wanted, self.every_seconds = callback, spec, count, every_seconds
        self.parts: list[tuple[np.ndarray, ...]] = []
        self.called = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        if not self.wanted or not trainer.is_global_zero:
            return
        wanted, self.wanted = self.wanted, 0  # after an error there is no second try
        with warn_on_error("the pictures of report.html"):
            self.parts.append(self._copied(batch, wanted))
            left = wanted - len(self.parts[-1][0])
            if left and (batch_idx + 1) % trainer.accumulate_grad_batches:
                self.wanted = left  # more images come before the step
                return
            image, target, index = (np.concatenate(values) for values in zip(*self.parts))
            self.callback(FirstImages(image, target, index, trainer.global_step))
        self.parts, self.called = [], time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and time.monotonic() - self.called >= self.every_seconds:
            with warn_on_error("report.html"):
                self.callback(None)
            self.called = time.monotonic()

    def _copied(self, batch: dict[str, Tensor], count: int) -> tuple[np.ndarray, ...]:
        """(images (N, H, W, 3) uint8, targets, rows), copies on the CPU."""
        image = batch["image"][:count].detach().float()  # (N, 3, H, W)
        mean, std = (torch.tensor(self.spec[key], device=image.device).view(3, 1, 1) for key in ("mean", "std"))
        image = (image * std + mean).mul_(255).round_().clamp_(0, 255).byte().permute(0, 2, 3, 1)
        return tuple(
            np.array(values.detach().cpu().numpy())
            for values in (image, batch["target"][:count], batch["index"][:count])
        )
