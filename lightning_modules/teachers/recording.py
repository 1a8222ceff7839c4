"""Running a teacher alone over pictures: to write its answers down, and to hold written ones against it. Legend as in
teacher_cache."""

import math
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_modules.teachers import cached_teacher


class Recorder(L.LightningModule):
    """Runs the teacher over the batches of an epoch and writes this rank's shard; nothing is trained.

    Args:
        teacher: normalised pictures (B, 3, H, W) -> logits (B, C); it has `to(device)`.
        folder, about: the cache.
    """

    def __init__(self, teacher: Any, folder: Path, about: dict[str, Any]):
        super().__init__()
        self.teacher, self.folder, self.about, self.digest = teacher, folder, about, cached_teacher.digest_of(about)
        self.parts: list[dict[str, Tensor]] = []

    def setup(self, stage: str) -> None:
        self.teacher.to(self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits = self.teacher(batch["image"])
        part = {"row": cached_teacher.row_of(batch["index"], batch.get("copy"), self.about["copies"]).int()}
        part |= cached_teacher.compress(logits, self.about["topk"], self.about["identity"]["task"])
        if "valid" in batch:
            part = {name: tensor[batch["valid"]] for name, tensor in part.items()}
        self.parts.append(part)

    def on_validation_epoch_end(self) -> None:
        parts, self.parts = self.parts, []
        tensors = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
        if not tensors["value"].isfinite().all():
            raise ValueError("the teacher gives logits that are not finite; give it a wider precision")
        file = cached_teacher.shard_file(self.folder, self.about, self.trainer.current_epoch, self.global_rank)
        cached_teacher.write_shard(file, tensors, self.digest)


class Checker(L.LightningModule):
    """Runs the teacher over batches of a finished cache and measures how far the stored answers are from it, over all
    ranks.

    `pictures`, `equal` (of them with the same likeliest class) and `error`: the largest difference of a stored class's
    probability; for other tasks of an output, relative to 1 + its size. `rows`: where in the cache the data's pictures
    are, if they are a part of them.
    """

    def __init__(self, teacher: Any, cache: cached_teacher.CachedTeacher, rows: Tensor | None = None):
        super().__init__()
        self.teacher, self.cache, self.rows = teacher, cache, rows
        self.pictures, self.equal, self.error = 0, 0, 0.0
        self.found: list[tuple[float, int, int]] = []

    def setup(self, stage: str) -> None:
        self.teacher.to(self.device)
        self.cache.to(self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        index = batch["index"] if self.rows is None else self.rows.to(self.device)[batch["index"]]
        live, stored = self.teacher(batch["image"]), self.cache(index, self.trainer.current_epoch, batch.get("copy"))
        if self.cache.about["identity"]["task"] == "classification":
            k = min(self.cache.about["topk"], live.shape[-1])
            likeliest = stored.topk(k).indices  # (B, K)
            distance = (live.softmax(-1) - stored.exp()).gather(1, likeliest)
        else:
            distance = (live - stored) / (1 + live.abs())
        distance, equal = distance.abs().amax(1), (live.argmax(1) == stored.argmax(1))
        if "valid" in batch:
            distance, equal = distance[batch["valid"]], equal[batch["valid"]]
        self.found.append(
            (float(distance.nan_to_num(math.inf).amax()) if len(distance) else 0.0, int(equal.sum()), len(equal))
        )

    def on_validation_epoch_end(self) -> None:
        found, self.found = [self.found], []
        if dist.is_initialized():
            found = found * dist.get_world_size()
            dist.all_gather_object(found, found[0])
        for error, equal, pictures in chain(*found):
            self.error, self.equal, self.pictures = max(self.error, error), self.equal + equal, self.pictures + pictures
