"""Signal handling of a run: SIGTERM, SIGHUP and SIGUSR1 (stop, to resume later) and Ctrl-C. Standard library
only, so that a run listens before torch is imported; `preemption` makes all ranks act on it together."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

PREEMPTED, INTERRUPTED = (
    75,
    130,
)  # 75: EX_TEMPFAIL of sysexits.h, the same command goes on; 130: 128 + SIGINT, as shells say
ORDER = (
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGTERM,
    signal.SIGUSR1,
)  # of several the last counts: only SIGUSR1 asks for a requeue
LAUNCHER = "VITLAB_LAUNCHER"  # process id of the run.py that started this one
PR_SET_PDEATHSIG = 1  # prctl(2)
PATIENCE_SECONDS = 1.0  # a second Ctrl-C after this leaves at once
STAND_IN_SECONDS = 0.5  # in which the main thread acts on a signal, unless it is in C++


class Notice:
    """The signal that this process received: `asked` is 0, or 1 + the signal's place in ORDER. Until `together` is set,
    the process exits at once."""

    asked, since, together, owner, leaving = 0, 0.0, False, 0, False


notice = Notice()


def exit_code(signum: int) -> int:
    return INTERRUPTED if signum == signal.SIGINT else PREEMPTED


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Hear the signals while a command runs. What run.py or torchrun has started dies with the process that started it.

    A signal that was ignored before (nohup, a shell's background job) stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    started_by_run = "LOCAL_RANK" in os.environ and os.environ.get(LAUNCHER, str(os.getpid())) != str(os.getpid())
    if started_by_run or "TORCHELASTIC_RUN_ID" in os.environ:
        with contextlib.suppress(OSError, AttributeError):  # Linux only
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if started_by_run and os.environ[LAUNCHER] != str(os.getppid()):
        os._exit(PREEMPTED)  # the launcher died before prctl
    os.environ[LAUNCHER] = os.environ[LAUNCHER] if started_by_run else str(os.getpid())
    notice.asked, notice.owner, notice.leaving = 0, os.getpid(), False
    notice.together = started_by_run  # while the ranks start, their launcher decides
    before = {each: signal.signal(each, _hear) for each in ORDER if signal.getsignal(each) is not signal.SIG_IGN}
    try:
        with _stood_in_for():
            yield
    finally:
        if notice.asked <= 1:  # else this process is about to end, and the sender may repeat itself
            for each, handler in before.items():
                signal.signal(each, handler)


def _hear(signum: int, frame: FrameType | None) -> None:
    if os.getpid() != notice.owner:
        return  # a process forked from the run
    impatient = signum == signal.SIGINT and notice.asked and time.monotonic() - notice.since > PATIENCE_SECONDS
    if impatient or not notice.together:
        _leave(signum)
    if not notice.asked:
        notice.since = time.monotonic()
        if signum == signal.SIGINT and os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":
            os.write(2, b"\nCtrl-C: saving at the next step; once more leaves at once\n")
    notice.asked = max(notice.asked, 1 + ORDER.index(signum))


@contextlib.contextmanager
def _stood_in_for() -> Iterator[None]:
    """Let a thread act where the main thread cannot: Python runs no handler while it waits in C++, for a rank that does
    not come."""
    (reader, writer), ended = os.pipe(), threading.Event()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_stand_in, args=(reader, ended), name="signals", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        os.close(writer)  # the thread reads the end of the pipe, and ends


def _stand_in(reader: int, ended: threading.Event) -> None:
    first = 0.0
    while read := os.read(reader, 1):
        signum, now = read[0], time.monotonic()
        if signum not in ORDER or ended.wait(
            STAND_IN_SECONDS
        ):  # a main thread that hears it has left by then, or notes it
            continue
        again = signum == signal.SIGINT and first and now - first > PATIENCE_SECONDS + STAND_IN_SECONDS
        first = first or now * (signum == signal.SIGINT)
        if not notice.leaving and (again or not notice.together):
            _leave(signum)
    os.close(reader)


def _in_fork() -> None:
    """The signals of a process forked from the run, a loader's worker, are not the run's."""
    if notice.owner:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_in_fork)


def _leave(signum: int) -> None:
    """Exit at once: nothing since the last checkpoint is worth saving, or the user pressed Ctrl-C twice."""
    notice.leaving = True
    if signum == signal.SIGUSR1 and os.environ.get("SLURM_PROCID", "0") == "0":
        requeue()
    with contextlib.suppress(Exception):  # it may be in the middle of a write
        sys.stdout.flush()
    os._exit(exit_code(signum))


def requeue() -> None:
    """Put this SLURM job (of an array: this task) back into the queue; outside SLURM nothing. For one rank only."""
    job = os.environ.get("SLURM_JOB_ID")
    if "SLURM_ARRAY_JOB_ID" in os.environ:  # the job id of the last task is the whole array's
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if not job:
        return
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"scontrol requeue {job} failed: {error}", file=sys.stderr, flush=True)
