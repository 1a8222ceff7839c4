"""W&B on this machine: its key, and runs in `.wandb` files. Neither lightning nor wandb is imported for
it, but wandb's protobuf.

A `.wandb` file is 7 bytes of header, then LevelDB's log: blocks of 32 KiB, records of crc32, length (u16), kind (u8)
and payload, a protobuf `wandb.proto.wandb_internal_pb2.Record`. wandb itself has no reader of it any more
(wandb.sdk.internal.datastore went with 0.30).
"""

import json
import netrc
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

HOSTS = {"api.wandb.ai", "api.forge.coreweave.com"}
BLOCK, HEADER = 32768, 7
FULL, FIRST, LAST = 1, 2, 4
STEP = "trainer/global_step"  # the x that Lightning's logger writes


def id_of_agent() -> str | None:
    """The W&B id that a sweep's agent has given this process; None outside one."""
    return os.getenv("WANDB_RUN_ID") if os.getenv("WANDB_SWEEP_ID") else None


def own_id(run_dir: Path) -> str | None:
    """The W&B id that a run directory has; None before its first start with W&B."""
    file = run_dir / "wandb" / "run_id.txt"
    return file.read_text().strip() if file.is_file() else None


def has_credentials() -> bool:
    """Return whether this machine has a W&B key, in the environment or netrc; without network or prompt."""
    if os.getenv("WANDB_API_KEY") or os.getenv("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    base = os.getenv("WANDB_BASE_URL", "")
    hosts = {urlsplit(base).netloc} if base else HOSTS
    for file in filter(None, (os.getenv("NETRC"), "~/.netrc", "~/_netrc")):
        try:
            found = netrc.netrc(os.path.expanduser(file))
        except (OSError, netrc.NetrcParseError):
            continue
        if any(found.authenticators(host) for host in hosts):
            return True
    return False


def payloads(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file up to the first damaged one: a killed run ends with half a record. Raises ValueError
    for other files."""
    content = path.read_bytes()
    if content[:4] != b":W&B":
        raise ValueError(f"{path} is not a .wandb file")
    position, whole = HEADER, b""
    while position + HEADER <= len(content):
        left = BLOCK - position % BLOCK
        if left < HEADER:  # the end of a block that no header fits in
            position += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", content, position)
        part = content[position + HEADER : position + HEADER + length]
        if kind == 0 or len(part) < length or zlib.crc32(part, zlib.crc32(bytes([kind]))) != checksum:
            return
        position += HEADER + length
        whole = part if kind in (FULL, FIRST) else whole + part
        if kind in (FULL, LAST):
            yield whole


def read(path: Path) -> dict[str, Any] | None:
    """{id, name, config, summary, rows, exit_code} of a .wandb file; None for one without a run. exit_code None:
    killed, or going on."""
    from wandb.proto import wandb_internal_pb2

    records: Any = wandb_internal_pb2  # its classes are made at import
    found: dict[str, Any] = {"id": None, "config": {}, "summary": {}, "rows": [], "exit_code": None}
    for payload in payloads(path):
        record = records.Record.FromString(payload)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found |= {"id": record.run.run_id, "name": record.run.display_name}
            found["config"] |= _items(record.run.config.update)
        elif kind == "config":
            found["config"] |= _items(record.config.update)
        elif kind == "history":
            found["rows"].append(_items(record.history.item))
        elif kind == "summary":
            found["summary"] |= _items(record.summary.update)
        elif kind == "exit":
            found["exit_code"] = record.exit.exit_code
    return found if found["id"] else None


def _items(items: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
