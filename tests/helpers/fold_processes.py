"""`run.py --folds` in tests: its processes are forked from one that has imported torch, which saves their seconds of
start-up."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

from experiments.folds import processes
from experiments.processes import pool
from lightning_modules.callbacks.signals import ORDER


class Forked:
    """The part of subprocess.Popen that its users need."""

    def __init__(self, pid: int):
        self.pid, self.code = pid, None

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)


def start(argv: list[str], env: dict[str, str], log: Path | None) -> Forked:
    sys.stdout.flush()
    if pid := os.fork():
        return Forked(pid)
    code = 1
    try:
        os.setsid()
        pool.die_with_parent()
        for each in ORDER:
            signal.signal(each, signal.SIG_DFL)
        if log is not None:
            for stream in (1, 2):
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        os.environ.update(env)
        for variable in pool.OF_ONE_RUN:
            os.environ.pop(variable, None)
        sys.argv = ["run.py", *argv]
        from experiments.run import main

        code = main(argv)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def quick() -> None:
    """For `launch(..., before=quick)`; the speed is not measured."""
    from experiments.running import forecast

    forecast.images_per_second = lambda *_: 100.0
    processes.PROCESSES, pool.start = multiprocessing.get_context("fork"), start
