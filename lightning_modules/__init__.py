"""LightningModules, teachers, losses, optimizers, schedules and callbacks that train a network.

`create(model, data, teacher=None, epochs=..., **knobs)` builds the LightningModule; `names()` lists the names that its
knobs take.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def check_neighbours(*names: str) -> None:
    """Raise ImportError where a package of vitlab is hidden by another of that name, such as a folder models/ where
    Python was started."""
    home = Path(__file__).resolve().parents[1]
    for name in names:
        spec = find_spec(name)
        found = [Path(place).resolve() for place in spec.submodule_search_locations or ()] if spec else []
        if home / name not in found[:1]:
            raise ImportError(
                f"{found[0] if found else 'nothing'} is imported as {name!r} and hides vitlab's own, {home / name}: "
                "start Python from another folder, rename that one, or put vitlab's folder first on PYTHONPATH"
            )


check_neighbours("models")

_LAZY = {  # what a user names, and the module that has it: importing the package imports no torch
    "create": "factory",
    "names": "factory",
    "Task": "task",
    "Distiller": "distiller",
    "Teacher": "teachers.teacher",
}
__all__ = [*_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
