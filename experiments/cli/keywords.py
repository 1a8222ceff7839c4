"""Checks of keyword dictionaries (--model_args, --data_args) against the signature that takes them."""

from collections.abc import Callable
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from datamodules.loading.closest import did_you_mean
from experiments.cli.errors import UsageError


def check_values(build: Callable, given: dict[str, Any], flag: str, known: list[str]) -> None:
    """Refuse keywords that `build` does not take and values of another type than it declares, before anything is built.
    Raises UsageError."""
    hints = get_type_hints(build)
    for key, value in given.items():
        if key not in known:
            raise UsageError(
                f"{flag}: no argument {key!r}{did_you_mean(key, known)} (there are {', '.join(known) or 'none'})"
            )
        if not _is_a(value, hints.get(key, Any)):
            raise UsageError(f"{flag}: {key} {value!r} is not {getattr(hints[key], '__name__', hints[key])}")


def _is_a(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if options := [option for option in get_args(hint) if get_origin(hint) in (Union, UnionType)]:
        return any(_is_a(value, option) for option in options)
    kind = get_origin(hint) or hint
    if kind in (tuple, list):
        return isinstance(value, list | tuple)
    if kind in (int, float):
        return isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)
    return isinstance(value, kind)
