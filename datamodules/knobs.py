"""Every knob of the data, declared once: type, default, range, help and group. Data modules inherit these classes, and
so does the command line's `Config`. No torch.

A group of knobs is a dataclass; its `title` is the heading in `--help`. None means: left out, and chosen elsewhere.
"""

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, Literal

Role = Literal["training", "place", "where", "numerics"]
Task = Literal["classification", "multilabel", "regression"]
Range = tuple[Callable[[Any], bool], str]

SHARE: Range = lambda value: 0 <= value <= 1, "must lie between 0 and 1"
BELOW_1: Range = lambda value: 0 <= value < 1, "must be at least 0 and below 1"
AT_LEAST_1: Range = lambda value: value >= 1, "must be at least 1"
NOT_NEGATIVE: Range = lambda value: value >= 0, "must not be negative"
POSITIVE: Range = lambda value: value > 0, "must be above 0"


def knob(
    default: Any, text: str, valid: Range | None = None, *, role: Role = "training", group: str = "", flag: str = ""
) -> Any:
    """A field of a group of knobs.

    Args:
        default: a value, or a function that makes one.
        text: the help, a full phrase.
        valid: (test, rule in words) of values other than None.
        role: what a difference means. `training` makes another run with another name; `where` another run that is
            refused under the same name; `numerics` another name, but the run may resume; `place` neither.
        group: heading in `--help`, where it is not the title of the class.
        flag: how a rare knob is typed, where that is not its name, as data_args.cache_side.
    """
    metadata = {"help": text, "range": valid, "role": role, "group": group, "flag": flag}
    return (
        field(default_factory=default, metadata=metadata)
        if callable(default)
        else field(default=default, metadata=metadata)
    )


def out_of_range(values: Any) -> tuple[Field, Any, str] | None:
    """(field, value, rule) of the first field of a dataclass that breaks its range; None where none does."""
    for each in fields(values):
        value, valid = getattr(values, each.name), each.metadata.get("range")
        if value is not None and valid and not valid[0](value):
            return each, value, valid[1]
    return None


def default(knob: Field) -> Any:
    """The default value of a knob."""
    return knob.default_factory() if callable(knob.default_factory) else knob.default


def height_width(text: int | str | list[int] | tuple[int, ...] | None) -> tuple[int, int]:
    """(height, width) of `224`, `512x1024` or a pair. Raises ValueError."""
    parts = text if isinstance(text, list | tuple) else str(text).lower().split("x")
    if len(parts) not in (1, 2) or not all(str(part).isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--image_size {text}: give one side, as 224, or HEIGHTxWIDTH, as 512x1024")
    return int(parts[0]), int(parts[-1])


@dataclass(kw_only=True, eq=False, repr=False)
class Source:
    """Place and splits of the images."""

    title: ClassVar[str] = "On what"

    data_dir: str | None = knob(None, "Folder of the data set.", role="where")
    val_fraction: float = knob(
        0.1, "Share of the training images held out for validation, stratified, where there is no val split.", BELOW_1
    )
    split_seed: int = knob(
        0,
        "Random seed of that split and of folds; --seed never changes them.",
        (lambda value: 0 <= value < 2**32, "must lie between 0 and 2^32 - 1"),
    )
    limit_val: int | None = knob(
        None,
        "Number of images of val, and of test, that are scored, evenly spaced. Default: all.",
        AT_LEAST_1,
        flag="data_args.limit_val",
    )
    cache_dir: str | None = knob(
        None, "Folder in which decoded and resized images are cached, for all runs that share it.", role="place"
    )
    cache_side: int | None = knob(
        None,
        "Shorter side in pixels of the images in --cache_dir. Default: the size that evaluation resizes to.",
        AT_LEAST_1,
        flag="data_args.cache_side",
    )


@dataclass(kw_only=True, eq=False, repr=False)
class ImageFiles:
    """Images that are files."""

    title: ClassVar[str] = "On what"

    bad_images: Literal["error", "skip"] = knob(
        "error",
        "What to do with missing or unreadable images: error stops before training; skip leaves them out, lists them "
        "in skipped.csv, and a run goes on without those that break later.",
        role="place",
    )


@dataclass(kw_only=True, eq=False, repr=False)
class Table:
    """Images and targets named by a table, train.csv. None is guessed from the files."""

    title: ClassVar[str] = "Tables (a folder with train.csv)"

    target: str | None = knob(
        None, "Target column, or several separated by commas. Default: from train.csv and sample_submission.csv."
    )
    task: Task | None = knob(None, "Type of task. Default: inferred from the targets.")
    image: str | None = knob(None, "Path pattern of the images, as {split}/{Id}.jpg. Default: from the folders.")
    group: str | None = knob(
        None, "Column, or FILE.csv, of groups; images of one group are never on both sides of a split."
    )
    metric: str | None = knob(
        None,
        "Metric that chooses the best epoch (the first of equal ones): a name of --list metrics, or my.py:function.",
        group="How it learns",
    )
    bad_rows: Literal["error", "skip"] = knob(
        "error",
        "What to do with rows without a label: skip neither trains on them nor scores them.",
        flag="data_args.bad_rows",
    )
    folds: int | None = knob(None, "Number of folds; each is trained in a process of its own, and all are merged.")
    fold: int | None = knob(None, "The one fold of --folds to train, from 0.")


@dataclass(kw_only=True, eq=False, repr=False)
class Preparation:
    """Resizing, cropping and normalisation of images."""

    title: ClassVar[str] = "How images are prepared"

    image_size: int | str | None = knob(None, "Side in pixels, or HEIGHTxWIDTH. Default: the model's own.")
    train_size: int | str | None = knob(
        None,
        "Side of training crops where it is not --image_size: 160, or rising over the epochs, 128-224.",
        flag="augment_args.train_size",
    )
    interpolation: Literal["bicubic", "bilinear", "nearest"] | None = knob(
        None, "Interpolation of resizing. Default: the model's own.", flag="data_args.interpolation"
    )
    crop_pct: float | None = knob(
        None, "Share of the resized image that evaluation crops. Default: the model's own.", POSITIVE
    )  # timm's volo: 1.15, a smaller image within black
    crop_mode: Literal["center", "squash", "border"] | None = knob(
        None, "Crop mode of evaluation, in timm's words. Default: the model's own.", flag="data_args.crop_mode"
    )
    mean: tuple[float, float, float] | None = knob(
        None,
        "Mean of red, green and blue, from 0 to 1. Default: the model's own.",
        (lambda value: len(value) == 3, "must be three numbers"),
        flag="data_args.mean",
    )
    std: tuple[float, float, float] | None = knob(
        None,
        "Standard deviation of red, green and blue, from 0 to 1. Default: the model's own.",
        (lambda value: len(value) == 3 and min(value) > 0, "must be three numbers above 0"),
        flag="data_args.std",
    )


@dataclass(kw_only=True, eq=False, repr=False)
class Augmentation:
    """Variation and mixing of training images."""

    title: ClassVar[str] = "Augmentation"

    crop_scale: tuple[float, float] = knob(
        (0.08, 1.0),
        "Range of the area of the random resized crop, as [0.08,1.0].",
        (lambda value: 0 < value[0] <= value[1] <= 1, "two shares of the area, smaller first, above 0 and up to 1"),
    )
    hflip: float = knob(0.5, "Probability of a horizontal flip.", SHARE)
    rand_augment: str | None = knob(None, "RandAugment policy in timm's words, as rand-m9-n2-p0.5-mstd0.5-inc1.")
    random_erasing: float = knob(0.0, "Probability of erasing a box of the image.", SHARE)
    repeated_augment: int = knob(
        1,
        "Number of times an image is drawn in an epoch, each time augmented anew; an epoch stays as long.",
        AT_LEAST_1,
        flag="augment_args.repeated_augment",
    )
    mixup: float = knob(0.0, "Alpha of mixup; 0 switches it off.", NOT_NEGATIVE)
    cutmix: float = knob(0.0, "Alpha of CutMix; 0 switches it off.", NOT_NEGATIVE)
    label_smoothing: float = knob(0.1, "Label smoothing of the training targets.", BELOW_1, group="How it learns")
    augment_args: dict[str, Any] = knob(
        dict,
        "Rarer augmentation settings, as --augment_args.mix_mode elem: auto_augment (original, v0, 3a, "
        "augmix-m3-w3), color_jitter, vflip, crop_ratio, erasing_mode (pixel, rand, const), erasing_count, mix_prob, "
        "mix_switch_prob, mix_mode (batch, pair, elem, roll), cutmix_minmax.",
    )


@dataclass(kw_only=True, eq=False, repr=False)
class Batches:
    """Batches and their order."""

    title: ClassVar[str] = "How it learns"

    epochs: int = knob(100, "Number of passes over the training images.", AT_LEAST_1)
    global_batch_size: int = knob(
        128, "Images in one optimizer step, over all devices, nodes and accumulated passes.", AT_LEAST_1
    )
    micro_batch_size: int | None = knob(
        None,
        "Most images that one device takes in one pass. Default: what fits into its memory.",
        AT_LEAST_1,
        role="place",
        group="Where it runs",
    )
    seed: int = knob(0, "Random seed of weight initialisation, data order, augmentation and dropout.", NOT_NEGATIVE)
    workers: int | None = knob(
        None,
        "Data loading processes of each device. Default: chosen from the cores of the machine.",
        NOT_NEGATIVE,
        role="place",
        group="Where it runs",
    )
    eval_only: bool = knob(
        False,
        "Score the test split if there is one, else val, with the weights of --init.",
        group="Instead of training",
    )
