"""The range of each knob of a data set, declared once: data modules and the command line check the same. No torch."""

from collections.abc import Callable
from typing import Any

Rule = tuple[Callable[[Any], bool], str]

SHARE: Rule = lambda value: 0 <= value <= 1, "must lie between 0 and 1"
BELOW_1: Rule = lambda value: 0 <= value < 1, "must be at least 0 and below 1"
AT_LEAST_1: Rule = lambda value: value >= 1, "must be at least 1"
NOT_NEGATIVE: Rule = lambda value: value >= 0, "must not be negative"

RANGES: dict[str, Rule] = {
    "crop_pct": (lambda value: value > 0, "must be above 0"),  # timm's volo: 1.15, a smaller picture within black
    "crop_scale": (
        lambda value: 0 < value[0] <= value[1] <= 1,
        "two shares of the area, smaller first, above 0 and up to 1",
    ),
    "hflip": SHARE,
    "random_erasing": SHARE,
    "val_fraction": BELOW_1,
    "label_smoothing": BELOW_1,
    "mixup": NOT_NEGATIVE,
    "cutmix": NOT_NEGATIVE,
    "repeated_augment": AT_LEAST_1,
    "split_seed": (lambda value: 0 <= value < 2**32, "must lie between 0 and 2^32 - 1"),
    "seed": NOT_NEGATIVE,
    "epochs": AT_LEAST_1,
    "global_batch_size": AT_LEAST_1,
    "micro_batch_size": AT_LEAST_1,
    "workers": NOT_NEGATIVE,
    "cache_side": AT_LEAST_1,
    "std": (lambda value: len(value) == 3 and min(value) > 0, "must be three numbers above 0"),
    "mean": (lambda value: len(value) == 3, "must be three numbers"),
}


def broken(values: Any, keys: Any = RANGES) -> tuple[str, Any, str] | None:
    """(name, value, rule) of the first of these attributes that is out of its range; None (left out) is in it."""
    for key in keys:
        value = getattr(values, key, None)
        fits, rule = RANGES[key]
        if value is not None and not fits(value):
            return key, value, rule
    return None
