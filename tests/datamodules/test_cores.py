"""Cores and memory of a container or a SLURM task, as a run takes them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_pictures

from datamodules.loading import cores
from datamodules.loading.workers import worker_count
from experiments import run

TINY = (
    "--model vit_nano4 --model_args.embed_dim 32 --model_args.depth 1 --image_size 16 --recipe none --epochs 1 "
    "--global_batch_size 8 "
    "--logger csv --accelerator cpu --data_dir pics --dry_run"
)
ROOT = Path(__file__).parents[2]
GB = 2**30
GROUPS = {
    "v2": (
        "0::/pod/job\n",
        {
            "pod/cpu.max": "300000 100000",
            "pod/job/cpu.max": "max 100000",
            "pod/memory.max": f"{8 * GB}",
            "pod/memory.current": f"{3 * GB}",
            "pod/memory.stat": f"anon {GB}\ninactive_file {GB}\n",
            "memory.max": "max",
        },
    ),
    "v1": (
        "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n",
        {
            "cpu/cpu.cfs_quota_us": "350000",
            "cpu/cpu.cfs_period_us": "100000",
            "memory/memory.limit_in_bytes": f"{8 * GB}",
            "memory/memory.usage_in_bytes": f"{3 * GB}",
            "memory/memory.stat": f"cache {GB}\ntotal_inactive_file {GB}\n",
        },
    ),
}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine("v2"): 16 cores and 64 GB free, of which the control groups leave 3 cores and 6 GB."""

    def make(groups: str | None) -> None:
        lines, files = GROUPS.get(groups, ("0::/\n", {}))
        (tmp_path / "cgroup").write_text(lines)
        for name, text in files.items():
            (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "fs" / name).write_text(text)
        monkeypatch.setattr(cores, "CGROUPS", str(tmp_path / "cgroup"))
        monkeypatch.setattr(cores, "CGROUP_ROOT", str(tmp_path / "fs"))
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
        monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 16 * 2**20, "SC_PAGE_SIZE": 4096}.__getitem__)

    return make


@pytest.mark.parametrize("groups, count, free", [("v1", 3, 6), ("v2", 3, 6), (None, 16, 64)])
def test_a_container_is_asked_for_no_more_than_its_quota(machine, groups, count, free, tmp_path, monkeypatch, capsys):
    import torch

    write_pictures(tmp_path / "pics" / "train", {"dark": 20, "light": 20})
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    machine(groups)
    assert cores.free_memory() == free * GB
    assert run.main(TINY.split()) == 0
    said = capsys.readouterr().out
    workers = min(12, count)
    assert (
        f"loading with {workers} workers on {count} cores\n" in said
        and f"; {free}.00 GB free" in said
        and threads == [count]
    ), said


def test_ranks_share_a_mask_unless_srun_gave_each_its_own(machine, monkeypatch):
    machine(None)
    assert [worker_count(None, False, ranks) for ranks in (1, 2, 8, 32)] == [12, 8, 2, 1]
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "128")
    assert worker_count(None, False, 8) == 12  # 16 of 128: bound
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "16")
    assert worker_count(None, False, 8) == 2
    monkeypatch.delenv("SLURM_CPUS_ON_NODE")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "16")
    assert worker_count(None, False, 8) == 12
    machine("v2")
    assert [worker_count(None, False, ranks) for ranks in (1, 2)] == [3, 1]  # a quota is of all
    assert worker_count(None, True, 1) == 0 and worker_count(5, False, 8) == 5


@pytest.mark.parametrize(
    "given, shown",
    [
        ({}, "GOMP_SPINCOUNT = '10000'"),
        pytest.param({"GOMP_SPINCOUNT": "7"}, "GOMP_SPINCOUNT = '7'", marks=pytest.mark.slow),
        pytest.param({"OMP_WAIT_POLICY": "passive"}, "OMP_WAIT_POLICY = 'PASSIVE'", marks=pytest.mark.slow),
    ],
)
def test_threads_that_wait_leave_their_cores_to_other_load_soon(given, shown):
    """As libgomp itself tells, which reads its variables when torch is imported."""
    code = "import experiments.run, torch; assert 'libgomp' in open('/proc/self/maps').read(), 'another OpenMP'"
    env = (
        {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
        | {"OMP_DISPLAY_ENV": "verbose"}
        | given
    )
    ended = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    if "another OpenMP" in ended.stderr:
        pytest.skip("this torch has another OpenMP than GNU's")
    assert ended.returncode == 0 and shown in ended.stderr, ended.stderr
    assert ("GOMP_SPINCOUNT = '10000'" in ended.stderr) == (not given)
