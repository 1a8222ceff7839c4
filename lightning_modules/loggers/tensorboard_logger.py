"""TensorBoard's event files beside metrics.csv, by Lightning's own logger."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from lightning_modules.loggers.messages import warn


class TensorBoard(TensorBoardLogger):
    """TensorBoardLogger for one run directory, in its folder `tensorboard`: each row is on the disk when it is logged,
    and a resume hides the rows after its checkpoint. A disk that takes nothing costs a warning."""

    def __init__(self, run_dir: Path, config: dict[str, Any]):
        super().__init__(run_dir, name="", version="tensorboard", default_hp_metric=False)
        self.config, self.failed = config, False

    @rank_zero_only
    def cut(self, step: int) -> None:
        """At the start from optimizer step `step`: readers forget the events after it; 0 starts an empty history."""
        start = Event(
            step=step + 1 if step else 0, session_log=SessionLog(status=SessionLog.START)
        )  # as torch's purge_step, for which it is late
        with self._sparing():
            self.experiment.file_writer.add_event(start)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with self._sparing():
            super().log_metrics(metrics, step)
            self.experiment.flush()  # within two minutes by default, which a kill -9 loses

    @rank_zero_only
    def summarise(self, values: dict[str, Any]) -> None:
        """Log the result: the config and what the run scored, for the page HPARAMS."""
        scores = {
            key: value
            for key, value in values.items()
            if (key == "best" or key.startswith("test/")) and value is not None
        }
        with self._sparing():
            self.log_hyperparams(self.config, scores, values["steps"])

    def save(self) -> None:
        """config.yaml holds what would stand in hparams.yaml."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        with self._sparing():
            super().finalize(status)

    @rank_zero_only
    def close(self, exit_code: int) -> None:
        self.finalize("failed" if exit_code else "success")

    @contextmanager
    def _sparing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self.failed:
                warn(
                    f"TensorBoard's files take nothing more ({type(error).__name__}: {str(error)[:120]}); metrics.csv "
                    f"goes on"
                )
            self.failed = True
