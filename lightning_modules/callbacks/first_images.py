"""The first pictures as the network sees them: cropped, erased and mixed, taken from the batch that passes by, once."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_modules.loggers.messages import warn


@dataclass(frozen=True)
class Glimpse:
    """`image` (N, H, W, 3) uint8, `target` as in the batch ((N,), mixed (N, K)), `index` (N,) rows of train, optimizer
    steps done before."""

    image: np.ndarray
    target: np.ndarray
    index: np.ndarray
    step: int


class Seen(Callback):
    """Tells `tell` of the first `count` pictures (fewer where a step has fewer on rank 0) before the step that learns
    from them, on rank 0 alone; afterwards, at the ends of epochs, that there is news (None), at most every
    `every_seconds`.

    They are copied from the device once. Nothing is drawn at random, and an error in `tell` is a warning: the training
    is the same without it.

    Args:
        spec: the data's; mean and std are undone, values outside of 0-1 (noise of erasing) cut.
    """

    def __init__(
        self,
        tell: Callable[[Glimpse | None], None],
        spec: dict[str, Any],
        count: int = 32,
        every_seconds: float = 300.0,
    ):
        self.tell, self.spec, self.wanted, self.every_seconds = tell, spec, count, every_seconds
        self.parts: list[tuple[np.ndarray, ...]] = []
        self.told = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        if not self.wanted or not trainer.is_global_zero:
            return
        wanted, self.wanted = self.wanted, 0  # after an error there is no second try
        with spared("the pictures of report.html"):
            self.parts.append(self._taken(batch, wanted))
            left = wanted - len(self.parts[-1][0])
            if left and (batch_idx + 1) % trainer.accumulate_grad_batches:
                self.wanted = left  # more pictures come before the step
                return
            self.tell(Glimpse(*(np.concatenate(values) for values in zip(*self.parts)), step=trainer.global_step))
        self.parts, self.told = [], time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and time.monotonic() - self.told >= self.every_seconds:
            with spared("report.html"):
                self.tell(None)
            self.told = time.monotonic()

    def _taken(self, batch: dict[str, Tensor], count: int) -> tuple[np.ndarray, ...]:
        """(pictures (N, H, W, 3) uint8, targets, rows), copies on the CPU."""
        image = batch["image"][:count].detach().float()  # (N, 3, H, W)
        mean, std = (torch.tensor(self.spec[key], device=image.device).view(3, 1, 1) for key in ("mean", "std"))
        image = (image * std + mean).mul_(255).round_().clamp_(0, 255).byte().permute(0, 2, 3, 1)
        return tuple(
            np.array(values.detach().cpu().numpy())
            for values in (image, batch["target"][:count], batch["index"][:count])
        )


@contextmanager
def spared(what: str) -> Iterator[None]:
    """An error inside is a warning: what is made here is worth less than the run."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        warn(f"{what} could not be made: {type(error).__name__}: {reason}. The run is not touched by it.")
