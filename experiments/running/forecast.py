"""Forecast of a run before it starts: processes, memory, the batch that fits one device, time."""

import os
import time
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from datamodules.loading.cores import cores
from experiments.cli import launcher
from experiments.config import Config
from lightning_modules.callbacks.preemption import COLLECTIVE_TIMEOUT


def lacks_gpus(cfg: Config) -> bool:
    """Whether more GPUs are asked for than this machine has; one device in an `auto` is the CPU where there is none."""
    gpus = torch.cuda.device_count()
    return cfg.accelerator != "cpu" and gpus < cfg.devices and (gpus > 0 or cfg.devices > 1 or cfg.accelerator == "gpu")


def device_problem(cfg: Config) -> str | None:
    """The problem with the devices asked for on this machine, with the flag that helps; None without one."""
    gpus = torch.cuda.device_count()
    if started := launcher.problem(cfg.devices, cfg.num_nodes, planned=cfg.dry_run):
        return started
    if cfg.precision == "16-mixed" and not on_gpu(cfg):
        return "--precision 16-mixed needs a GPU; on CPU it is 32-true or bf16-mixed"
    if cfg.accelerator == "cpu":
        return _lightning_problem(cfg)
    if cfg.accelerator == "gpu" and gpus == 0:
        return "--accelerator gpu: this machine has no GPU that PyTorch can use; --accelerator cpu works anywhere"
    if gpus == 0 and cfg.devices > 1:
        return (
            f"--devices {cfg.devices}: this machine has no GPU; add --accelerator cpu for {cfg.devices} processes "
            f"on its CPU"
        )
    if 0 < gpus < cfg.devices:
        return (
            f"--devices {cfg.devices}: this machine has {gpus} GPU{'s' * (gpus > 1)}; --devices {gpus}, more "
            f"machines are --num_nodes"
        )
    return _lightning_problem(cfg)


def _lightning_problem(cfg: Config) -> str | None:
    """Lightning's objection to strategy, precision and devices together, before anything is written."""
    try:
        L.Trainer(
            **placement(cfg),
            plugins=[environment(cfg)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (ValueError, MisconfigurationException) as error:
        return f"--strategy {cfg.strategy} --precision {cfg.precision}: {error}"
    return None


def placement(cfg: Config) -> dict[str, Any]:
    """Arguments of the Trainer: accelerator, devices, num_nodes, strategy, precision."""
    ddp = cfg.strategy in ("auto", "ddp") and world_size(cfg) > 1
    strategy = DDPStrategy(timeout=COLLECTIVE_TIMEOUT) if ddp else cfg.strategy
    return {
        "accelerator": "gpu" if on_gpu(cfg) else "cpu",
        "devices": cfg.devices,
        "num_nodes": cfg.num_nodes,
        "strategy": strategy,
        "precision": precision(cfg) if cfg.precision == "auto" else cfg.precision,
    }


def environment(cfg: Config) -> ClusterEnvironment:
    """The launcher of the ranks. A single SLURM task, or a shell in an interactive job, starts its ranks itself."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if launcher.srun_tasks() == 1:
        return LightningEnvironment()
    os.environ.setdefault(
        "SLURM_NTASKS_PER_NODE", str(cfg.devices)
    )  # Lightning wants it; srun --ntasks alone does not set it
    job, step = (int(os.environ.get(key) or 0) for key in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    os.environ.setdefault(
        "MASTER_PORT", str(15000 + (10 * job + step) % 17000)
    )  # two steps of one job do not meet; below what Linux gives clients
    return SLURMEnvironment(auto_requeue=False)  # Preemption does it, at a step's end


def world_size(cfg: Config) -> int:
    return cfg.devices * cfg.num_nodes


def on_gpu(cfg: Config) -> bool:
    return cfg.accelerator != "cpu" and torch.cuda.device_count() > 0


def precision(cfg: Config, *, assumed: bool = False) -> Literal["32-true", "bf16-mixed", "16-mixed"]:
    """The precision that `auto` means on this machine, or on an `assumed` GPU where it has none."""
    if assumed and torch.cuda.device_count() == 0:
        return "bf16-mixed"
    if not on_gpu(cfg):
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def share_cores(cfg: Config) -> None:
    """Compute with the threads of this rank's cores (`cores`): PyTorch counts no container's CPU quota. OMP_NUM_THREADS
    wins."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    torch.set_num_threads(cores(cfg.devices))
    if cfg.devices > 1:
        os.environ["OMP_NUM_THREADS"] = str(
            cores(cfg.devices)
        )  # for the ranks that Lightning starts, and against its own count


def images_per_second(model: nn.Module, cfg: Config, pictures: int) -> float:
    """Forward and backward of random pictures on one device, after one pass to warm up; data loading is not in it."""
    device = torch.device("cuda" if on_gpu(cfg) else "cpu")
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(cfg.precision)
    model, images = model.to(device).train(), torch.randn(pictures, 3, *cfg.size, device=device)
    columns = getattr(model, "column_mlp", None)
    given = (images,) if columns is None else (images, images.new_zeros(pictures, columns[0].in_features))

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            output = model(*given)
        sum(part.float().sum() for part in (output if isinstance(output, tuple) else (output,))).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()
    steps, start = 0, time.monotonic()
    while steps < 2 or time.monotonic() - start < 1.0:
        step()
        steps += 1
    return steps * pictures / (time.monotonic() - start)


def table(rows: list[tuple[str, Any]]) -> str:
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)
