"""Train one model: python experiments/run.py --model vit_b16 --devices 8"""
import sys

from experiments import early, fold_runs, launched, listing
from experiments.config import read
from experiments.usage import piped
from lightning_modules.signals import listening


@listening()  # before torch: a signal during start-up leaves no process behind
def main(argv: list[str] | None = None) -> int:
    """Parse, resolve, train, evaluate, write the result. Returns the exit code."""
    command = read(argv)
    try:
        if command.config.list:
            return listing.main(command.config)
        early.check(command.config)
        if fold_runs.wanted(command.config):
            return fold_runs.main(command)
        if folder := early.finished(command.config):
            return early.tell(folder)
        from experiments import build, report, training  # torch and lightning: seconds, so after --help and mistakes
        run = build.resolve(command, assume=command.config.dry_run)
        if run.cfg.dry_run:
            return report.dry_run(run)
        if run.finished:
            return report.finished(run)
        build.cache_pictures(run.data)
        task, trainer = training.task(run), training.trainer(run)
    except (ValueError, FileNotFoundError) as error:
        return launched.refuse("run.py", error)
    with report.ending(run, trainer):
        if not run.cfg.eval_only:
            trainer.fit(task, run.data, ckpt_path=run.resume, weights_only=True)
        report.result(run, task, trainer)
    return 0


if __name__ == "__main__":
    sys.exit(piped(main))
