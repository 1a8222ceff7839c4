"""Weights & Biases that never prompts, never blocks and never costs a run: without a key or a network it logs offline."""
import netrc
import os
import threading
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lightning_modules.signals import PREEMPTED

PREEMPTED_SECONDS = 20
HOSTS = {"api.wandb.ai", "api.forge.coreweave.com"}


def has_credentials() -> bool:
    """Whether a W&B key lies on this machine: a look at the environment and netrc, without network or prompt."""
    if os.getenv("WANDB_API_KEY") or os.getenv("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    base = os.getenv("WANDB_BASE_URL", "")
    hosts = {urlsplit(base).netloc} if base else HOSTS
    for file in filter(None, (os.getenv("NETRC"), "~/.netrc", "~/_netrc")):
        try:
            found = netrc.netrc(os.path.expanduser(file))
        except (OSError, netrc.NetrcParseError):
            continue
        if any(found.authenticators(host) for host in hosts):
            return True
    return False


def wandb_mode() -> str:
    """online, offline or disabled: WANDB_MODE if set, else online; online without a key is offline, since wandb would ask for one."""
    if os.getenv("WANDB_DISABLED", "").lower() in ("1", "true"):
        return "disabled"
    mode = os.getenv("WANDB_MODE") or "online"
    mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)
    if mode == "online" and not has_credentials():
        rank_zero_warn("no W&B key found: logging offline (wandb login once, or upload later with wandb sync)")
        return "offline"
    return mode


def persistent_id(run_dir: Path) -> str:
    """The W&B id of a run directory, made once; every resume, rank and node of the run shares it."""
    file = run_dir / "wandb" / "run_id.txt"
    if file.is_file():
        return file.read_text().strip()
    identity = uuid.uuid4().hex[:8]
    if rank_zero_only.rank == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(identity)
    return identity


class SafeWandbLogger(WandbLogger):
    """WandbLogger for one run directory that falls back to offline instead of blocking or killing the job; `group` is of runs that belong
    together, as the folds of one."""

    def __init__(self, run_dir: Path, *, config: dict[str, Any], name: str | None = None, group: str | None = None, init_timeout: float = 60,
                 finish_timeout: float = 300):
        wanted = {"init_timeout": init_timeout, "finish_timeout": finish_timeout,
                  "x_transaction_log_flush_interval": 2.0}  # 15 s by default, which a kill -9 loses
        settings = wandb.Settings(**{key: value for key, value in wanted.items() if key in wandb.Settings.model_fields})
        super().__init__(mode=wandb_mode(), save_dir=run_dir, name=name or run_dir.name, group=group, id=persistent_id(run_dir), config=config,
                         settings=settings, project=os.getenv("WANDB_PROJECT", "vitlab"))
        self._wandb_init.pop("anonymous", None)  # a deprecated setting that Lightning passes

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is not None or self._wandb_init.get("mode") != "online":
            return WandbLogger.experiment.fget(self)
        try:
            return WandbLogger.experiment.fget(self)
        except Exception as error:  # no network, a wrong key, a server that fails
            rank_zero_warn(f"W&B is out of reach ({type(error).__name__}: {str(error)[:120]}): logging offline, upload with wandb sync")
            wandb.teardown()  # else "run ID is in use"
            self._wandb_init["mode"], self._experiment = "offline", None
            return WandbLogger.experiment.fget(self)

    @rank_zero_only
    def close(self, exit_code: int) -> None:
        """End the W&B run with its state: 0 finished, 75 preempted, anything else failed. A preempted one has no time to wait for long."""
        if self._experiment is None:
            return
        if exit_code == PREEMPTED:
            self._experiment.mark_preempting()
        finish = threading.Thread(target=wandb.finish, kwargs={"exit_code": exit_code}, daemon=True)
        finish.start()
        finish.join(PREEMPTED_SECONDS if exit_code == PREEMPTED else None)
        self._experiment = None
