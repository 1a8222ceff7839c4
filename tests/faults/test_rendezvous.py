"""Before the first step of a run on several processes: who started them, whether they all come, whether they see one
disk."""

import os
import shutil
import signal

import pytest
from launching import TERM, TINY, Fault, pics, start, torchrun_env, wait_for  # noqa: F401

from experiments import run
from experiments.cli import launcher
from experiments.config import parse
from experiments.running import rendezvous

BATCH = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NAME": "train",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NNODES": "1",
    "SLURM_NODELIST": "localhost",
}  # of a batch script's own process
LINE = f"{TINY} --epochs 1 --name told"
pytestmark = pytest.mark.fault


def tell_soon():
    rendezvous.NOTICE_SECONDS = 0.1


class Impatient(Fault):
    """No fault: a rank that looks for what another has written for a short time only."""

    def plant(self, folder):
        rendezvous.DISK_SECONDS = 0.5


@pytest.mark.parametrize("signum, code", [(TERM, 75), (signal.SIGINT, 130)])
def test_a_rank_that_waits_for_another_says_so_and_hears_a_signal(pics, launch, signum, code):  # noqa: F811
    def when_it_waits(children):
        wait_for(lambda: any("waits at" in log.read_text() for log in pics.glob("launch-*.log")))
        os.kill(children[0].pid, signum)

    ended = launch(
        f"{LINE} --devices 2", env=torchrun_env(0, 2, 1, 29871), before=tell_soon, watch=when_it_waits, timeout=60
    )
    assert ended.code == code and "rank 0 waits at 127.0.0.1:29871 until all 2 ranks are there" in ended.out, ended.out
    assert not (pics / "runs").exists()


def test_a_rank_that_leaves_before_the_run_begins_is_said_by_the_others(pics):  # noqa: F811
    ended = start(pics, f"{LINE} --devices 2", ranks=2, fault=Fault("decide", 0, (TERM,), ranks=(1,)))
    assert ended.codes == [1, 75] and "rank 0: another rank has left before the run began" in ended.out, ended.out
    assert "Traceback" not in ended.out and not (pics / "runs").exists(), ended.out


@pytest.mark.parametrize("places", [("one", "two"), ("one", "one")], ids=["apart", "together"])
def test_ranks_without_a_common_disk_are_told_before_the_first_step(pics, places):  # noqa: F811
    shutil.copytree(pics / "pics", pics / "one" / "pics")
    shutil.copytree(pics / "pics", pics / "two" / "pics")
    before = sorted(pics.rglob("*"))
    ended = start(
        pics,
        f"{LINE} --num_nodes 2 --runs_dir out/runs",
        ranks=2,
        env=lambda rank, port: torchrun_env(rank, 2, 2, port),
        places=[pics / place for place in places],
        fault=Impatient("disk", ranks=(0, 1)),
    )
    if places == ("one", "one"):
        assert ended.codes == [0, 0] and not list((pics / "one" / "out" / "runs").glob(".*")), ended.out
        return
    assert (
        ended.codes == [2, 2]
        and ended.out.count("--runs_dir out/runs must lie on a disk that all machines see: rank 1") == 1
    ), ended.out
    assert (
        "Traceback" not in ended.out and [each for each in sorted(pics.rglob("*")) if each.suffix != ".log"] == before
    )


def test_data_that_one_machine_lacks_end_all_before_the_first_step(pics):  # noqa: F811
    gone = Fault("decide", ranks=(1,), error="--data_dir /data/pics: there is no such folder", kind=FileNotFoundError)
    ended = start(
        pics, f"{LINE} --num_nodes 2", ranks=2, fault=gone, env=lambda rank, port: torchrun_env(rank, 2, 2, port)
    )
    assert (
        ended.codes == [2, 2]
        and "rank 1 (" in ended.outs[0]
        and "/data/pics" in ended.outs[0]
        and not (pics / "runs").exists()
    ), ended.out


@pytest.mark.parametrize(
    "tasks, line, words",
    [
        (
            {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4"},
            "",
            "4 SLURM tasks, --devices 1, and this process was not started by srun",
        ),
        ({"SLURM_NTASKS": "4"}, "--devices 4", "srun python experiments/run.py"),
        (
            {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"},
            "",
            "srun started 2 tasks on 1 machine, and --devices 1 means 1",
        ),
        (
            {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2"},
            "--devices 2",
            "--devices 1 --num_nodes 2",
        ),
        ({"SLURM_NTASKS": "1"}, "--num_nodes 2", "--num_nodes 2: torchrun or srun"),
    ],
)
def test_tasks_of_slurm_that_are_not_the_ranks_are_one_line(pics, monkeypatch, capsys, tasks, line, words):  # noqa: F811
    monkeypatch.chdir(pics)
    for key, value in (BATCH | tasks).items():
        monkeypatch.setenv(key, value)
    assert run.main(f"{LINE} {line}".split()) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (pics / "runs").exists(), error


@pytest.mark.parametrize(
    "tasks, line, ranks",
    [
        ({"SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}, "--devices 2", 1),
        ({"SLURM_NTASKS": "1"}, "--devices 2", 1),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash"}, "--devices 2", 1),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "interactive"}, "", 1),
        (
            {
                "SLURM_NTASKS": "4",
                "SLURM_STEP_ID": "4294967290",
                "SLURM_STEP_NUM_TASKS": "1",
                "SLURM_JOB_NAME": "interactive",
            },
            "--devices 4",
            1,
        ),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "1", "SLURM_JOB_NAME": "interactive"}, "--devices 4", 4),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, "--devices 4", 4),
    ],
)
def test_who_starts_the_ranks_under_slurm(monkeypatch, tasks, line, ranks):
    for key, value in (BATCH | tasks).items():
        monkeypatch.setenv(key, value)
    cfg = parse(f"{TINY} {line}".split())
    assert launcher.problem(cfg.devices, cfg.num_nodes, planned=False) is None and launcher.tasks() == ranks


@pytest.mark.slow
def test_one_task_of_slurm_starts_its_ranks_itself(pics):  # noqa: F811
    import subprocess
    import sys

    for tasks in ({"SLURM_NTASKS_PER_NODE": "1"}, {}, {"SLURM_JOB_NAME": "bash"}):
        command = [sys.executable, run.__file__, *f"{LINE} --devices 2 --overwrite".split()]
        ended = subprocess.run(
            command, cwd=pics, capture_output=True, text=True, env={**os.environ, **BATCH, "SLURM_NTASKS": "1", **tasks}
        )
        assert ended.returncode == 0 and "MEMBER: 2/2" in ended.stderr, ended.stdout + ended.stderr
