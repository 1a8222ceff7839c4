"""Who has started this process: torchrun, srun, or a person; and what speaks against the devices asked for. No
torch."""

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.config import Config

INTERACTIVE = ("bash", "interactive")  # names of SLURM's jobs with a shell for a person


def tasks() -> int:
    """Processes of one run that torchrun or srun has started, this one included; 1 without them."""
    if "RANK" in os.environ:
        return int(os.environ.get("WORLD_SIZE") or 1)
    return srun_tasks()


def srun_tasks() -> int:
    """Tasks of the job step that srun has started this process in; 1 outside of one: a batch script or a shell is no
    step of several."""
    if not {"SLURM_STEP_ID", "SLURM_STEPID"} & os.environ.keys():
        return 1
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or 1)


def speaks() -> bool:
    """Whether this process says what all processes of its machine would say."""
    return (
        os.environ.get("LOCAL_RANK") or (os.environ.get("SLURM_LOCALID") if srun_tasks() > 1 else None) or "0"
    ) == "0"


def refuse(prog: str, message: object) -> int:
    """Tell a person what to mend, once a machine. Returns the exit code."""
    if speaks():
        print(f"{prog}: {message}", file=sys.stderr, flush=True)
    return 2


def problem(cfg: "Config") -> str | None:
    """Why the processes that were started are not those of --devices x --num_nodes, and what to type; None where they
    are."""
    world, asked = (
        cfg.devices * cfg.num_nodes,
        f"--devices {cfg.devices}" + f" --num_nodes {cfg.num_nodes}" * (cfg.num_nodes > 1),
    )
    launched, step = os.environ.get("WORLD_SIZE"), srun_tasks()
    if launched:
        return (
            None
            if int(launched) == world
            else f"the launcher started {launched} processes, but --devices {cfg.devices} x --num_nodes "
            f"{cfg.num_nodes} are {world}"
        )
    if step > 1:
        machines = int(os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES") or cfg.num_nodes)
        fitting = f"--devices {step // machines}" + f" --num_nodes {machines}" * (machines > 1)
        return (
            None
            if (step, machines) == (world, cfg.num_nodes)
            else f"srun started {step} tasks on {machines} machine{'s' * (machines > 1)}, "
            f"and {asked} means {world}: {fitting}, or srun --ntasks {world}"
        )
    if cfg.dry_run:
        return None  # the ranks are yet to start
    job = int(os.environ.get("SLURM_NTASKS") or 1)
    if (
        job > 1
        and os.environ.get("SLURM_JOB_NAME") not in INTERACTIVE
        and not {"SLURM_STEP_ID", "SLURM_STEPID"} & os.environ.keys()
    ):
        return (
            f"{job} SLURM tasks, {asked}, and this process was not started by srun: srun python experiments/run.py "
            f"... (as "
            "experiments/launch/sbatch.sh does), or --ntasks=1 for the job"
        )
    if cfg.num_nodes > 1:
        return (
            f"--num_nodes {cfg.num_nodes}: torchrun or srun starts a run on several machines, as "
            f"experiments/launch/ does"
        )
    return None
