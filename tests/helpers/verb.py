"""`run.py` up to the first step: what it decided, by the command line, without a training."""

from typing import Any

from experiments import run
from experiments.running import training

TINY = [
    "--model",
    "vit_nano4",
    "--model_args.embed_dim",
    "32",
    "--model_args.depth",
    "1",
    "--image_size",
    "16",
    "--epochs",
    "1",
    "--global_batch_size",
    "4",
    "--workers",
    "0",
    "--logger",
    "csv",
    "--accelerator",
    "cpu",
]


class Decided(Exception):
    """Ends the command where the training would be built."""


def decided(monkeypatch: Any, *argv: str) -> Any:
    """The `build.Run` that `run.main(argv)` would train: its directory entered, its folds written."""
    found = []

    def keep(resolved: Any) -> None:
        found.append(resolved)
        raise Decided

    with monkeypatch.context() as patched:
        patched.setattr(training, "task", keep)
        patched.delenv("VITLAB_DECISION", raising=False)
        try:
            code = run.main([*argv, *TINY])
        except Decided:
            patched.delenv("VITLAB_DECISION", raising=False)
            return found[0]
    raise AssertionError(f"exit code {code}")
