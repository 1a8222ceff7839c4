"""Where a run's rows go: metrics.csv always, and the tracker of --logger."""
import platform
from importlib.metadata import version
from typing import Any

import torch

from experiments import build, fold_dirs, plan, rundir
from experiments.build import Run
from lightning_modules.history import History
from lightning_modules.tracking import SafeWandbLogger
from models import cost

PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "timm", "wandb", "numpy")


def loggers(run: Run) -> list[Any]:
    cfg, found = run.cfg, [History(run.folder / "metrics.csv")]
    if cfg.logger == "wandb":
        name, group = fold_dirs.name_and_group(run.folder, cfg)
        found.append(SafeWandbLogger(run.folder, config=about(run), name=name, group=group))
    return found


def about(run: Run) -> dict[str, Any]:
    """What a tracker is told of a run once: its config, what the network costs, on what code and machine it runs."""
    cfg = run.cfg
    return {**rundir.plain(cfg), "params": cost.parameters(run.model), "gmacs": round(build.gmacs(run), 4), "commit": rundir.commit(),
            "world_size": plan.world_size(cfg), "device": torch.cuda.get_device_name() if plan.on_gpu(cfg) else platform.processor() or "cpu",
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}}
