"""Work on a batch on the device: images are normalised, erased and mixed, in this order, as in DeiT's
training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from datamodules.transforms.erasing import fill
from datamodules.transforms.mixing import Mixer, batch_key

if TYPE_CHECKING:
    from models.spec import Batch


class OnDevice:
    """`before` on the host, `after` on the device; evaluation batches (with `valid`) are only normalised.

    Args:
        mean, std: of RGB in 0-1.
        erasing_mode: of `erasing.fill`, for batches with boxes in `erase`.
        mixer: None mixes nothing.
        seed: of the mix.
    """

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], *, erasing_mode: str, mixer: Mixer | None, seed: int
    ) -> None:
        self.mean, self.std, self.erasing_mode, self.mixer, self.seed = mean, std, erasing_mode, mixer, seed
        self._statistics: dict[torch.device, torch.Tensor] = {}
        self._generators: dict[torch.device, torch.Generator] = {}

    def before(self, batch: Batch, epoch: int, rank: int) -> Batch:
        """Keep on the host what the host will read: boxes (B, count, 5) as an array, and the mix's key in `mix`."""
        if "erase" in batch:
            batch = {**batch, "erase": np.asarray(batch["erase"])}
        if self.mixer is not None and "valid" not in batch:
            batch = {**batch, "mix": batch_key(epoch, rank, batch["index"])}
        return batch

    def after(self, batch: Batch) -> Batch:
        """`image` (B, 3, H, W) uint8 0-255 -> normalised float32 in the arithmetic of timm's PrefetchLoader; float
        images pass.

        With a mix `target` becomes (B, K) float32.
        """
        batch = batch.copy()
        image, boxes, key = batch["image"], batch.pop("erase", None), batch.pop("mix", None)
        if image.dtype == torch.uint8:
            mean, std = self._mean_and_std(image.device)
            image = (
                image.to(torch.float32, memory_format=torch.contiguous_format).sub_(mean).div_(std)
            )  # cached ones come channels last
        if boxes is not None:
            if image.device not in self._generators:
                self._generators[image.device] = torch.Generator(image.device)
            fill(image, boxes.tolist(), self.erasing_mode, self._generators[image.device])
        if key is not None and self.mixer is not None:
            image, batch["target"] = self.mixer(image, batch["target"], self.seed, key)
        return {**batch, "image": image}

    def _mean_and_std(self, device: torch.device) -> torch.Tensor:
        if device not in self._statistics:
            pair = torch.tensor([self.mean, self.std], dtype=torch.float64).mul(255).float()  # (2, 3)
            self._statistics[device] = pair.view(2, 1, 3, 1, 1).to(device)
        return self._statistics[device]
