"""A task whose student also learns from a teacher: one more term in the loss; everything else is the task's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.objectives.distill_losses import Features, warmup
from lightning_modules.objectives.targets import expectation, scale
from lightning_modules.task import Task
from lightning_modules.teachers import cached_teacher
from lightning_modules.teachers.cached_teacher import CachedTeacher
from lightning_modules.teachers.teacher import Teacher, Teachers


class Distiller(Task):
    """A task with a teacher: total = weights[0] x loss on the labels + weights[1] x loss on the teacher (DeiT's
    losses.py).

    A student with two heads learns the labels by the first and the teacher by the second; with one, both by the same
    logits. `Features` compares what lies before the heads: there the mean of both, which evaluation takes, learns the
    labels, as in timm's FeatureDistillationTask. The teacher sees the batch as the student does, augmented and mixed.
    It is no submodule: absent from state dict, optimizer and EMA.

    Args:
        teacher: images (B, 3, H, W) -> logits (B, K), of a regression targets in own units (B, T); a cached one
            answers by the rows of the batch instead.
        distill: (student's logits, teacher's, targets) -> scalar, or `Features` on pooled features.
        weights: of (loss on the labels, loss on the teacher).
        warmup_epochs: over which the second weight rises (`distill_losses.warmup`).
        task: the rest, see Task.
    """

    load_from_checkpoint = Task.load_from_checkpoint  # gives a Task: the student, without its teacher

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

    def on_fit_start(self) -> None:
        """Raise ValueError where cached answers, not checked before, are of other images than this training's."""
        if not isinstance(self.teacher, CachedTeacher) or self.teacher.checked:
            return
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            raise ValueError("cached answers belong to the rows of a data module: trainer.fit(task, datamodule=data)")
        there, world = self.teacher.about["identity"], self.trainer.world_size
        here = cached_teacher.identity_of(
            data,
            there,
            epochs=self.config["epochs"],
            world_size=world,
            pass_size=data.global_batch_size // world // data.accumulation(world),
            device=self.device.type,
        )
        self.teacher.check(here)

    def teacher_logits(self, batch: dict[str, Tensor]) -> Tensor:
        """The teacher's answers to a batch: logits (B, K) float32, of a regression targets in own units (B, T)
        float64."""
        if isinstance(self.teacher, CachedTeacher):
            return self.teacher(batch["index"], self.current_epoch, batch.get("copy"))
        return self.teacher(batch["image"])

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss`, its parts `base_loss` and `distill_loss` (each a mean over the batch, unweighted), and the batch's
        metrics."""
        image, target = batch["image"], batch["target"]
        if isinstance(self.distill, Features):
            tokens = self.model.forward_features(image)
            output = self.model.forward_head(tokens)
            student, live = self.model.forward_head(tokens, pre_logits=True), self.teacher
            assert isinstance(live, Teacher)
            teacher = live.features(image)
        else:
            output, teacher = self.model(image), self.teacher_logits(batch)
            student = output[1] if isinstance(output, tuple) else output
            if self.spec["task"] == "regression":  # both as predictions in the student's target range, (B, T)
                teacher = scale(teacher, self.spec["target_range"])
                student = expectation(student.float(), self.spec["encoding"], teacher.shape[1])
        logits = (output[0] if isinstance(output, tuple) else output).float()
        base_loss = self.loss(logits, target)
        labels = () if isinstance(self.distill, Features) else (target,)
        distill_loss = self.distill(student, teacher, *labels)
        share = self.weights[1] * warmup(self.current_epoch, self.warmup_epochs)
        return {
            "loss": self.weights[0] * base_loss + share * distill_loss,
            "base_loss": base_loss.detach(),
            "distill_loss": distill_loss.detach(),
            **self.batch_metrics(logits, target),
        }

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The student's optimizer, with the parameters of the loss itself (a projection) in one more group."""
        optimizer = super().configure_optimizers()
        own = list(self.distill.parameters()) if isinstance(self.distill, nn.Module) else []
        if own:
            optimizer.add_param_group({"params": own, "lr_scale": 1.0})
        return optimizer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if isinstance(self.teacher, CachedTeacher):
            checkpoint["teacher_digest"] = self.teacher.digest  # another cache of the same name is refused on resume
