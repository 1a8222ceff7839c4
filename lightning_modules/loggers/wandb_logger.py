"""Weights & Biases that never prompts, never blocks and never costs a run: without a key or a network it logs
offline."""

import atexit
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import wandb
from lightning.fabric.loggers.logger import _DummyExperiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from lightning_modules.callbacks.signals import PREEMPTED
from lightning_modules.loggers.csv_logger import read_history
from lightning_modules.loggers.messages import note, warn
from lightning_modules.loggers.wandb_local import STEP, has_credentials, id_of_agent, own_id, read

INIT_SECONDS, FINISH_SECONDS, PREEMPTED_SECONDS, UPLOAD_SECONDS = 60, 300, 20, 900  # most that a server may take
ASK_SECONDS = 5  # that it may take to say it is there
FLUSH_SECONDS = 0.2  # to the .wandb file; wandb's 15 are lost by a kill -9
ONLINE = ("online", "shared")
_staging: str | None = None


def wandb_mode() -> str:
    """online, offline or disabled: WANDB_MODE if set, else online; online without a key is offline, since wandb would
    ask for one."""
    if os.getenv("WANDB_DISABLED", "").lower() in ("1", "true"):
        return "disabled"
    if not os.getenv("WANDB_MODE"):
        os.environ.pop("WANDB_MODE", None)  # set to nothing it is an error to wandb
    mode = os.getenv("WANDB_MODE", "online")
    mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)
    if mode == "online" and not has_credentials():
        note("no W&B key found: logging offline (wandb login once, or upload later with wandb sync)")
        return "offline"
    return mode


def persistent_id(run_dir: Path) -> str:
    """The W&B id of a run directory, made once or given by a sweep's agent; every resume, rank and node of the run
    shares it."""
    own, given = own_id(run_dir), id_of_agent()
    identity = given or own or uuid.uuid4().hex[:8]
    if getattr(rank_zero_only, "rank", 0) == 0 and identity != own:
        file = run_dir / "wandb" / "run_id.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(identity)
    return identity


class SafeWandbLogger(WandbLogger):
    """WandbLogger for one run directory that falls back to offline instead of blocking or killing the job; what fails
    later is a warning.

    Args:
        identity: the W&B run; None is the directory's own.
        group: of runs that belong together, as the folds of one.
        job_type, tags, notes: as wandb.init has them. None leaves those of the environment (WANDB_TAGS) or of a resumed
            run.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        config: dict[str, Any],
        identity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
    ):
        wanted: dict[str, Any] = {
            "init_timeout": INIT_SECONDS,
            "finish_timeout": FINISH_SECONDS,
            "x_transaction_log_flush_interval": FLUSH_SECONDS,
        }
        settings = wandb.Settings(**{key: value for key, value in wanted.items() if key in wandb.Settings.model_fields})
        super().__init__(
            mode=wandb_mode(),
            save_dir=run_dir,
            name=os.getenv("WANDB_NAME") or name or run_dir.name,
            group=group,
            job_type=job_type,
            tags=tags,
            notes=notes,
            id=identity or persistent_id(run_dir),
            config=config,
            settings=settings,
            project=os.getenv("WANDB_PROJECT") or "vitlab",
        )
        self._warned: set[str] = set()
        self._away, self._known = False, -1.0
        _stage_in(run_dir / "wandb" / "data")
        self._wandb_init.pop("anonymous", None)  # a deprecated setting that Lightning passes
        if id_of_agent():
            self._wandb_init |= {"project": None, "id": None}  # wandb takes the agent's, and warns of others

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        try:
            stock: Any = WandbLogger.experiment
            return stock.fget(self)
        except Exception as error:  # no network, a wrong key, a server that fails; a disk that takes nothing
            mode = self._wandb_init["mode"]
            after = "logging offline, upload with wandb sync" if mode in ONLINE else "this run is not tracked"
            warn(f"W&B is out of reach ({_reason(error)}): {after}")
            with suppress(Exception):
                wandb.teardown()  # else "run ID is in use"
            nothing: Any = _DummyExperiment()
            self._wandb_init["mode"], self._experiment = ("offline", None) if mode in ONLINE else ("disabled", nothing)
            return self.experiment

    @rank_zero_only
    def cut(self, step: int) -> None:
        """At the start from optimizer step `step`: log the rows of metrics.csv up to it that a kill or an outage has
        kept from W&B. Rows of later steps that W&B has already are left out when they come again: a run goes on to the
        byte, and W&B takes nothing back."""
        with self._sparing():
            self._known = self._last_step()
            for row in read_history(Path(self.save_dir or "") / "metrics.csv"):
                if row["step"] <= step:
                    self.log_metrics({key: value for key, value in row.items() if key != "step"}, step=int(row["step"]))

    def _last_step(self) -> float:
        """The last step W&B has of this run: the server's or, offline, of its files here; -1 for none."""
        summary, identity = self.experiment.summary, self.experiment.id  # first: it may fall back to offline
        if self._wandb_init["mode"] == "online":
            return summary.get(STEP, -1)
        parts = [read(file) for file in (Path(self.save_dir or "") / "wandb").glob("*run-*/*.wandb")]
        return max(
            (row[STEP] for part in parts if part and part["id"] == identity for row in part["rows"] if STEP in row),
            default=-1,
        )

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log a row; one of numbers at a step that W&B had at the start is there already."""
        with self._sparing():
            if (
                step is None
                or step > self._known
                or not all(isinstance(value, int | float) for value in metrics.values())
            ):
                super().log_metrics(metrics, step)

    @rank_zero_only
    def log_table(
        self,
        key: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        if self._in_reach():
            super().log_table(key, columns, data, dataframe, step)

    def _in_reach(self) -> bool:
        """Whether the server of an online run answers, asked before each artifact (a table is one too): wandb would
        wait long, and keep none."""
        if self._away or self._wandb_init["mode"] not in ONLINE or self._experiment is None:
            return not self._away
        answered = threading.Event()
        asking = threading.Thread(target=_ask, args=(answered,), daemon=True)  # wandb's own service may hang too
        asking.start()
        asking.join(ASK_SECONDS + 1)
        if not answered.is_set():
            self._away = True
            warn(
                f"W&B does not answer any more ({ASK_SECONDS} s): the tables and weights that it lacks are in the run "
                f"directory alone"
            )
        return not self._away

    @rank_zero_only
    def summarise(self, values: dict[str, Any]) -> None:
        """Write a run's result into its summary."""
        with self._sparing():
            if not isinstance(self.experiment, _DummyExperiment):
                self.experiment.summary.update({key: value for key, value in values.items() if value is not None})

    @rank_zero_only
    def upload(self, weights: Path, values: dict[str, Any]) -> None:
        """Log a file of weights as the run's one artifact, `best`, with these values; the file stays where it is, no
        copy is made."""
        with self._sparing(f"the weights are not there, they are in {weights}"):
            if isinstance(self.experiment, _DummyExperiment) or not self._in_reach():
                return
            artifact = wandb.Artifact(f"model-{self.experiment.id}", "model", metadata=values)
            artifact.add_file(str(weights), policy="immutable", skip_cache=True)
            logged = self.experiment.log_artifact(artifact, aliases=["best"])
            if self._wandb_init["mode"] == "online":
                logged.wait(UPLOAD_SECONDS)

    @contextmanager
    def _sparing(self, without: str = "the run goes on, metrics.csv and result.json have it all") -> Iterator[None]:
        """Turn errors inside (a service or a disk that is gone) into a warning, once each."""
        try:
            yield
        except Exception as error:
            if (reason := _reason(error)) not in self._warned:
                warn(f"W&B takes nothing ({reason}): {without}")
            self._warned.add(reason)

    @rank_zero_only
    def close(self, exit_code: int) -> None:
        """End the W&B run with its state: 0 finished, 75 preempted, anything else failed. A preempted one has no time
        to wait for long."""
        if self._experiment is None:
            return
        seconds = PREEMPTED_SECONDS if exit_code == PREEMPTED else FINISH_SECONDS if self._in_reach() else ASK_SECONDS
        ended, began = threading.Event(), time.monotonic()
        finish = threading.Thread(target=self._finish, args=(exit_code, ended), daemon=True)
        finish.start()
        finish.join(
            seconds + 30 if seconds == FINISH_SECONDS else seconds
        )  # it keeps to FINISH_SECONDS itself, where the service answers
        self._experiment = None
        if time.monotonic() - began >= seconds:
            warn("W&B has not ended in time: wandb sync --include-online uploads what is missing")
        if not ended.is_set():
            atexit.register(_leave, exit_code)  # before wandb's own, which waits without end for a service that hangs

    def _finish(self, exit_code: int, ended: threading.Event) -> None:
        with self._sparing():
            if exit_code == PREEMPTED:
                self.experiment.mark_preempting()
            wandb.finish(exit_code=exit_code)
            ended.set()


def _stage_in(folder: Path) -> None:
    """Have wandb keep copies of pictures in tables here until they are uploaded, not in the home directory;
    WANDB_DATA_DIR goes before."""
    global _staging
    if os.getenv("WANDB_DATA_DIR") in (None, "", _staging):
        _staging = os.environ["WANDB_DATA_DIR"] = str(folder.resolve())


def _ask(answered: threading.Event) -> None:
    with suppress(Exception):
        wandb.Api(timeout=ASK_SECONDS)  # asks the server whose key this is
        answered.set()


def _leave(exit_code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:120]}"
