"""Score of a teacher on the validation images, printed before the first step: a wrong order of classes or a wrong
preparation of images shows at once."""

from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import default_collate

from datamodules.base import PictureData
from datamodules.loading.images import EvalPictures
from lightning_modules.loggers.formats import format_metric
from lightning_modules.loggers.messages import warn_on_error
from lightning_modules.objectives import metrics
from lightning_modules.objectives.targets import predict

PICTURES, AT_ONCE = 128, 16  # scored, evenly spaced over val; in one pass


class TeacherScore(Callback):
    """Prints the score of the live teacher of a run on a few pictures of val, once, on the first rank."""

    def __init__(self, teacher: Any, name: str):
        self.teacher, self.name = teacher, name

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0 and trainer.is_global_zero:
            tell(self.teacher, self.name, trainer.datamodule, pl_module.device)


def tell(teacher: Any, name: str, data: PictureData, device: torch.device) -> None:
    """Print the line, where there is a val split. A picture that cannot be read spares it, and no random number is
    drawn."""
    if not data.sizes["val"]:
        return
    with warn_on_error(f"the score of --teacher {name}"):
        print(f"teacher {name}: {score(teacher, data, device)}", flush=True)


@torch.no_grad()
def score(teacher: Any, data: PictureData, device: torch.device) -> str:
    """The task's metric of a teacher (it has `to(device)`) over PICTURES of val in the student's evaluation view, with
    chance for classes."""
    split, found, targets, spec = data.splits["val"], [], [], data.spec
    rows = np.unique(np.linspace(0, len(split) - 1, min(PICTURES, len(split))).round().astype(int)).tolist()
    pictures, teacher = EvalPictures(split, data.eval_transform()), teacher.to(device)
    for start in range(0, len(rows), AT_ONCE):
        batch = default_collate([pictures[row, True] for row in rows[start : start + AT_ONCE]])
        batch = data.on_after_batch_transfer({key: value.to(device) for key, value in batch.items()}, 0)
        answer = teacher(batch["image"])
        found.append((answer if spec["task"] == "regression" else predict(answer, spec)).cpu())
        targets.append(batch["target"].cpu())
    chosen = metrics.find(None, spec["task"])
    value = metrics.score(chosen, torch.cat(targets).numpy(), torch.cat(found).numpy(), spec)
    chance = f" (chance is {100 / spec['num_outputs']:.2f} %)" if spec["task"] == "classification" else ""
    return f"{format_metric(f'val/{chosen.name}', value)} on {len(rows)} pictures{chance}"
