"""Lines for people. Python's own warnings show the path and line of the code that warns, which tell a user nothing."""

import sys

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
