"""How a student learns from a teacher beside its labels: one more term in the loss; everything else is the task's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.objectives.distill_losses import Features, warmup
from lightning_modules.objectives.targets import expectation, scale
from lightning_modules.task import Task
from lightning_modules.teachers.cached_teacher import CachedTeacher
from lightning_modules.teachers.teacher import Teacher, Teachers


class Distill(Task):
    """A task with a teacher: total = weights[0] x loss on the labels + weights[1] x loss on the teacher (DeiT's
    losses.py).

    A student with two heads learns the labels by the first and the teacher by the second; with one, both by the same
    logits. `Features` compare what lies before the heads: there the mean of both, which evaluation takes, learns the
    labels, as in timm's FeatureDistillationTask. The teacher sees the batch as the student does, augmented and mixed.
    It is no part of the module: in no state dict, optimizer or EMA.

    Args:
        teacher: pictures (B, 3, H, W) -> logits (B, K), of a regression targets in own units (B, T); a cached one
            answers by the rows of the batch instead.
        distill: (student's logits, teacher's, targets) -> scalar, or `Features` on pooled features.
        weights: of (loss on the labels, loss on the teacher).
        warmup_epochs: over which the second weight rises (`distill_losses.warmup`).
        task: the rest, see Task.
    """

    def __init__(
        self,
        *task: Any,
        teacher: Teacher | Teachers | CachedTeacher,
        distill: Callable[..., Tensor],
        weights: tuple[float, float],
        warmup_epochs: float = 0,
        **rest: Any,
    ):
        super().__init__(*task, **rest)
        self.teacher, self.distill, self.weights, self.warmup_epochs = teacher, distill, weights, warmup_epochs
        if hasattr(self.model, "set_distilled_training"):
            self.model.set_distilled_training(not isinstance(distill, Features))

    def setup(self, stage: str) -> None:
        self.teacher.to(self.device)

    def told(self, batch: dict[str, Tensor]) -> Tensor:
        """What the teacher says of a batch: logits (B, K) float32, of a regression targets in own units (B, T)
        float64."""
        if isinstance(self.teacher, CachedTeacher):
            return self.teacher(batch["index"], self.current_epoch, batch.get("copy"))
        return self.teacher(batch["image"])

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss`, its parts `base_loss` and `distill_loss` (each a mean over the batch, unweighted), and what the task
        tells of the batch."""
        image, target = batch["image"], batch["target"]
        if isinstance(self.distill, Features):
            tokens = self.model.forward_features(image)
            output, seen = self.model.forward_head(tokens), self.model.forward_head(tokens, pre_logits=True)
            told = self.teacher.features(image)
        else:
            output, told = self.model(image), self.told(batch)
            seen = output[1] if isinstance(output, tuple) else output
            if (
                self.spec["task"] == "regression"
            ):  # both as predictions, scaled by the range of the student's data: (B, T)
                told = scale(told, self.spec["target_range"])
                seen = expectation(seen.float(), self.spec["encoding"], told.shape[1])
        logits = (output[0] if isinstance(output, tuple) else output).float()
        base = self.loss(logits, target)
        part = self.distill(seen, told) if isinstance(self.distill, Features) else self.distill(seen, told, target)
        total = self.weights[0] * base + self.weights[1] * warmup(self.current_epoch, self.warmup_epochs) * part
        return {
            "loss": total,
            "base_loss": base.detach(),
            "distill_loss": part.detach(),
            **self.running(logits, target),
        }

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The student's, and the parameters of the loss itself (a projection) in a group of their own."""
        optimizer = super().configure_optimizers()
        own = list(self.distill.parameters()) if isinstance(self.distill, nn.Module) else []
        if own:
            optimizer.add_param_group({"params": own, "lr_scale": 1.0})
        return optimizer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if isinstance(self.teacher, CachedTeacher):
            checkpoint["teacher_digest"] = self.teacher.digest  # another cache of the same name is refused on resume
