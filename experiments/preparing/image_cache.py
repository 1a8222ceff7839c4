"""`prepare.py cache`: the picture cache of runs, made ahead of them."""

import os
import sys

from experiments.cli.errors import UsageError
from experiments.config import Command
from experiments.running import decide, objects


def main(command: Command) -> int:
    """Build it, or say that it is there. Returns the exit code."""
    try:
        data = decide.listed(command)
        if data.cache is None:
            raise UsageError(
                f"--data {command.config.data}: these data are in memory, or their pictures are no files; there is "
                f"nothing to cache"
            )
        print(data.cache.note())
    except (ValueError, FileNotFoundError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    objects.cache_pictures(data, "prepare.py")
    megabytes = os.path.getsize(os.path.join(data.cache.folder, "pixels.bin")) / 2**20
    print(
        f"{data.cache.folder}: {megabytes:.1f} MB; a run of these data uses it with --cache_dir "
        f"{command.config.cache_dir} --data_args.cache_side "
        f"{data.cache.side} --data_args.interpolation {data.cache.interpolation}, given or as its other flags come to"
    )
    return 0
