"""A network, its loss, optimizer and metrics as a LightningModule, for any `L.Trainer`. The maths stands in objectives
and optimization."""

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_modules.callbacks.ema import STAGE, Ema, uses_ema
from lightning_modules.callbacks.finite import Finite, NotFinite
from lightning_modules.loggers.messages import warn
from lightning_modules.objectives.aux_targets import Aux
from lightning_modules.objectives.evaluation import Metrics
from lightning_modules.objectives.metrics import Metric, find
from lightning_modules.optimization.freeze import hold_frozen
from lightning_modules.optimization.optimizers import set_lr
from lightning_modules.wiring import defaults, wire
from models import pretrained
from models.spec import Spec


def step_seed(seed: int, epoch: int, batch: int, rank: int) -> int:
    """A seed for everything random inside one forward pass (dropout, drop path): the same after a resume, another on
    each rank."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {epoch} {batch} {rank}".encode(), digest_size=7).digest(), "little")


def batch_accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """Share of the batch whose likeliest class is its target; of mixed targets (B, K) the heaviest counts."""
    heaviest = target.argmax(1) if target.is_floating_point() else target
    return (logits.detach().argmax(1) == heaviest).float().mean()


def inputs(batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The network's arguments from a batch: the images, and the columns of a table where it takes some."""
    return (batch["image"], batch["columns"]) if "columns" in batch else (batch["image"],)


class Task(L.LightningModule):
    """Classification, multilabel or regression, as the data's specification says.

    Logs `train/*` each step, and `val/*`, `test/*` once per epoch over the valid rows of all ranks. A checkpoint has
    `config` and `spec`, from which `load_from_checkpoint` and `models.load` rebuild the network.

    Args:
        model: images (B, 3, H, W) -> logits (B, num_outputs); also given `columns` (B, C) where the batch has some.
        spec: the data's specification; kept in the checkpoint.
        config: model (name), model_args and the learning knobs as plain data; kept in the checkpoint.
        loss: logits (B, num_outputs), targets as in the batch (classes mixed: (B, K) float) -> scalar; of other tasks
            than classification one of losses.create, whose `rows` evaluation takes.
        schedule: optimizer step (0-based) -> learning rate.
        make_optimizer: model -> optimizer; its groups may carry `lr_scale`.
        seed: of dropout and drop path.
        metric: chooses the best epoch; None is the task's default.
        aux: learns the batch's `aux` (B, A) from the pooled features beside the target.
        clip_grad, clip_mode: largest gradient `norm` or `value`; a Trainer's own gradient_clip_val wins.
        ema_decay: of averaged weights, scored as `val_ema/*`; None keeps none.
    """

    ema: nn.Module | None = None  # the network with averaged weights while training keeps one (callbacks/ema.py)
    uses_self_log = True  # False where the Meter callback logs in its place

    def __init__(
        self,
        model: nn.Module,
        spec: Spec,
        config: dict[str, Any],
        *,
        loss: Callable[[Tensor, Tensor], Tensor],
        schedule: Callable[[int], float],
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        seed: int,
        metric: Metric | None = None,
        aux: Aux | None = None,
        clip_grad: float | None = None,
        clip_mode: str = "norm",
        ema_decay: float | None = None,
    ):
        super().__init__()
        self.save_hyperparameters(config)
        network: Any = model
        if hasattr(model, "set_distilled_training"):  # no teacher here: one output, the mean of both heads
            network.set_distilled_training(False)
        self.model, self.spec, self.config, self.aux = network, spec, config, aux
        self.loss, self.schedule, self.make_optimizer, self.seed = loss, schedule, make_optimizer, seed
        self.clip_grad, self.clip_mode, self.ema_decay = clip_grad, clip_mode, ema_decay
        self._step = 0
        self._passes: list[dict[str, Tensor]] = []  # of the step under way
        self.metric = metric or find(None, spec["task"])
        self.monitor = f"{STAGE if uses_ema(ema_decay, config.get('use_ema')) else 'val'}/{self.metric.name}"
        self.val_metrics, self.val_ema_metrics, self.test_metrics = (
            Metrics(spec, getattr(loss, "rows", None), self.metric) for _ in range(3)
        )

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: torch.device | str | None = None,
        *,
        weights_only: bool | None = True,
        model: nn.Module | None = None,
        use_ema: bool | None = None,
    ) -> "Task":
        """The task of a checkpoint or run directory, its network in evaluation mode.

        Args:
            map_location: device of the task; None is the CPU.
            weights_only: the only way in which checkpoints are read; False is refused.
            model: needed where `models.create` did not build the network.
            use_ema: as in `models.load`.

        Raises FileNotFoundError, or ValueError for a file that is no checkpoint of a Task.
        """
        if weights_only is False:
            raise ValueError("weights_only=False could run code of the file; checkpoints of a Task do not need it")
        if model is None:
            model, _ = pretrained.load(checkpoint_path, use_ema)
        else:
            file = pretrained.checkpoint_in(checkpoint_path)
            model.load_state_dict(pretrained.network_state(pretrained.read_checkpoint(file), use_ema, file))
        about = pretrained.read_about(checkpoint_path)
        config, spec = about["config"], about["spec"]
        task = cls(model, spec, config, **wire({**defaults(), **config}, spec, config.get("steps_per_epoch"))).eval()
        return task if map_location is None else task.to(map_location)

    def train(self, mode: bool = True) -> "Task":
        """Set the mode; frozen modules stay in evaluation mode."""
        super().train(mode)
        hold_frozen(self.model)
        return self

    def configure_callbacks(self) -> list[Callback]:
        """Add Finite, which ends a training that is not finite, and Ema where averaged weights are kept."""
        wanted: list[Callback] = [Finite()]
        there: list[Callback] = getattr(self.trainer, "callbacks", [])
        if self.ema_decay is not None and self.trainer.state.fn == "fit":
            wanted.append(Ema(self.ema_decay))
        return [each for each in wanted if not any(isinstance(other, type(each)) for other in there)]

    def on_train_start(self) -> None:
        """Set the first step's rate, and hold what is frozen."""
        trainer: Any = self.trainer  # Lightning does not declare all of its attributes
        epochs = self.config.get("epochs")
        if self.uses_self_log and epochs and trainer.max_epochs not in (None, -1, epochs) and not trainer.fast_dev_run:
            warn(f"the schedule is for {epochs} epochs, the Trainer's max_epochs is {trainer.max_epochs}")
        self._set_rate()
        hold_frozen(self.model)

    def on_train_epoch_start(self) -> None:
        """Hold what is frozen: after a validation Lightning restores each module's mode from before."""
        hold_frozen(self.model)

    def forward(self, *given: Tensor) -> Tensor:
        return self.model(*given)

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss` (mean over the batch), and of a classification `acc1` of the batch: no other metric is a mean over
        batches. With `aux` its loss is part of `loss`, and is also given unweighted as `aux_loss`."""
        with self.aux.watching(self.model) if self.aux else nullcontext() as pooled:
            logits, target = self(*inputs(batch)).float(), batch["target"]
        loss, parts = self.loss(logits, target), {}
        if self.aux and pooled:
            aux_loss = self.aux(pooled[0], batch["aux"])
            loss, parts = loss + self.aux.weight * aux_loss, {"aux_loss": aux_loss.detach()}
        return {"loss": loss, **parts, **self.batch_metrics(logits, target)}

    def batch_metrics(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """`acc1` of a training batch, of a classification; {} of other tasks."""
        return {"acc1": batch_accuracy(logits, target)} if self.spec["task"] == "classification" else {}

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        torch.manual_seed(step_seed(self.seed, self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        if batch["image"].dtype == torch.uint8:
            raise ValueError(
                "training images are uint8: augmentation and normalisation are the data module's, so pass it to fit as "
                "`trainer.fit(task, datamodule=data)`, not its loader"
            )
        values = self.losses(batch)
        if self.uses_self_log:  # the mean over the passes of the step, and over ranks
            self._passes.append({name: value.detach() for name, value in values.items()})
            means = {f"train/{name}": sum(each[name] for each in self._passes) / len(self._passes) for name in values}
            self.log_dict(means, batch_size=len(batch["target"]), sync_dist=True)
        return values

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        """After a step set the next one's rate, so that a LearningRateMonitor reads it when that step begins."""
        if self.global_step != self._step:
            self._set_rate()

    def _set_rate(self) -> None:
        self._step, self._passes = self.global_step, []
        for optimizer in self.trainer.optimizers:
            set_lr(optimizer, self.schedule(self.global_step))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer says, else by `clip_grad`."""
        if gradient_clip_val is None:
            gradient_clip_val, gradient_clip_algorithm = self.clip_grad, self.clip_mode
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_validation_start(self) -> None:
        """Broadcast buffers from rank 0: statistics of batch norm are each rank's own until here, and rank 0's are
        saved."""
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
        return self.model(*inputs(self._normalized(batch)))[batch["valid"]]

    def on_validation_epoch_end(self) -> None:
        self._check_outputs("val", self.val_metrics)
        if self.ema is not None:
            self._check_outputs("val_ema", self.val_ema_metrics)

    def on_test_epoch_end(self) -> None:
        self._check_outputs("test", self.test_metrics)

    def _check_outputs(self, stage: str, metrics: Metrics) -> None:
        """Warn how many outputs are not finite: such an epoch has no score. A collective. Raises NotFinite outside of a
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
        logits = network(*inputs(self._normalized(batch)))
        metrics.update(logits, batch["target"], batch["valid"], batch["index"])
        self.log_dict(
            metrics.named(stage),
            on_step=False,
            on_epoch=True,
            logger=None if self.uses_self_log else False,
            batch_size=len(batch["target"]),
        )
        return logits

    def _normalized(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with float images. A loader used without its data module gives uint8 ones."""
        image = batch["image"]
        if image.dtype != torch.uint8:
            return batch
        mean, std = (image.new_tensor(self.spec[key], dtype=torch.float64) * 255 for key in ("mean", "std"))
        image = (image.float() - mean.float()[:, None, None]) / std.float()[:, None, None]
        return {**batch, "image": image}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The network's optimizer, with `aux` in one more group."""
        optimizer = self.make_optimizer(self.model)
        if self.aux:
            optimizer.add_param_group({"params": [*self.aux.parameters()], "lr_scale": 1.0})
        return optimizer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"], checkpoint["spec"] = self.config, self.spec
