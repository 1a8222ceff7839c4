"""Tables and images of the best weights for the trackers: `best/per_class`, `best/confusion`, `best/predictions`, and
`best/attention` where it is asked for.

Logged once, at the end of a finished run, by rank 0 alone; an error is a warning.
"""

from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import nn

from experiments.reporting import attention_maps, figures, media_tables, run_page
from experiments.reporting import scored as scored_page
from experiments.running.build import Run
from lightning_modules.callbacks.predictions import Predictions
from lightning_modules.loggers.csv_logger import History
from lightning_modules.loggers.messages import warn_on_error


def log(run: Run, task: L.LightningModule, trainer: L.Trainer) -> None:
    """Log tables and images of the rows that report.html shows to the trackers, at the step of the last row of the
    history. `task` has the best weights."""
    rows = next(logger.rows for logger in trainer.loggers if isinstance(logger, History))
    step = int(rows[-1]["step"]) if rows else trainer.global_step
    trackers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger | TensorBoardLogger)]
    if trackers:
        _scored(run, trainer, trackers, step)
    if run.cfg.logger_args.get("attention"):
        with warn_on_error("best/attention"):
            _attention(run, task.model, trackers, step)


def _scored(run: Run, trainer: L.Trainer, trackers: list[Any], step: int) -> None:
    with warn_on_error("the pictures of the best weights"):
        scored = scored_page.read(run.folder, run.data.spec)
        shown = next(callback.shown for callback in trainer.callbacks if isinstance(callback, Predictions))
        if scored is None:
            return
        with warn_on_error("best/per_class"):
            log_table(trackers, "best/per_class", media_tables.per_class(scored), step)
        with warn_on_error("best/confusion"):
            log_picture(trackers, "best/confusion", figures.confused(scored).pixels(), step)
        with warn_on_error("best/predictions"):
            table = media_tables.examples(scored, shown, lambda ids: run_page.opened(run.data, ids))
            log_table(trackers, "best/predictions", table, step)
            boards = [logger for logger in trackers if isinstance(logger, TensorBoardLogger)]
            log_picture(boards, "best/predictions", figures.sheet(table).pixels() if boards else None, step)


def _attention(run: Run, model: nn.Module, trackers: list[Any], step: int) -> None:
    drawn = attention_maps.draw(model, run.data.spec, attention_maps.of_split(run.data))
    attention_maps.write(drawn, run.folder / attention_maps.NAME)
    log_picture(trackers, "best/attention", drawn, step)


def log_table(trackers: list[Any], key: str, table: media_tables.Table, step: int) -> None:
    """Log a table to W&B; TensorBoard has no tables."""
    for logger in trackers:
        if isinstance(logger, WandbLogger):
            import wandb

            data = [
                [wandb.Image(cell, file_type="jpg") if hasattr(cell, "thumbnail") else cell for cell in row]
                for row in table.rows
            ]
            logger.log_table(key, columns=table.columns, data=data, step=step)


def log_picture(trackers: list[Any], key: str, picture: np.ndarray | None, step: int) -> None:
    """Log an image (H, W, 3) uint8."""
    for logger in trackers:
        if isinstance(logger, WandbLogger):
            logger.log_image(key, [picture], step=step)
        else:
            logger.experiment.add_image(key, picture, step, dataformats="HWC")
