"""Preemption: a signal to any rank at any time makes all ranks save the same step and leave with exit code 75."""

import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from lightning_modules.callbacks import signals
from lightning_modules.callbacks.checkpoints import validation_to_do
from lightning_modules.callbacks.signals import ORDER, notice

COLLECTIVE_TIMEOUT = timedelta(
    minutes=15
)  # a rank that died is noticed at once; this is for one that hangs, or lists data on a slow disk


class Preempted(SystemExit):
    """All ranks have agreed to leave, and have saved what there was to save; `code` is 75, or 130 after Ctrl-C."""


class Preemption(Callback):
    """Agrees on the signals of all ranks once an optimizer step and once an evaluation batch, on a gloo group beside
    the training's.

    It replaces Lightning 2.6's signal handling, whose broadcast in the handler deadlocks when ranks are not signalled
    at the same moment (issue 20806) and whose broadcast in every step waits for the GPU (issue 21487).

    In validation it saves a state in which the epoch's validation is still to do, so a long one need not end within the
    grace period.

    Args:
        path: of last.ckpt.
    """

    def __init__(self, path: Path):
        self.path, self.step, self.before_validation = path, 0, False
        self.group: Any = None  # of gloo, on any device

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        silence_lightning(trainer)
        if trainer.world_size > 1 and self.group is None:
            self.group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        notice.together = threading.current_thread() is threading.main_thread()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step = trainer.global_step
        self._leave_if_asked(trainer, save=False)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            return  # an accumulated pass, no step yet
        self.step = trainer.global_step
        if not trainer.is_last_batch:  # after an epoch's last step the next to ask are validation and the epoch's end
            self._leave_if_asked(trainer, save=True)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._leave_if_asked(trainer, save=True)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._in_validation(trainer)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._in_validation(trainer)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._leave_if_asked(trainer, save=False)  # the training has ended and is saved

    def _in_validation(self, trainer: L.Trainer) -> None:
        self.before_validation = trainer.state.fn == "fit"
        self._leave_if_asked(trainer, save=self.before_validation)
        self.before_validation = False

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.before_validation:
            validation_to_do(checkpoint)

    def _leave_if_asked(self, trainer: L.Trainer, *, save: bool) -> None:
        """One agreement, a collective. Raises Preempted on all ranks when any rank was asked."""
        asked = torch.tensor(notice.asked)
        if self.group is not None:
            dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self.group)
        if not asked:
            return
        disarm_launcher(trainer)
        notice.asked, signum = int(asked), ORDER[int(asked) - 1]
        if save:
            trainer.save_checkpoint(self.path)  # ends with a barrier: no rank leaves before the file is whole
        if trainer.is_global_zero:
            failed = save and getattr(trainer.strategy.checkpoint_io, "error", None)
            saved = f"saved step {trainer.global_step} to {self.path}; the same command goes on"
            what = failed or (saved if save else "there was nothing to save")
            print(f"{signum.name}: {what}", flush=True)
            if signum == signals.signal.SIGUSR1:
                signals.requeue()
        raise Preempted(signals.exit_code(signum))


def silence_lightning(trainer: L.Trainer) -> None:
    """Take Lightning's own signal handlers and its SIGTERM broadcast out; both names are private, so a version without
    them fails here."""
    connector: Any = trainer._signal_connector
    loop: Any = trainer.fit_loop.epoch_loop
    assert hasattr(connector, "register_signal_handlers") and hasattr(loop, "_broadcast_sigterm_tensor"), (
        "this version of Lightning handles signals in another way than 2.6: lightning_modules/callbacks/preemption.py "
        "must follow"
    )
    connector.register_signal_handlers = loop._broadcast_sigterm_tensor = lambda: None


def disarm_launcher(trainer: L.Trainer) -> None:
    """Keep Lightning's launcher from killing rank 0 within five seconds of a child's exit: it has yet to save or to
    close its tracker."""
    getattr(
        trainer.strategy.launcher, "procs", []
    ).clear()  # the list its observer watches; children die with this process
