"""EMA: an exponential moving average of the weights, kept beside the network and scored with it."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from timm.utils import ModelEmaV3
from torch import Tensor

from lightning_modules.loggers.messages import warn

STAGE = "val_ema"  # under which the averaged weights are scored


def uses_ema(ema_decay: float | None, use_ema: bool | None) -> bool:
    """Return whether the averaged weights choose the best epoch and are tested: by default, where they are kept."""
    return ema_decay is not None and use_ema is not False


class Ema(Callback):
    """After every optimizer step ema = decay * ema + (1 - decay) * weights, by timm's ModelEmaV3, from the initial
    weights on.

    `decay` holds from the first step (timm's `step=None`), as in ModelEma and ModelEmaV2, which DeiT and ConvNeXt train
    with. timm's own train.py hands V3 the count of updates, and so copies the weights at the first one. Buffers are
    averaged like weights, whole numbers copied. The average is no part of the task: absent from its parameters,
    optimizer, DDP and `state_dict`; in a checkpoint it is `ema_state_dict`. Frozen weights are shared with the network.
    Comes before every callback that saves.
    """

    def __init__(self, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"--ema_decay {decay:g}: must be at least 0 and below 1, as 0.9999")
        self.decay, self.restored, self.step = decay, None, 0
        self.ema: Any = None  # timm's ModelEmaV3, while there is one

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Here the weights are on the device and the same on all ranks."""
        network: Any = pl_module.model
        self.ema = ModelEmaV3(network, decay=self.decay).requires_grad_(False)
        if self.restored is not None:
            self.ema.module.load_state_dict(
                {name.removeprefix("model."): value for name, value in self.restored.items()}
            )
            self.restored = None
        for ours, theirs in zip(self.ema.module.parameters(), network.parameters()):
            if not theirs.requires_grad:
                ours.data = theirs.data
        object.__setattr__(pl_module, "ema", self.ema.module)  # not registered as a part

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self.step:  # else an accumulated pass
            self.step = trainer.global_step
            self.ema.update(pl_module.model)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        object.__setattr__(pl_module, "ema", None)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["ema_state_dict"] = self.state()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.restored = checkpoint.get("ema_state_dict")
        if self.restored is None:
            warn("the checkpoint keeps no averaged weights (EMA): the average starts at its raw ones")

    def state(self) -> dict[str, Tensor]:
        """The averaged weights under the names they have in a checkpoint."""
        return {f"model.{name}": value for name, value in self.ema.module.state_dict().items()}
