"""The rarer knobs of augmentation and mixing, and what their words mean to timm."""

import re
from dataclasses import dataclass, fields
from typing import Any

from timm.data.auto_augment import rand_augment_transform

NUMBER = r"\d+(\.\d+)?"
SECTIONS = {  # timm skips or asserts on what it cannot read; a typo must be seen before training
    "rand": rf"m\d+|n[1-9]\d*|p(0(\.\d+)?|1(\.0+)?)|mstd{NUMBER}|mmax[1-9]\d*|inc[01]|t(weights|3aw|3a)",
    "augmix": rf"m\d+|w[1-9]\d*|d[1-9]\d*|a{NUMBER}|b[01]|mstd{NUMBER}",
    **dict.fromkeys(("original", "originalr", "v0", "v0r", "3a"), rf"mstd{NUMBER}"),
}


@dataclass(frozen=True)
class Augment:
    """Names and defaults are timm's unless noted.

    Args:
        auto_augment: original, originalr, v0, v0r, 3a (3-Augment of DeiT III) or augmix-..., in place of rand_augment.
        color_jitter: strength of brightness, contrast and saturation; timm's rule: inactive under a policy, unless it
            is 3a.
        vflip: probability of an upside-down image.
        crop_ratio: width / height range of the random resized crop.
        erasing_mode: pixel (N(0,1) noise), rand (one N(0,1) colour) or const (0), in normalised units.
        erasing_count: at most so many boxes in an image, each the smaller.
        mix_prob, mix_switch_prob: probability of mixing at all; of CutMix where Mixup is on too.
        mix_mode: one lambda a batch, a pair or elem(ent), or big_vision's roll: partner = neighbour, lambda >= 1/2,
            Mixup only.
        cutmix_minmax: range of the box's sides as parts of the image's, in place of CutMix's Beta.

    Raises:
        ValueError: a value that cannot be used; names the flag.
    """

    auto_augment: str | None = None
    color_jitter: float | None = None
    vflip: float = 0.0
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    erasing_mode: str = "pixel"
    erasing_count: int = 1
    mix_prob: float = 1.0
    mix_switch_prob: float = 0.5
    mix_mode: str = "batch"
    cutmix_minmax: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("crop_ratio", "cutmix_minmax"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.auto_augment is not None:
            check_policy(
                self.auto_augment, "--augment_args.auto_augment", [name for name in SECTIONS if name != "rand"]
            )
        sides = self.cutmix_minmax
        rules = {
            "color_jitter": (self.color_jitter is None or self.color_jitter >= 0, "at least 0"),
            "vflip": (0 <= self.vflip <= 1, "a probability"),
            "crop_ratio": (_is_range(self.crop_ratio), "two ratios, 0 < low <= high"),
            "erasing_mode": (self.erasing_mode in ("pixel", "rand", "const"), "pixel, rand or const"),
            "erasing_count": (self.erasing_count >= 1, "at least 1"),
            "mix_prob": (0 <= self.mix_prob <= 1, "a probability"),
            "mix_switch_prob": (0 <= self.mix_switch_prob <= 1, "a probability"),
            "mix_mode": (self.mix_mode in ("batch", "pair", "elem", "roll"), "batch, pair, elem or roll"),
            "cutmix_minmax": (
                sides is None or (_is_range(sides) and sides[0] < sides[1] <= 1),
                "two parts of a side, 0 < low < high <= 1",
            ),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"--augment_args.{name} {getattr(self, name)!r}: {rule}")


def read_augment(given: dict[str, Any]) -> Augment:
    """`Augment(**given)`. Raises ValueError for an unknown key and for a value that cannot be used."""
    known = [field.name for field in fields(Augment)]
    for key in given:
        if key not in known:
            raise ValueError(f"--augment_args has no {key!r}; there are: {', '.join(known)}")
    return Augment(**given)


def check_policy(text: str, flag: str, names: list[str]) -> None:
    """Raises ValueError (names flag, section and an example) unless timm reads every section of the policy as it is
    meant."""
    name, *sections = text.split("-")
    if name not in names:
        raise ValueError(f"{flag} {text!r}: {name!r} is no policy; there are: {', '.join(names)}{_example(names[0])}")
    for section in sections:
        if not re.fullmatch(SECTIONS[name], section):
            raise ValueError(f"{flag} {text!r}: cannot read {section!r} of {name}{_example(name)}")
    if name == "rand":
        policy = rand_augment_transform(text, {})
        if policy.choice_weights is not None and policy.num_layers > len(policy.ops):
            raise ValueError(
                f"{flag} {text!r}: n{policy.num_layers} of {len(policy.ops)} weighted operations, drawn without "
                f"replacement"
            )


def inactive(augment: Augment, *, policy: str | None, policy_flag: str, erasing: bool, mixing: bool) -> list[str]:
    """A line for each given value that changes nothing."""
    lines = []
    if policy and "3a" not in policy and augment.color_jitter:
        lines.append(
            f"augment_args.color_jitter {augment.color_jitter} is inactive: {policy_flag} switches it off (timm's rule)"
        )
    for prefix, active, cause in (
        ("erasing_", erasing, "random_erasing is 0"),
        ("mix_", mixing, "mixup and cutmix are 0"),
    ):
        given = [
            field
            for field in fields(Augment)
            if field.name.startswith(prefix) and getattr(augment, field.name) != field.default
        ]
        lines += [
            f"augment_args.{field.name} {getattr(augment, field.name)} is inactive: {cause}"
            for field in given
            if not active
        ]
    return lines


def _is_range(pair: tuple[float, ...]) -> bool:
    return len(pair) == 2 and 0 < pair[0] <= pair[1]


def _example(name: str) -> str:
    examples = {"rand": "rand-m9-n2-p0.5-mstd0.5-inc1", "augmix": "augmix-m3-w3-d2-mstd0.5"}
    return f"; for example {examples.get(name, f'{name}-mstd0.5')}"
