"""Checks of single knobs and of knobs that exclude each other. No torch."""

import re
from typing import TypedDict

from datamodules.knobs import out_of_range
from experiments.cli.errors import UsageError
from experiments.cli.keywords import check_values
from experiments.cli.knobs import Knobs, flag, rare

TAG_LENGTH = 64  # W&B's limit


def check(cfg: Knobs) -> None:
    """Check ranges and combinations. Raises UsageError for the first problem."""
    _check_values(cfg)
    if cfg.name is not None and not re.fullmatch(r"[\w][\w.+=-]*", cfg.name):
        raise UsageError(f"--name {cfg.name}: letters, digits and . _ + = - only; --runs_dir names the folder")
    if cfg.eval_only and (cfg.resume or not cfg.init):
        raise UsageError("--eval_only takes its weights from --init: a run directory, a file, or pretrained")
    for key in ("resume", "extend"):
        if getattr(cfg, key) and cfg.overwrite:
            raise UsageError(f"--{key} continues a run and --overwrite deletes one: give only one of them")
    if cfg.extend and (cfg.resume or cfg.eval_only):
        raise UsageError(f"--extend trains a finished run longer: not with --{'resume' if cfg.resume else 'eval_only'}")
    if cfg.extend_step is not None and not cfg.extend:
        raise UsageError("extend_step goes with extend")
    if cfg.folds is not None and cfg.folds < 2:
        raise UsageError(f"--folds {cfg.folds}: at least 2")
    if (
        cfg.folds is not None
        and cfg.fold is None
        and (few := ["--data_args.limit_val"] * bool(cfg.limit_val) + ["--fast_dev_run"] * cfg.fast_dev_run)
    ):
        raise UsageError(
            f"{few[0]} leaves rows out, and --folds {cfg.folds} merges all of them: add --fold 0 to try one fold"
        )
    if cfg.fold is not None and not 0 <= cfg.fold < (cfg.folds or 0):
        which = f"those of --folds {cfg.folds} are 0 to {cfg.folds - 1}" if cfg.folds else "--folds says of how many"
        raise UsageError(f"--fold {cfg.fold}: {which}")
    _check_training(cfg)
    _check_tracking(cfg)


def _check_values(cfg: Knobs) -> None:
    if broken := out_of_range(cfg):
        knob, value, rule = broken
        raise UsageError(f"{flag(knob)} {f'{value:g}' if isinstance(value, float) else value}: {rule}")
    for key, value in vars(cfg).items():
        if key.endswith("_args") and not isinstance(value, dict):
            raise UsageError(f"--{key} takes keywords, as --{key}.name value")


def _check_training(cfg: Knobs) -> None:
    """Check the knobs of learning against each other."""
    if cfg.warmup_epochs is not None and cfg.warmup_steps is not None:
        raise UsageError("--warmup_epochs and --warmup_steps say the same thing: give one, the other as null")
    if cfg.warmup_epochs is not None and cfg.warmup_epochs > cfg.epochs:
        raise UsageError(f"--warmup_epochs {cfg.warmup_epochs:g} is more than --epochs {cfg.epochs}")
    if cfg.schedule in ("timm", "deit") and (cfg.warmup_steps is not None or (cfg.warmup_epochs or 0) % 1):
        raise UsageError(
            f"--schedule {cfg.schedule} changes the rate once an epoch: its warm-up is a whole number of "
            f"--warmup_epochs"
        )
    for key in ("min_lr", "warmup_lr"):
        if getattr(cfg, key) > cfg.lr:
            typed = flag(Knobs.__dataclass_fields__[key])
            raise UsageError(f"{typed} {getattr(cfg, key):g} is more than the peak, --lr {cfg.lr:g}")
    if cfg.use_ema and cfg.ema_decay is None and not cfg.init:
        raise UsageError("--use_ema needs averaged weights: --ema_decay 0.9999 keeps them")
    if cfg.average_checkpoints is not None and not re.fullmatch(r"(last|best)-[1-9]\d*", cfg.average_checkpoints):
        raise UsageError(f"--average_checkpoints {cfg.average_checkpoints}: last-5 or best-3, for example")


class LoggerArgs(TypedDict):
    """--logger_args."""

    checkpoint: bool
    attention: bool


def _check_tracking(cfg: Knobs) -> None:
    """Refuse settings that only W&B uses where another logger is chosen."""
    check_values(LoggerArgs, cfg.logger_args, "--logger_args", [*LoggerArgs.__annotations__, *rare("logger_args")])
    for tag in tags(cfg.tags) or ():
        if not 1 <= len(tag) <= TAG_LENGTH:
            why = f"the tag {tag!r} has {len(tag)} characters; W&B takes 1 to {TAG_LENGTH} for each"
            raise UsageError(f"--logger_args.tags {cfg.tags!r}: {why}")
    asked = {"tags": cfg.tags, "notes": cfg.notes, "checkpoint": cfg.logger_args.get("checkpoint")}
    for key, value in asked.items():
        if value and cfg.logger != "wandb":
            raise UsageError(
                f"--logger_args.{key} goes to W&B, and this run has --logger {cfg.logger}: leave one of them out"
            )
    if asked["checkpoint"] and cfg.eval_only:
        raise UsageError("--logger_args.checkpoint uploads what was trained, and --eval_only trains nothing")


def tags(text: str | None) -> list[str] | None:
    """The tags of --logger_args.tags without repetition; None without the flag."""
    return None if text is None else [*dict.fromkeys(tag.strip() for tag in text.split(","))]


def check_teacher(cfg: Knobs) -> None:
    """Check the flags of distillation as typed; a recipe may set them for any teacher. Raises UsageError."""
    for key in ("teacher_init", "distill", "distill_args"):
        if getattr(cfg, key) and not cfg.teacher:
            raise UsageError(f"--{key} is for learning from a teacher: --teacher names it")
