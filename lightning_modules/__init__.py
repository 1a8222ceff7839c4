"""How a network learns: LightningModules, teachers, losses, optimizers, schedules, callbacks."""

from importlib.util import find_spec
from pathlib import Path


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
