"""How a network learns a task: model, loss, optimizer and metrics wired into Lightning. The maths stands in optim and
evaluation."""

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_modules.callbacks.finite import Finite, NotFinite
from lightning_modules.loggers.messages import warn
from lightning_modules.objectives.aux_targets import Aux
from lightning_modules.objectives.evaluation import Metrics
from lightning_modules.objectives.metrics import Metric, find
from lightning_modules.optimization.freeze import hold_frozen
from lightning_modules.optimization.optimizers import set_lr


def step_seed(seed: int, epoch: int, batch: int, rank: int) -> int:
    """A seed for everything random inside one forward pass (dropout, drop path): the same after a resume, another on
    each rank."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {epoch} {batch} {rank}".encode(), digest_size=7).digest(), "little")


def share_right(logits: Tensor, target: Tensor) -> Tensor:
    """Share of the batch whose likeliest class is its target; of mixed targets (B, K) the heaviest counts."""
    heaviest = target.argmax(1) if target.is_floating_point() else target
    return (logits.detach().argmax(1) == heaviest).float().mean()


def inputs(batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What a network is given of a batch: the picture, and the columns of a table where it takes some."""
    return (batch["image"], batch["columns"]) if "columns" in batch else (batch["image"],)


class Task(L.LightningModule):
    """Classification, multilabel or regression, as the data's specification says; the loss and the metrics are what
    differs.

    Args:
        model: (B, 3, H, W) -> logits (B, num_outputs), or (B, 3, H, W) and `columns` (B, C) where the batch has some.
        spec: the data's specification (design: task, num_outputs, class_names, ...); kept in the checkpoint.
        config: the resolved config as plain data; kept in the checkpoint.
        loss: logits (B, num_outputs), targets as in the batch (classes mixed: (B, K) float) -> scalar; of other tasks
            than classification one of losses.create, whose `rows` evaluation takes.
        schedule: optimizer step (0-based) -> learning rate.
        make_optimizer: model -> optimizer; its groups may carry `lr_scale`.
        seed: of dropout and drop path.
        metric: what chooses the best epoch; None is the task's default.
        aux: learns the batch's `aux` (B, A) from the pooled features beside the target.
    """

    ema: nn.Module | None = (
        None  # the network with averaged weights while training keeps one (lightning_modules/callbacks/ema.py)
    )

    def __init__(
        self,
        model: nn.Module,
        spec: dict[str, Any],
        config: dict[str, Any],
        *,
        loss: Callable[[Tensor, Tensor], Tensor],
        schedule: Callable[[int], float],
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        seed: int,
        metric: Metric | None = None,
        aux: Aux | None = None,
    ):
        super().__init__()
        if hasattr(model, "set_distilled_training"):  # no teacher here: one output, the mean of both heads
            model.set_distilled_training(False)
        self.model, self.spec, self.config, self.aux = model, spec, config, aux
        self.loss, self.schedule, self.make_optimizer, self.seed = loss, schedule, make_optimizer, seed
        self.lr_used, self.metric = 0.0, metric or find(None, spec["task"])
        self.monitor = f"val/{self.metric.name}"
        self.val_metrics, self.val_ema_metrics, self.test_metrics = (
            Metrics(spec, getattr(loss, "rows", None), self.metric) for _ in range(3)
        )

    def train(self, mode: bool = True) -> "Task":
        """Set the mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        hold_frozen(self.model)
        return self

    def configure_callbacks(self) -> list[Callback]:
        """In any Trainer, what ends a training that is not finite."""
        return [] if any(isinstance(each, Finite) for each in self.trainer.callbacks) else [Finite()]

    def on_train_start(self) -> None:
        """Hold what is frozen: Lightning's fit does not call `train`, and after a validation puts back each module's
        mode from before."""
        hold_frozen(self.model)

    on_train_epoch_start = on_train_start

    def forward(self, *given: Tensor) -> Tensor:
        return self.model(*given)

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss` (mean over the batch), and of a classification `acc1` of the batch: no other metric is a mean over
        batches. With `aux` its loss is a part of `loss`, and told unweighted as `aux_loss`."""
        with self.aux.watching(self.model) if self.aux else nullcontext() as pooled:
            logits, target = self(*inputs(batch)).float(), batch["target"]
        loss, told = self.loss(logits, target), {}
        if self.aux:
            part = self.aux(pooled[0], batch["aux"])
            loss, told = loss + self.aux.weight * part, {"aux_loss": part.detach()}
        return {"loss": loss, **told, **self.running(logits, target)}

    def running(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """What a batch tells of the training beside its losses."""
        return {"acc1": share_right(logits, target)} if self.spec["task"] == "classification" else {}

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        torch.manual_seed(step_seed(self.seed, self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self.losses(batch)  # logged by the Meter callback

    def on_validation_start(self) -> None:
        """One network on all ranks: statistics of batch norm are each rank's own until here; rank 0's are the ones that
        are saved."""
        if self.trainer.world_size > 1:
            for network in filter(None, (self.model, self.ema)):
                for buffer in network.buffers():
                    dist.broadcast(buffer, 0)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.ema is not None:
            self._evaluate(self.ema, batch, "val_ema", self.val_ema_metrics)
        return self._evaluate(self.model, batch, "val", self.val_metrics)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self._evaluate(self.model, batch, "test", self.test_metrics)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Logits of the batch's rows, (V, num_outputs); padding left out."""
        return self.model(*inputs(batch))[batch["valid"]]

    def on_validation_epoch_end(self) -> None:
        self._check_outputs("val", self.val_metrics)
        if self.ema is not None:
            self._check_outputs("val_ema", self.val_ema_metrics)

    def on_test_epoch_end(self) -> None:
        self._check_outputs("test", self.test_metrics)

    def _check_outputs(self, stage: str, metrics: Metrics) -> None:
        """Say how many outputs are not finite: such an epoch has no score. A collective. Raises NotFinite but within a
        training."""
        bad, rows = metrics.not_finite()
        if not bad:
            return
        line = f"{stage}: the outputs of {bad} of {rows} pictures are NaN or infinite, so they are not scored"
        if self.trainer.state.fn != "fit":
            raise NotFinite(line)
        warn(f"{line} (epoch {self.current_epoch + 1})")

    def _evaluate(self, network: nn.Module, batch: dict[str, Tensor], stage: str, metrics: Metrics) -> Tensor:
        """Count the batch and return its logits (B, num_outputs)."""
        logits = network(*inputs(batch))
        metrics.update(logits, batch["target"], batch["valid"], batch["index"])
        self.log_dict(metrics.named(stage), on_step=False, on_epoch=True, logger=False, batch_size=len(batch["target"]))
        return logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The network's, and `aux` in a group of its own."""
        optimizer = self.make_optimizer(self.model)
        if self.aux:
            optimizer.add_param_group({"params": [*self.aux.parameters()], "lr_scale": 1.0})
        return optimizer

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.lr_used = self.schedule(self.global_step)
        set_lr(optimizer, self.lr_used)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"], checkpoint["spec"] = self.config, self.spec
