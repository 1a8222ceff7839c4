"""Rows 5 to 8, 20 and 32 of the table of faults: signals and errors on one rank, by processes that fork from one
import."""

import os
import signal
import stat

import pytest
from launching import HUP, INT, TERM, TINY, USR1, Fault, assert_none_left, assert_same_weights, rows_of, start, steps_of  # noqa: F401
from wandb_stub import WandbStub

LINE = f"{TINY} --epochs 3"
TWO = f"{LINE} --devices 2"
pytestmark = pytest.mark.fault


def undisturbed(folder, line, ranks):
    assert start(folder, f"{line} --name whole", ranks=ranks).codes == [0] * ranks
    return folder / "runs" / "whole"


@pytest.mark.parametrize(
    "fault",
    [
        Fault("step", 2, (TERM,), ranks=(1,)),  # the first of the two passes of a step
        Fault("step", 5, (TERM,), ranks=(0, 1), late=0.2),
        pytest.param(Fault("step", 4, (USR1,), ranks=(0,)), marks=pytest.mark.slow),
        pytest.param(Fault("step", 3, (HUP,), ranks=(1,)), marks=pytest.mark.slow),
        pytest.param(Fault("setup", 0, (TERM,), ranks=(1,)), marks=pytest.mark.slow),
    ],
    ids=lambda fault: f"{signal.Signals(fault.signals[0]).name}-{fault.phase}-ranks{'+'.join(map(str, fault.ranks))}",
)
def test_row5_a_signal_to_one_rank_or_skewed_saves_one_step_on_all(pics, fault):  # noqa: F811
    line = f"{TWO} --micro_batch_size 2"
    ended = start(pics, f"{line} --name told", ranks=2, fault=fault)
    assert ended.codes == [75, 75] and ended.seconds < 2 + fault.late, (ended.seconds, ended.out)
    if fault.phase == "setup":
        assert "nothing to save" in ended.out
    else:
        assert steps_of(pics / "runs" / "told") == fault.after // 2 + 1 and "saved step" in ended.out
    again = start(pics, f"{line} --name told", ranks=2)
    assert again.codes == [0, 0], again.out
    assert_same_weights(undisturbed(pics, line, 2), pics / "runs" / "told")


def test_row5_a_signal_to_the_whole_process_group_spares_the_loader_workers(pics):  # noqa: F811
    line = LINE.replace("--workers 0", "--workers 1")
    ended = start(pics, f"{line} --name told", fault=Fault("step", 5, (TERM,), group=True, apart=0.5))
    assert ended.codes == [75] and ended.seconds < 3 and steps_of(pics / "runs" / "told") == 3, (
        ended.seconds,
        ended.out,
    )
    assert_none_left(pics)
    assert start(pics, f"{line} --name told").codes == [0]
    assert_same_weights(undisturbed(pics, line, 1), pics / "runs" / "told")


@pytest.mark.parametrize("phase, after", [("decide", 0), ("setup", 0)])
def test_row6_a_signal_during_start_up_leaves_no_process(pics, phase, after):  # noqa: F811
    ended = start(pics, f"{LINE} --name told", fault=Fault(phase, after, (TERM,)))
    assert ended.codes == [75] and ended.seconds < 2, (ended.seconds, ended.out)
    assert not (pics / "runs" / "told" / "checkpoints" / "last.ckpt").exists()
    assert_none_left(pics)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    "after", [0, pytest.param(3, marks=pytest.mark.slow)]
)  # the first batch of validation, the last of four
def test_row7_a_signal_during_validation_saves_and_validates_again(pics, ranks, after):  # noqa: F811
    line = (
        f"{LINE} --devices {ranks} --val_fraction 0.4 --global_batch_size {8 if ranks == 1 else 4} --save_every_steps 3"
    )
    fault = Fault("validation", after, (TERM,), ranks=(ranks - 1,))
    ended = start(pics, f"{line} --name told", ranks=ranks, fault=fault)
    assert ended.codes == [75] * ranks and ended.seconds < 2, (ended.seconds, ended.out)
    assert not (rows_of(pics / "runs" / "told")), "the epoch's row comes after its validation"
    again = start(pics, f"{line} --name told", ranks=ranks)
    assert again.codes == [0] * ranks, again.out
    whole = undisturbed(pics, line, ranks)
    assert_same_weights(whole, pics / "runs" / "told")
    told = rows_of(pics / "runs" / "told")
    assert [row["epoch"] for row in told] == [0, 1, 2]
    for ours, theirs in zip(told, rows_of(whole)):
        assert ours.keys() == theirs.keys() and all(ours[key] == theirs[key] for key in ours if key.startswith("val/"))
        assert (ours["train/loss"], ours["lr"]) == pytest.approx((theirs["train/loss"], theirs["lr"]), rel=1e-5)


def test_row7_a_signal_while_saving_lets_the_file_become_whole(pics):  # noqa: F811
    ended = start(pics, f"{TWO} --name told --save_every_steps 3", ranks=2, fault=Fault("save", 1, (TERM,), ranks=(0,)))
    assert ended.codes == [75, 75] and ended.seconds < 2, (ended.seconds, ended.out)
    assert not list((pics / "runs" / "told" / "checkpoints").glob(".*partial"))
    assert start(pics, f"{TWO} --name told --save_every_steps 3", ranks=2).codes == [0, 0]
    assert_same_weights(undisturbed(pics, TWO, 2), pics / "runs" / "told")


def test_row7_a_signal_during_the_test_leaves_and_the_same_command_finishes(pics):  # noqa: F811
    ended = start(pics, f"{LINE} --name told", fault=Fault("test", 0, (TERM,)))
    assert ended.codes == [75] and not (pics / "runs" / "told" / "result.json").exists(), ended.out
    assert start(pics, f"{LINE} --name told").codes == [0] and (pics / "runs" / "told" / "result.json").exists()


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_row8_sigusr1_under_slurm_saves_at_a_step_and_requeues_once(pics, ranks):  # noqa: F811
    fake = pics / "bin" / "scontrol"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" >> {pics}/asked\ntest -f {pics}/runs/told/checkpoints/last.ckpt\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)

    def slurm(rank, port):
        return {
            "PATH": f"{fake.parent}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NAME": "train",
            "SLURM_NTASKS": str(ranks),
            "SLURM_NTASKS_PER_NODE": str(ranks),
            "SLURM_NNODES": "1",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_NODEID": "0",
            "SLURM_STEP_ID": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }

    line = f"{LINE} --devices {ranks}"
    fault = Fault("step", 5, (USR1,), ranks=tuple(range(ranks)))
    ended = start(pics, f"{line} --name told", ranks=ranks, env=slurm, fault=fault)
    assert ended.codes == [75] * ranks and "failed" not in ended.out, ended.out
    assert (pics / "asked").read_text() == "requeue 4711\n" and steps_of(pics / "runs" / "told") == (
        6 if ranks == 2 else 3
    )
    assert start(pics, f"{line} --name told", ranks=ranks, env=slurm).codes == [0] * ranks
    assert_same_weights(undisturbed(pics, line, ranks), pics / "runs" / "told")


@pytest.mark.parametrize(
    "fault",
    [
        Fault("step", 3, ranks=(1,), error="the first error"),
        pytest.param(Fault("validation", ranks=(0,), error="the first error"), marks=pytest.mark.slow),
    ],
    ids=["training", "validation"],
)
def test_row20_one_rank_raises_and_all_leave_with_its_traceback(pics, fault):  # noqa: F811
    ended = start(pics, f"{TWO} --name failed", ranks=2, fault=fault)
    assert ended.codes == [1, 1] and ended.seconds < 10, (ended.seconds, ended.out)
    assert ended.out.count("Traceback") == 1 and "the first error" in ended.outs[fault.ranks[0]]
    assert "another rank has left" in ended.outs[1 - fault.ranks[0]]


def test_row20_one_rank_dies_and_the_other_leaves(pics):  # noqa: F811
    ended = start(pics, f"{TWO} --name failed", ranks=2, fault=Fault("step", 3, (signal.SIGKILL,), ranks=(1,)))
    assert ended.codes == [1, -9] and ended.seconds < 10 and "another rank has left" in ended.outs[0], (
        ended.seconds,
        ended.out,
    )


@pytest.mark.parametrize(
    "ranks, fault",
    [
        (1, Fault("step", 5, (INT, INT), apart=0.1)),
        (1, Fault("step", 5, (HUP,))),
        pytest.param(2, Fault("step", 2, (INT, INT), ranks=(0, 1), apart=0.1), marks=pytest.mark.slow),
    ],
    ids=["twice", "hangup", "twice-2-ranks"],
)
def test_row32_ctrl_c_twice_or_a_dropped_line_leaves_one_checkpoint(pics, ranks, fault):  # noqa: F811
    line = f"{LINE} --devices {ranks}"
    ended = start(pics, f"{line} --name told", ranks=ranks, fault=fault)
    assert ended.codes == [130 if INT in fault.signals else 75] * ranks and ended.seconds < 3, (
        ended.seconds,
        ended.out,
    )
    assert "Traceback" not in ended.out and steps_of(pics / "runs" / "told") == 3
    assert_none_left(pics)
    assert start(pics, f"{line} --name told", ranks=ranks).codes == [0] * ranks
    assert_same_weights(undisturbed(pics, line, ranks), pics / "runs" / "told")


def test_row32_a_later_ctrl_c_does_not_wait_for_the_step(pics):  # noqa: F811
    ended = start(pics, f"{LINE} --name told", fault=Fault("step", 2, (INT, INT), apart=1.2))
    assert ended.codes == [130] and not (pics / "runs" / "told" / "checkpoints" / "last.ckpt").exists(), ended.out


def test_row5_the_tracker_hears_that_the_run_is_preempted(pics):  # noqa: F811
    with WandbStub() as server:
        fault = Fault("step", 5, (TERM,))
        line = f"{LINE.replace('--logger csv', '--logger wandb')} --name tracked"
        ended = start(pics, line, fault=fault, env=lambda rank, port: server.env)
        assert ended.codes == [75] and ended.seconds < 15, (ended.seconds, ended.out)
        ((_, run),) = server.runs.items()
        assert run["exitcode"] == 75 and run["preempting"]
        assert start(pics, line, env=lambda rank, port: server.env).codes == [0]
        assert len(server.runs) == 1 and run["exitcode"] == 0
