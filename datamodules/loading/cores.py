"""Cores and memory that this process may use: its affinity mask, and the quotas of its control groups (containers).
Only the standard library."""

import os
from collections.abc import Iterator

CGROUPS, CGROUP_ROOT = "/proc/self/cgroup", "/sys/fs/cgroup"


def cores(local_ranks: int = 1) -> int:
    """Whole cores of one of `local_ranks` processes on this machine, at least 1: its share of the affinity mask and of
    the CPU quota.

    A mask that srun has given to this task alone is not divided.
    """
    mask = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own = mask if _mask_is_own(mask) else mask // local_ranks
    quota = cpu_quota()
    return max(1, own if quota is None else min(own, int(quota / local_ranks)))


def _mask_is_own(mask: int) -> bool:
    """Whether srun has bound this task to cores of its own: to fewer than the job step has on this machine, or to
    --cpus-per-task."""
    if not {"SLURM_STEP_ID", "SLURM_STEPID"} & os.environ.keys():
        return False
    on_node, per_task = (
        int(text) if (text := os.environ.get(name, "")).isdecimal() else None
        for name in ("SLURM_CPUS_ON_NODE", "SLURM_CPUS_PER_TASK")
    )
    return mask < on_node if on_node else per_task is not None and mask <= per_task


def cpu_quota() -> float | None:
    """Cores of CPU time that the control groups allow; None without a limit."""
    limits = []
    for folder, version in _groups("cpu"):
        if version == 2:
            quota, period = [*_words(folder, "cpu.max"), "max", ""][:2]
        else:
            quota, period = ([*_words(folder, f"cpu.cfs_{name}_us"), ""][0] for name in ("quota", "period"))
        if quota.isdecimal() and period.isdecimal() and int(period):
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def free_memory() -> int:
    """Bytes that processes here may still take: free pages of the machine, or what the control groups leave (cached
    files do not count)."""
    free = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for folder, version in _groups("memory"):
        limit, used = (
            ["memory.max", "memory.current"] if version == 2 else ["memory.limit_in_bytes", "memory.usage_in_bytes"]
        )
        limit, used = ([*_words(folder, name), ""][0] for name in (limit, used))
        if limit.isdecimal() and used.isdecimal():
            stat = _words(folder, "memory.stat")
            cached = dict(zip(stat[::2], stat[1::2])).get(
                "inactive_file" if version == 2 else "total_inactive_file", "0"
            )
            free.append(max(0, int(limit) - int(used) + int(cached)))
    return min(free)


def _groups(controller: str) -> Iterator[tuple[str, int]]:
    """(folder, version) of this process's control groups, each with those above it, whose limits hold too."""
    for line in _lines(CGROUPS):
        number, names, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not names:
            base, version = CGROUP_ROOT, 2
        elif controller in names.split(","):
            base, version = os.path.join(CGROUP_ROOT, controller), 1
        else:
            continue
        parts = [
            part for part in path.split("/") if part not in ("", "..")
        ]  # a container may see a path that is not mounted in it
        for depth in range(len(parts), -1, -1):
            yield os.path.join(base, *parts[:depth]), version


def _words(folder: str, name: str) -> list[str]:
    return " ".join(_lines(os.path.join(folder, name))).split()


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().splitlines()
    except OSError:
        return []
