"""Train one model: python experiments/run.py --model vit_b16 --devices 8"""

import sys
from pathlib import Path

if __name__ == "__main__":  # a checkout need not be installed
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from experiments.cli import early, launcher, listing
from experiments.cli.errors import piped
from experiments.config import read
from experiments.folds import processes
from lightning_modules.callbacks.signals import listening


@listening()  # before torch: a signal during start-up leaves no process behind
def main(argv: list[str] | None = None) -> int:
    """Parse, resolve, train, evaluate, write the result. Returns the exit code."""
    command = read(argv)
    try:
        if command.config.list:
            return listing.main(command.config)
        early.check(command.config)
        if processes.wanted(command.config):
            return processes.main(command)
        if folder := early.finished(command.config):
            return early.print_finished(folder)
        from experiments.reporting import result  # torch and lightning: seconds, so after --help and mistakes
        from experiments.running import build, objects, training

        run = build.resolve(command, assume=command.config.dry_run)
        if run.cfg.dry_run:
            return result.dry_run(run)
        if run.finished:
            return result.finished(run)
        objects.cache_pictures(run.data)
        task, trainer = training.task(run), training.trainer(run)
    except (ValueError, FileNotFoundError) as error:
        return launcher.refuse("run.py", error)
    with result.ending(run, trainer):
        if not run.cfg.eval_only:
            trainer.fit(task, run.data, ckpt_path=run.resume, weights_only=True)
        result.result(run, task, trainer)
    return 0


if __name__ == "__main__":
    sys.exit(piped(main))
