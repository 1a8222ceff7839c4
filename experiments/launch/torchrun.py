"""torchrun around run.py, for torchrun.sh: what cannot start is told at once, and the exit code is that of the run.

torchrun by itself starts whatever fails anew, a wrong command line too, and leaves with 1 whatever its ranks have left
with.
"""

import logging
import os
import sys
from pathlib import Path

if __name__ == "__main__":  # a checkout need not be installed
    sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

from experiments.cli import early, launcher
from experiments.cli.errors import UsageError, piped
from experiments.config import read
from lightning_modules.callbacks.signals import PREEMPTED, exit_code

USAGE = "torchrun.sh DEVICES [the flags of run.py], as torchrun.sh 8 --model vit_b16"
REFUSED = 2  # run.py's exit code for what a person must mend


def main(argv: list[str] | None = None) -> int:
    """Check the command line, start DEVICES ranks on each of VITLAB_NODES machines. Returns 0, or what the ranks have
    left with: 2 nothing was started, 75 preempted, 130 Ctrl-C, 76 stalled, else 1."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        devices, nodes, where = _places(argv)
    except UsageError as error:
        return launcher.refuse("torchrun.sh", error)
    line = ["--num_nodes", str(nodes), "--devices", str(devices), *argv[1:]]
    command = read(line)
    try:
        early.check(command.config, by_launcher=True)
    except UsageError as error:
        return launcher.refuse("run.py", error)
    if folder := early.finished(command.config):
        return early.print_finished(folder)
    return _torchrun(
        [
            f"--nnodes={nodes}",
            f"--nproc-per-node={devices}",
            f"--max-restarts={_setting('RESTARTS', '3')}",
            f"--shutdown-timeout={_setting('GRACE', '120')}",
            *where,
            "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1",
            str(Path(__file__).parents[1] / "run.py"),
            *line,
        ]
    )


def _setting(name: str, default: str) -> str:
    return os.environ.get(f"VITLAB_{name}") or default


def _places(argv: list[str]) -> tuple[int, int, list[str]]:
    """(devices, machines, torchrun's words for where they meet). Raises UsageError."""
    nodes, head, port = _setting("NODES", "1"), _setting("HEAD", ""), _setting("PORT", "")
    if not argv or not argv[0].isdecimal() or int(argv[0]) < 1:
        raise UsageError(
            f"{argv[0] if argv else 'DEVICES'}: the first word is the number of devices of this machine: {USAGE}"
        )
    for name in ("NODES", "RESTARTS", "GRACE", "PORT"):
        if not _setting(name, "1").isdecimal():
            raise UsageError(f"VITLAB_{name} {_setting(name, '')}: a whole number")
    if int(nodes) > 1 and not head:
        raise UsageError(f"VITLAB_NODES {nodes}: VITLAB_HEAD names the machine where they meet, the same one on each")
    if not head and not port and int(nodes) == 1:
        return (
            int(argv[0]),
            1,
            ["--standalone"],
        )  # a free port and a name of its own: a second run on this machine is not in its way
    meet = [
        "--rdzv-backend=c10d",
        f"--rdzv-id={_setting('RUN_ID', 'vitlab')}",
        f"--rdzv-endpoint={head or 'localhost'}:{port or 29500}",
    ]
    return int(argv[0]), int(nodes), meet


def _worth_telling(record: logging.LogRecord) -> bool:
    """Not that a rank was refused, which has said why, nor that the others are told to end."""
    message = record.getMessage()
    return f"exitcode: {REFUSED})" not in message and "closing signal" not in message


def _torchrun(line: list[str]) -> int:
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = (
        "1"  # else a restarted attempt may read the dead one's addresses ("connectFullMesh")
    )
    from torch.distributed import run
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    watch = LocalElasticAgent._monitor_workers

    def monitor(agent: LocalElasticAgent, *args: object) -> object:
        result = watch(agent, *args)
        if any(failure.exitcode == REFUSED for failure in result.failures.values()):
            agent._remaining_restarts = 0  # it would be refused again
        return result

    LocalElasticAgent._monitor_workers = monitor
    for name in ("api", "errors"):
        logging.getLogger(f"torch.distributed.elastic.multiprocessing.{name}").addFilter(_worth_telling)
    try:
        run.main(line)
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        if REFUSED in codes:
            return REFUSED
        print(f"torchrun.sh: {error.format_msg()}", file=sys.stderr, flush=True)
        return codes.pop() if len(codes) == 1 and min(codes) > 0 else 1
    except SignalException as error:
        return exit_code(error.sigval) if error.sigval else PREEMPTED
    return 0


if __name__ == "__main__":
    sys.exit(piped(main))
