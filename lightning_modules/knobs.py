"""Every knob of learning, declared once: type, default, range, help and group. `lightning_modules.create` takes its
defaults from here, and the command line's `Config` inherits these classes. No torch.

`epochs`, `seed`, `label_smoothing`, `global_batch_size` and `metric` are the data module's (datamodules/knobs.py): its
mixed targets, its order and its crop sizes follow from them. Fields look alike in both files, and the two rooms do not
import each other.
"""

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, Literal

Range = tuple[Callable[[Any], bool], str]

SHARE: Range = lambda value: 0 < value <= 1, "must be above 0 and up to 1"
NOT_NEGATIVE: Range = lambda value: value >= 0, "must not be negative"
POSITIVE: Range = lambda value: value > 0, "must be above 0"


def knob(default: Any, text: str, valid: Range | None = None, *, role: str = "training", flag: str = "") -> Any:
    """A field of a group of knobs, as datamodules/knobs.py has them."""
    metadata = {"help": text, "range": valid, "role": role, "group": "", "flag": flag}
    return (
        field(default_factory=default, metadata=metadata)
        if callable(default)
        else field(default=default, metadata=metadata)
    )


def out_of_range(values: Any) -> tuple[Field, Any, str] | None:
    """(field, value, rule) of the first field of a dataclass that breaks its range; None where none does."""
    for each in fields(values):
        value, valid = getattr(values, each.name), each.metadata.get("range")
        if value is None or valid is None:
            continue
        fits, rule = valid
        try:
            if not fits(value):
                return each, value, rule
        except TypeError:  # a word where a number belongs
            return each, value, "must be a number"
    return None


@dataclass(kw_only=True, eq=False, repr=False)
class Learning:
    """Rate, optimizer, loss and averaged weights."""

    title: ClassVar[str] = "How it learns"

    lr: float = knob(1e-3, "True peak learning rate; given here or in --config it is not scaled.", NOT_NEGATIVE)
    schedule: Literal["cosine", "timm", "deit", "swin", "convnext"] = knob(
        "cosine",
        "Warm-up and cosine decay of the learning rate: at every step (cosine), or as the trainer of timm, DeiT, Swin "
        "or ConvNeXt does it.",
    )
    min_lr: float = knob(0.0, "Learning rate at the end of the cosine.", NOT_NEGATIVE)
    warmup_lr: float = knob(
        0.0, "Learning rate at the start of the warm-up.", NOT_NEGATIVE, flag="optimizer_args.warmup_lr"
    )
    warmup_epochs: float | None = knob(
        None, "Epochs of linear warm-up. Default: a tenth of --epochs, at most 5.", NOT_NEGATIVE
    )
    warmup_steps: int | None = knob(None, "Optimizer steps of linear warm-up, in place of epochs.", NOT_NEGATIVE)
    optimizer: Literal["adamw", "lamb", "sgd", "muon"] = knob(
        "adamw", "Optimizer, timm's; muon uses AdamW for parameters that are no hidden matrix."
    )
    optimizer_args: dict[str, Any] = knob(dict, "Keywords of the optimizer, as --optimizer_args.betas [0.9,0.95].")
    weight_decay: float = knob(0.05, "Weight decay; norms, biases, tokens and positions have none.", NOT_NEGATIVE)
    layer_decay: float | None = knob(
        None,
        "Factor of the learning rate for each layer further from the head, as 0.75. ConvNeXt has 12 layers between "
        "stem and head, as published; other networks have one per block.",
        SHARE,
    )
    head_lr_scale: float = knob(
        1.0, "Factor of the learning rate of the head.", POSITIVE, flag="optimizer_args.head_lr_scale"
    )
    freeze: str | None = knob(None, "Frozen part: backbone, or the first share of the layers, as 0.5.")
    clip_grad: float | None = knob(
        1.0, "Largest gradient norm; null does not clip.", (POSITIVE[0], "must be above 0; null does not clip")
    )
    clip_mode: Literal["norm", "value"] = knob(
        "norm",
        "What --clip_grad bounds: the global norm of the gradient, or each value.",
        flag="optimizer_args.clip_mode",
    )
    loss: (
        Literal[
            "cross_entropy", "bce", "bce_rsb", "bce_deit3", "sigmoid", "mse", "l1", "huber", "ordinal", "distribution"
        ]
        | None
    ) = knob(None, "Loss, a name of --list losses. Default: cross_entropy for classification, else bce.")
    loss_args: dict[str, Any] = knob(
        dict, "Keywords of the loss, as --loss_args.bins 20; target_weights of several targets."
    )
    ema_decay: float | None = knob(
        None,
        "Decay of an exponential moving average of the weights, as 0.9999; it is scored beside the weights.",
        (lambda value: 0 <= value < 1, "must be below 1"),
    )
    use_ema: bool | None = knob(
        None, "Choose, score and predict with the averaged weights. Default: true where they are kept."
    )
    average_checkpoints: str | None = knob(
        None, "End with the mean of the weights of several epochs: last-5 or best-3."
    )
    patience: int | None = knob(
        None,
        "Stop after this number of epochs without a better val metric. Default: never.",
        (lambda value: value >= 1, "must be at least 1"),
    )


@dataclass(kw_only=True, eq=False, repr=False)
class Distillation:
    """The teacher and the distillation loss."""

    title: ClassVar[str] = "Distillation"

    teacher: str | None = knob(
        None,
        "Trained network to learn from: a run directory (over folds: each fold takes its own), a file, a name of "
        "--list models or timm/<name>; several separated by commas; or the folder of prepare.py teacher.",
    )
    teacher_init: str | None = knob(
        None, "Weights of a teacher given by name: a file or a run. Default: those that timm publishes."
    )
    distill: str | None = knob(
        None, "Distillation loss, a name of --list losses. Default: hard, as in DeiT, and mse for regression."
    )
    distill_args: dict[str, Any] = knob(
        dict,
        "Keywords of the distillation loss, as --distill_args.tau 3; alpha is the teacher's share of the loss, "
        "warmup_epochs the epochs over which that term rises.",
    )
