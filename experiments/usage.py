"""What is said about a wrong command line, and the spelling of sizes."""
from difflib import get_close_matches

TOLD = "VITLAB_TOLD"  # in the environment of a fold: what the table means has been said


class UsageError(ValueError):
    """The command line or a config file is wrong; the message is for the person who typed it."""


def did_you_mean(word: str, known: list[str]) -> str:
    near = get_close_matches(word, known, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def size(text: int | str | list[int] | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of `224`, `512x1024` or a pair. Raises UsageError."""
    parts = text if isinstance(text, list | tuple) else str(text).lower().split("x")
    if len(parts) not in (1, 2) or not all(str(part).isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--image_size {text}: give one side, as 224, or HEIGHTxWIDTH, as 512x1024")
    return int(parts[0]), int(parts[-1])
