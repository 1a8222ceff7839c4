"""The known words nearest to a mistyped one. No torch."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(word: str, known: Iterable[str], shown: str = "{}", most: int = 3) -> str:
    """`; did you mean a, b?` with the nearest known words, regardless of case, spaces and hyphens; "" where none is
    near. `shown` is how one is written, as `timm/{}` or `{!r}`."""
    folded = {_folded(each): each for each in reversed(list(known))}
    near = get_close_matches(_folded(word), folded, n=most, cutoff=0.6)
    return f"; did you mean {', '.join(shown.format(folded[each]) for each in near)}?" if near else ""


def _folded(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")
