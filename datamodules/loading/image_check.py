"""Unreadable image files, found without decoding those that look whole. Only numpy, Pillow and the standard
library."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from datamodules.loading.decode import USUALLY, Decoding, PictureError, open_picture, opened

ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b"\x3b"}  # last bytes of a whole file
READERS = 8
CHUNK = 500  # images that a reader takes at once


def picture_fault(path: str, how: Decoding = USUALLY) -> str | None:
    """Reason that an image cannot be read, or None: header and last bytes are looked at, and all of a file whose end is
    not the one of its format."""
    try:
        with open(path, "rb") as file:
            with opened(file, how) as picture:
                end = ENDS.get(picture.format or "")
            if end:
                file.seek(-len(end), os.SEEK_END)
                if file.read() == end:
                    return None
    except Exception:
        pass
    try:
        open_picture(path, how)
    except PictureError as error:
        return str(error).removeprefix(f"cannot read picture {path}: ")
    return None


def faults(
    root: str, names: Sequence[str | bytes | None] | np.ndarray, how: Decoding = USUALLY, seconds: float | None = None
) -> tuple[dict[int, str], int]:
    """({row: `picture_fault`}, images looked at) of files relative to `root`, by several threads; None is no file.

    With `seconds`, only as many as that time allows, evenly spread over the rows.
    """
    count = -(-len(names) // CHUNK)
    chunks = [np.arange(start, len(names), count) for start in range(count)]
    start = time.monotonic()

    def look(rows: np.ndarray) -> dict[int, str | None] | None:
        if seconds is not None and time.monotonic() - start > seconds:
            return None
        return {
            row: picture_fault(os.path.join(root, os.fsdecode(names[row])), how)
            for row in rows.tolist()
            if names[row] is not None
        }

    with ThreadPoolExecutor(READERS) as readers:
        parts = [part for part in readers.map(look, chunks) if part is not None]
    found = {row: why for part in parts for row, why in part.items()}
    return {row: why for row, why in sorted(found.items()) if why}, len(found)


def only_skips_differ(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two identities (`PictureData.identity`) are of the same files, of which others cannot be read, in epochs
    of equally many steps: then a position in training means the same step of an epoch, in another order."""
    batch, key = now["global_batch_size"], "listed"
    steps = [identity.get("sizes", {}).get("train", 0) // batch for identity in (before, now)]
    return key in now and before.get(key, before.get("fingerprint")) == now[key] and steps[0] == steps[1]
