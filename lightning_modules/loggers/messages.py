"""Lines for people. Python's own warnings show the path and line of the code that warns, which tell a user nothing."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_only
from tqdm.auto import tqdm


@rank_zero_only
def note(text: str) -> None:
    """Print a line, from rank 0 alone."""
    tqdm.write(text)


@rank_zero_only
def warn(text: str) -> None:
    """Print `warning: text` to stderr, from rank 0 alone. A progress bar stays whole."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


@contextmanager
def warn_on_error(what: str) -> Iterator[None]:
    """Turn an error inside into a warning: `what` is worth less than the run."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        warn(f"{what} could not be made: {type(error).__name__}: {reason}. The run is not touched by it.")
