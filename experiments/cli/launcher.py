"""The launcher of this process (torchrun, srun or a shell), and checks of the number of ranks. No torch."""

import os
import sys

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


def prints() -> bool:
    """Whether this process prints for all processes of its machine."""
    return (
        os.environ.get("LOCAL_RANK") or (os.environ.get("SLURM_LOCALID") if srun_tasks() > 1 else None) or "0"
    ) == "0"


def refuse(prog: str, message: object) -> int:
    """Print an error, once a machine. Returns the exit code."""
    if prints():
        print(f"{prog}: {message}", file=sys.stderr, flush=True)
    return 2


def problem(devices: int, num_nodes: int, *, planned: bool) -> str | None:
    """The mismatch between the started processes and --devices x --num_nodes, with what to type; None without one.

    planned: only a plan is asked for, and the ranks are not started yet.
    """
    world, asked = devices * num_nodes, f"--devices {devices}" + f" --num_nodes {num_nodes}" * (num_nodes > 1)
    launched, step = os.environ.get("WORLD_SIZE"), srun_tasks()
    if launched:
        return (
            None
            if int(launched) == world
            else f"the launcher started {launched} processes, but --devices {devices} x --num_nodes "
            f"{num_nodes} are {world}"
        )
    if step > 1:
        machines = int(os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES") or num_nodes)
        fitting = f"--devices {step // machines}" + f" --num_nodes {machines}" * (machines > 1)
        return (
            None
            if (step, machines) == (world, num_nodes)
            else f"srun started {step} tasks on {machines} machine{'s' * (machines > 1)}, "
            f"and {asked} means {world}: {fitting}, or srun --ntasks {world}"
        )
    if planned:
        return None
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
    if num_nodes > 1:
        return (
            f"--num_nodes {num_nodes}: torchrun or srun starts a run on several machines, as experiments/launch/ does"
        )
    return None
