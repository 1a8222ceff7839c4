"""Train one model: python experiments/run.py --model vit_b16 --devices 8"""
import sys

from experiments import fold_runs
from experiments.config import read
from lightning_modules.signals import listening


@listening()  # before torch: a signal during start-up leaves no process behind
def main(argv: list[str] | None = None) -> int:
    """Parse, resolve, train, evaluate, write the result. Returns the exit code."""
    command = read(argv)
    try:
        if fold_runs.wanted(command.config):
            return fold_runs.main(command)
        from experiments import build, report, training  # torch and lightning: seconds, so after --help and mistakes
        if command.config.list:
            return report.listing(command.config)
        run = build.resolve(command)
        if run.cfg.dry_run:
            return report.dry_run(run)
        if run.finished:
            return report.finished(run)
        build.cache_pictures(run.data)
        task, trainer = training.task(run), training.trainer(run)
    except (ValueError, FileNotFoundError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    with report.ending(run, trainer):
        if not run.cfg.eval_only:
            trainer.fit(task, run.data, ckpt_path=run.resume, weights_only=True)
        report.result(run, task, trainer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
