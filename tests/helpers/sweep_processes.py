"""Stand-ins for the run.py processes of a sweep: a script that only writes what a run writes, and run.py itself in
forked processes."""

import csv
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path


def settings_of(argv: list[str]) -> dict[str, str]:
    return {flag[2:]: value for flag, value in zip(argv, argv[1:]) if flag.startswith("--")}


def score(settings: dict[str, str], epoch: int) -> float:
    """Better with the epochs, best at lr 1e-3."""
    return round(epoch / 10 - abs(math.log10(float(settings["lr"])) + 3) / 5, 6)


def pretend(argv: list[str]) -> None:
    """A run of 0.15 s an epoch that goes on after the rows it finds, and leaves with 75 at a SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    settings = settings_of(argv)
    folder, epochs = Path(settings["runs_dir"]) / settings["name"], int(settings["epochs"])
    folder.mkdir(exist_ok=True)
    done = len((folder / "metrics.csv").read_text().splitlines()) - 1 if (folder / "metrics.csv").is_file() else 0
    print(f"from epoch {done}", flush=True)
    with open(folder / "metrics.csv", "a", newline="") as file:
        writer = csv.writer(file)
        for epoch in range(done, epochs):
            time.sleep(0.15)
            if not file.tell():
                writer.writerow(["epoch", "step", "train/loss", "val/acc1"])
            writer.writerow([epoch, 5 * epoch + 5, 0.5, score(settings, epoch)])
            file.flush()
    (folder / "result.json").write_text(
        json.dumps({"metric": "val/acc1", "best": score(settings, epochs - 1), "finished": True})
    )


def unsafe(connection, _) -> None:
    """Of a test's study.db nothing need survive a power cut, and fsync takes most of the time."""
    connection.execute("PRAGMA synchronous=OFF")


def sweep(argv: list[str]) -> int:
    """sweep.py over such runs."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    from experiments import sweep
    from experiments.processes import pool

    event.listen(Engine, "connect", unsafe)
    pool.start = lambda argv, env, log: subprocess.Popen(
        [sys.executable, __file__, "pretend", *argv],
        stdout=open(log, "a"),  # noqa: SIM115
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=pool.die_with_parent,
    )
    return sweep.main(argv)


def instead_of_run() -> None:
    """For `launch(..., before=instead_of_run)`: the line is sweep.py's, and its trials are run.py in forked
    processes."""
    import fold_processes

    from experiments import run, sweep
    from experiments.processes import pool

    own = run.main

    def start(argv, env, log):
        run.main = own
        try:
            return fold_processes.start(argv, env, log)
        finally:
            run.main = sweep.main

    run.main, pool.start = sweep.main, start


if __name__ == "__main__":
    sys.exit({"pretend": pretend, "sweep": sweep}[sys.argv[1]](sys.argv[2:]))
