"""Rows 5, 6, 9, 10 and 20 with the launchers people use: run.py by itself, torchrun on one and two loopback nodes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import conftest
import pytest
from launching import (  # noqa: F401
    HUP,
    INT,
    TERM,
    TINY,
    USR1,
    alive,
    assert_none_left,
    assert_same_weights,
    pics,
    rows_of,
    start,
    steps_of,
    wait_for,
)
from wandb_stub import WandbStub

from experiments import run

LAUNCH = Path(run.__file__).parent / "launch"
LINE = f"{TINY} --epochs 40 --save_every_steps 3"
pytestmark = pytest.mark.fault


def open_command(folder, command, log, **env):
    return subprocess.Popen(
        list(map(str, command)),
        cwd=folder,
        start_new_session=True,
        stdout=open(folder / log, "w"),
        stderr=subprocess.STDOUT,
        preexec_fn=conftest.hear_signals,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | env,
    )


def by_itself(folder, line, log="log"):
    return open_command(folder, [sys.executable, run.__file__, *line.split()], log)


def by_torchrun(folder, line, log="log", devices=2, **env):
    return open_command(
        folder,
        [LAUNCH / "torchrun.sh", devices, *line.split()],
        log,
        **{"VITLAB_RESTARTS": "3", "VITLAB_GRACE": "60", **env},
    )


def ranks_of(folder):
    """Process ids of the ranks that are at work, by LOCAL_RANK (or GROUP_RANK for nodes of one rank)."""
    found = {}
    for pid in sorted(alive(folder)):  # a rank before the loader workers it has forked
        try:
            words = dict(
                word.split("=", 1) for word in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in word
            )
            if b"run.py" in Path(f"/proc/{pid}/cmdline").read_bytes() and "LOCAL_RANK" in words:
                found.setdefault((int(words.get("GROUP_RANK", 0)), int(words["LOCAL_RANK"])), pid)
        except OSError:
            continue
    return found


def in_training(folder, epochs=2):
    wait_for(lambda: len(rows_of(folder / "runs" / "told")) >= epochs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "signum, to",
    [(TERM, "parent"), (TERM, "child"), (TERM, "group"), (USR1, "parent"), (HUP, "group"), (INT, "group")],
    ids=lambda value: signal.Signals(value).name if isinstance(value, int) else value,
)
def test_row5_run_py_by_itself_leaves_with_75_and_no_orphan(pics, signum, to):  # noqa: F811
    line = f"{LINE} --devices 2 --name told --workers 1"
    process = by_itself(pics, line)
    in_training(pics)
    child = ranks_of(pics)[0, 1]
    told = time.monotonic()
    {
        "parent": lambda: process.send_signal(signum),
        "child": lambda: os.kill(child, signum),
        "group": lambda: os.killpg(process.pid, signum),
    }[to]()
    code, took = process.wait(60), time.monotonic() - told
    assert code == (130 if signum == INT else 75) and took < 5, (code, took, (pics / "log").read_text())
    assert_none_left(pics)
    assert f"saved step {steps_of(pics / 'runs' / 'told')}" in (pics / "log").read_text()
    if to == "child":
        again = by_itself(pics, line)
        assert again.wait(120) == 0, (pics / "log").read_text()
        assert start(pics, line.replace("told", "whole"), ranks=2).codes == [0, 0]
        assert_same_weights(pics / "runs" / "whole", pics / "runs" / "told")


@pytest.mark.slow
def test_row5_a_tracker_out_of_reach_delays_the_exit_by_seconds(pics):  # noqa: F811
    """Lightning's launcher would kill rank 0 five seconds after its child has left."""
    with WandbStub() as server:
        line = f"{LINE.replace('--logger csv', '--logger wandb')} --epochs 4000 --devices 2 --name told"
        process = open_command(pics, [sys.executable, run.__file__, *line.split()], "log", **server.env)
        in_training(pics)
        server.fail_with = 500
        process.send_signal(TERM)
        told = time.monotonic()
        assert process.wait(60) == 75 and 10 < time.monotonic() - told < 30, (pics / "log").read_text()
        assert_none_left(pics)


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.3, 1, 2, 3, 4.5, 6, 8, 10])
def test_row6_run_py_by_itself_told_during_start_up_leaves_no_orphan(pics, after):  # noqa: F811
    process = by_itself(pics, f"{LINE} --epochs 4000 --devices 2 --name told")
    time.sleep(after)
    process.send_signal(TERM)
    told = time.monotonic()
    code = process.wait(60)
    assert code == (75 if after > 0.5 else code) and code != 0, (
        code,
        (pics / "log").read_text(),
    )  # earlier Python itself is starting
    assert time.monotonic() - told < 20 and "Traceback" not in (pics / "log").read_text(), (pics / "log").read_text()
    assert_none_left(pics)


@pytest.mark.slow
def test_row6_a_child_told_while_the_ranks_start_makes_both_leave(pics):  # noqa: F811
    process = by_itself(pics, f"{LINE} --epochs 4000 --devices 2 --name told")
    wait_for(lambda: (0, 1) in ranks_of(pics))
    time.sleep(2)  # Python has started; torch is being imported
    os.kill(ranks_of(pics)[0, 1], TERM)
    assert process.wait(60) == 75 and "Traceback" not in (pics / "log").read_text(), (pics / "log").read_text()
    assert_none_left(pics)


@pytest.mark.slow
def test_row6_a_killed_launcher_takes_its_ranks_along(pics):  # noqa: F811
    process = by_itself(pics, f"{LINE} --epochs 4000 --devices 2 --name told --workers 1")
    in_training(pics)
    process.kill()
    process.wait()
    assert_none_left(pics)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, TERM], ids=["killed", "preempted"])
@pytest.mark.parametrize("nodes", [1, 2])
def test_row9_torchrun_restarts_and_the_run_goes_on(pics, nodes, signum):  # noqa: F811
    line = f"{LINE} --name told"
    where = {"VITLAB_NODES": str(nodes), "VITLAB_HEAD": "localhost", "VITLAB_PORT": str(conftest.free_port())}
    processes = [by_torchrun(pics, line, f"log{node}", devices=2 // nodes, **where) for node in range(nodes)]
    in_training(pics)
    rank = ranks_of(pics)[(0, 1) if nodes == 1 else (1, 0)]
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in Path(f"/proc/{rank}/environ").read_text().split(
        "\0"
    )  # against a race, seen at times
    os.kill(rank, signum)
    logs = [pics / f"log{node}" for node in range(nodes)]
    for process in processes:
        assert process.wait(150) == 0, "\n".join(log.read_text() for log in logs)
    assert any("resumed from" in log.read_text() for log in logs)
    assert start(pics, line.replace("told", "whole") + " --devices 2", ranks=2).codes == [0, 0]
    assert_same_weights(pics / "runs" / "whole", pics / "runs" / "told")
    assert_none_left(pics)


@pytest.mark.slow
def test_row9_a_signal_to_torchrun_itself_saves_and_leaves_nothing(pics):  # noqa: F811
    process = by_torchrun(pics, f"{LINE} --epochs 4000 --name told --workers 1")
    in_training(pics)
    process.send_signal(TERM)
    assert process.wait(60) == 75 and f"saved step {steps_of(pics / 'runs' / 'told')}" in (pics / "log").read_text(), (
        pics / "log"
    ).read_text()
    assert_none_left(pics)


def test_row10_two_nodes_are_one_node_are_one_process(pics):  # noqa: F811
    line = f"{TINY} --model_args.drop_path 0 --epochs 2"
    assert start(pics, f"{line} --name one").codes == [0]
    assert start(pics, f"{line} --devices 2 --name two", ranks=2).codes == [0, 0]
    nodes = start(pics, f"{line} --num_nodes 2 --name nodes", ranks=2, nodes=2)
    assert nodes.codes == [0, 0], nodes.out
    one, two, nodes = (pics / "runs" / name for name in ("one", "two", "nodes"))
    assert_same_weights(two, nodes)
    for ours, theirs, alone in zip(rows_of(nodes), rows_of(two), rows_of(one)):
        assert all(ours[key] == theirs[key] for key in ours if not key.startswith("perf"))
        assert ours["train/loss"] == pytest.approx(alone["train/loss"], abs=1e-6)
    scored = {}
    for name, where, ranks, machines in (
        ("one", "", 1, 1),
        ("two", "--devices 2", 2, 1),
        ("nodes", "--num_nodes 2", 2, 2),
    ):
        line = f"--config runs/one/config.yaml --eval_only --init runs/one {where} --name scored-{name}"
        ended = start(pics, line, ranks=ranks, nodes=machines)
        assert ended.codes == [0] * ranks, ended.out
        scored[name] = conftest.result_of(pics / "runs" / f"scored-{name}")
    assert scored["one"]["test/acc1"] == scored["two"]["test/acc1"] == scored["nodes"]["test/acc1"]
    assert (
        scored["two"]["test/loss"]
        == scored["nodes"]["test/loss"]
        == pytest.approx(scored["one"]["test/loss"], rel=1e-6)
    )


def test_row10_several_machines_need_a_launcher(pics):  # noqa: F811
    ended = start(pics, f"{TINY} --num_nodes 2 --name two")
    assert ended.codes == [2] and "torchrun" in ended.out and not (pics / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, words", [("sbatch.sh", "digits-vit_nano4-s0"), ("sbatch_array.sh", "digits-vit_nano4-s3")]
)
def test_row8_the_batch_scripts_start_the_command_they_say(pics, script, words):  # noqa: F811
    srun = pics / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(
        f'#!/bin/sh\necho "$@" > {pics}/srun-line\nwhile [ "${{1#--}}" != "$1" ]; do shift; done\nexec "$@"\n'
    )
    srun.chmod(0o755)
    slurm = {
        "SUBMIT_DIR": LAUNCH.parents[1],
        "JOB_ID": 4711,
        "JOB_NAME": "train",
        "NNODES": 1,
        "NTASKS": 1,
        "NTASKS_PER_NODE": 1,
        "PROCID": 0,
        "CPUS_PER_TASK": 7,
        "LOCALID": 0,
        "NODEID": 0,
        "ARRAY_TASK_ID": 3,
    }
    command = [LAUNCH / script, "--model", "vit_nano4", "--data", "digits", "--dry_run", "--runs_dir", pics / "runs"]
    process = open_command(
        pics,
        command,
        "log",
        **{f"SLURM_{key}": str(value) for key, value in slurm.items()},
        PATH=f"{srun.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
    )
    assert process.wait(200) == 0 and words in (pics / "log").read_text(), (pics / "log").read_text()
    assert "--cpus-per-task=7 python experiments/run.py" in (pics / "srun-line").read_text()


@pytest.mark.slow
def test_row20_one_rank_dies_and_run_py_by_itself_leaves(pics):  # noqa: F811
    process = by_itself(pics, f"{LINE} --epochs 4000 --devices 2 --name told")
    in_training(pics)
    os.kill(ranks_of(pics)[0, 1], signal.SIGKILL)
    died = time.monotonic()
    assert process.wait(30) not in (0, 75) and time.monotonic() - died < 10
    assert_none_left(pics)


@pytest.mark.slow
def test_row9_two_torchruns_on_one_machine_and_what_is_refused_is_told_once(pics):  # noqa: F811
    first = by_torchrun(pics, f"{LINE} --epochs 4000 --name told")
    assert by_torchrun(pics, f"{LINE} --epochs 1 --name second", "second").wait(150) == 0, (pics / "second").read_text()
    refused = by_torchrun(pics, f"{LINE} --name third --model_args.dept 3", "refused")
    assert refused.wait(150) == 2
    said = (pics / "refused").read_text()
    assert (
        said.count("no argument 'dept'; did you mean depth?") == 1 and "Traceback" not in said and said.count("\n") == 1
    ), said
    in_training(pics)
    first.send_signal(TERM)
    assert first.wait(60) == 75, (pics / "log").read_text()
    assert_none_left(pics)
