"""Mixup and CutMix of a batch on the device: timm's, and big_vision's neighbour mixup."""

import hashlib

import numpy as np
import torch
from timm.data import Mixup
from timm.data.mixup import one_hot

from datamodules.loading.images import keyed_rng
from datamodules.transforms.augment import Augment


class Roll:
    """big_vision's mixup (utils.py `get_mixup`): lambda = max(a, 1 - a), a ~ Beta(alpha, alpha); the partner is the
    neighbour before."""

    def __init__(self, alpha: float, num_classes: int, smoothing: float) -> None:
        self.alpha, self.num_classes, self.smoothing = alpha, num_classes, smoothing

    def __call__(self, image: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lam = float(np.random.beta(self.alpha, self.alpha))
        lam, soft = max(lam, 1 - lam), target
        if not target.is_floating_point():
            low = self.smoothing / self.num_classes
            soft = one_hot(target, self.num_classes, on_value=1 - self.smoothing + low, off_value=low)
        return lam * image + (1 - lam) * image.roll(1, 0), lam * soft + (1 - lam) * soft.roll(1, 0)


class MixupOfNumbers(Mixup):
    """timm's Mixup for targets (B, T) float: target = lam * own + (1 - lam) * that of the image mixed in, as timm
    mixes one-hot rows."""

    def __call__(self, image: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.num_classes = len(
            target
        )  # each image is its own class: its row holds the shares of the images it is mixed of
        image, shares = super().__call__(image, torch.arange(len(target), device=target.device))
        own, other = shares.diagonal()[:, None], shares.fliplr().diagonal()[:, None]  # (B, 1)
        return image, own * target + other * target.flip(0)


class Mixer:
    """image (B, C, H, W) float, target (B,) int64 -> mixed image, soft target (B, K) float32; timm's `Mixup`, or
    `Roll`. Of other tasks targets are (B, T) float, mixed as they are (in own units; multilabel smoothing is the
    loss's).

    All randomness comes from the key, so a resumed run mixes as an uninterrupted one; numpy's global state is put back.
    """

    def __init__(
        self, *, mixup: float, cutmix: float, augment: Augment, num_classes: int, smoothing: float, task: str
    ) -> None:
        self.mix: Roll | Mixup
        if augment.mix_mode == "roll":
            self.mix = Roll(mixup, num_classes, smoothing)
        else:
            classes = task == "classification"
            self.mix = (Mixup if classes else MixupOfNumbers)(
                mixup_alpha=mixup,
                cutmix_alpha=cutmix,
                cutmix_minmax=augment.cutmix_minmax,
                prob=augment.mix_prob,
                switch_prob=augment.mix_switch_prob,
                mode=augment.mix_mode,
                label_smoothing=smoothing if classes else 0.0,
                num_classes=num_classes,
            )

    def __call__(
        self, image: torch.Tensor, target: torch.Tensor, seed: int, key: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with keyed_rng(seed, *key):
            return self.mix(image, target)


def batch_key(epoch: int, rank: int, index: torch.Tensor) -> tuple[int, ...]:
    """Key of a batch of one pass; `index` (B,) on the CPU."""
    digest = hashlib.blake2b(index.numpy().tobytes(), digest_size=8).digest()
    return epoch, rank, int.from_bytes(digest, "little")


def check_mixing(mixup: float, cutmix: float, augment: Augment) -> None:
    """Raises ValueError for values that do not go together."""
    if augment.cutmix_minmax is not None and not cutmix:
        raise ValueError("--augment_args.cutmix_minmax needs --cutmix above 0")
    if augment.mix_mode == "roll" and (cutmix or augment.mix_prob != 1):
        raise ValueError(
            "--augment_args.mix_mode roll is Mixup of every batch: --cutmix 0 and --augment_args.mix_prob 1"
        )
