"""The best weights in pictures, for the tracker: `best/per_class`, `best/confusion`, `best/predictions`, and
`best/attention` where it is asked for.

Made once, at the end of a finished run, by rank 0 alone; what fails is a warning.
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
    """Tell the trackers of the rows that report.html is made of, at the step of the last row of the history. `task` has
    the best weights."""
    rows = next(logger.rows for logger in trainer.loggers if isinstance(logger, History))
    step = int(rows[-1]["step"]) if rows else trainer.global_step
    told = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger | TensorBoardLogger)]
    if told:
        _scored(run, trainer, told, step)
    if run.cfg.logger_args.get("attention"):
        with warn_on_error("best/attention"):
            _attention(run, task.model, told, step)


def _scored(run: Run, trainer: L.Trainer, told: list[Any], step: int) -> None:
    with warn_on_error("the pictures of the best weights"):
        scored = scored_page.read(run.folder, run.data.spec)
        shown = next(callback.shown for callback in trainer.callbacks if isinstance(callback, Predictions))
        if scored is None:
            return
        with warn_on_error("best/per_class"):
            log_table(told, "best/per_class", media_tables.per_class(scored), step)
        with warn_on_error("best/confusion"):
            log_picture(told, "best/confusion", figures.confused(scored).pixels(), step)
        with warn_on_error("best/predictions"):
            table = media_tables.examples(scored, shown, lambda ids: run_page.opened(run.data, ids))
            log_table(told, "best/predictions", table, step)
            boards = [logger for logger in told if isinstance(logger, TensorBoardLogger)]
            log_picture(boards, "best/predictions", figures.sheet(table).pixels() if boards else None, step)


def _attention(run: Run, model: nn.Module, told: list[Any], step: int) -> None:
    drawn = attention_maps.draw(model, run.data.spec, attention_maps.of_split(run.data))
    attention_maps.write(drawn, run.folder / attention_maps.NAME)
    log_picture(told, "best/attention", drawn, step)


def log_table(told: list[Any], key: str, table: media_tables.Table, step: int) -> None:
    """To W&B; TensorBoard has no tables."""
    for logger in told:
        if isinstance(logger, WandbLogger):
            import wandb

            data = [
                [wandb.Image(cell, file_type="jpg") if hasattr(cell, "thumbnail") else cell for cell in row]
                for row in table.rows
            ]
            logger.log_table(key, columns=table.columns, data=data, step=step)


def log_picture(told: list[Any], key: str, picture: np.ndarray | None, step: int) -> None:
    """(H, W, 3) uint8."""
    for logger in told:
        if isinstance(logger, WandbLogger):
            logger.log_image(key, [picture], step=step)
        else:
            logger.experiment.add_image(key, picture, step, dataformats="HWC")
