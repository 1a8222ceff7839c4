"""Where a run's rows go: metrics.csv always, and the tracker of --logger."""
from typing import Any

from experiments import fold_dirs, rundir
from experiments.build import Run
from lightning_modules.history import History
from lightning_modules.tracking import SafeWandbLogger
from models import cost


def loggers(run: Run) -> list[Any]:
    cfg, found = run.cfg, [History(run.folder / "metrics.csv")]
    if cfg.logger == "wandb":
        config = {**rundir.plain(cfg), "params": cost.parameters(run.model), "commit": rundir.commit()}
        name, group = fold_dirs.name_and_group(run.folder, cfg)
        found.append(SafeWandbLogger(run.folder, config=config, name=name, group=group))
    return found
