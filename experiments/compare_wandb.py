"""Runs as W&B has them, offline in `.wandb` files or on its server, as the records of run directories.

A `.wandb` file is 7 bytes of header, then LevelDB's log: blocks of 32 KiB, records of crc32, length (u16), kind (u8) and payload, a protobuf
`wandb.proto.wandb_internal_pb2.Record`. wandb itself has no reader of it any more (wandb.sdk.internal.datastore went with 0.30).
"""
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.compare_runs import FINISHED, UNFINISHED, Record, progress
from experiments.usage import UsageError

BLOCK, HEADER = 32768, 7
FULL, FIRST, LAST = 1, 2, 4
STEP = "trainer/global_step"  # the x that Lightning's logger writes
PREEMPTED = 75
OF_RESULT = ("val", "test")  # what has a slash and stands in result.json
NO_HISTORY = ("_", "best/")  # W&B's own, and what run_media_log.py tells: sizes of pictures and tables


def payloads(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file up to the first damaged one: a killed run ends with half a record. Raises UsageError for other files."""
    content = path.read_bytes()
    if content[:4] != b":W&B":
        raise UsageError(f"{path} is not a .wandb file")
    position, whole = HEADER, b""
    while position + HEADER <= len(content):
        left = BLOCK - position % BLOCK
        if left < HEADER:  # the end of a block that no header fits in
            position += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", content, position)
        part = content[position + HEADER:position + HEADER + length]
        if kind == 0 or len(part) < length or zlib.crc32(part, zlib.crc32(bytes([kind]))) != checksum:
            return
        position += HEADER + length
        whole = part if kind in (FULL, FIRST) else whole + part
        if kind in (FULL, LAST):
            yield whole


def read(path: Path) -> dict[str, Any] | None:
    """{id, name, config, summary, rows, exit_code} of a .wandb file; None for one without a run. exit_code None: killed, or going on."""
    from wandb.proto import wandb_internal_pb2 as records
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


def offline(files: list[Path]) -> list[Record]:
    """One record a run; the files of a run that was resumed, each with a part of it, are put together in the order of their starts."""
    runs: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for file in sorted({file.resolve() for file in files}, key=lambda file: file.parent.name.removeprefix("offline-")):
        part = read(file)
        if part is not None:
            runs.setdefault(part["id"], []).append((file, part))
    if not runs:
        raise UsageError(f"{', '.join(map(str, files[:3]))}: no run in it (W&B leaves an empty file when it could not start)")
    made = []
    for identity, parts in runs.items():
        config, summary = ({key: value for _, part in parts for key, value in part[what].items()} for what in ("config", "summary"))
        code = parts[-1][1]["exit_code"]
        state = {None: UNFINISHED, 0: FINISHED, PREEMPTED: "preempted"}.get(code, "failed")
        rows = [row for _, part in parts for row in part["rows"]]
        made.append(_record(parts[-1][1]["name"] or identity, config, summary, rows, state, str(parts[-1][0])))
    return made


def online(project: str) -> list[Record]:
    """The runs of a W&B project, `entity/project`. Raises UsageError without a key, a network, or such a project."""
    from lightning_modules.tracking import has_credentials
    if not has_credentials():
        raise UsageError(f"{project}: there is no such folder, and as W&B's entity/project it needs a key (wandb login)")
    import wandb
    try:
        runs = [{"name": run.name or run.id, "config": dict(run.config), "summary": {key: run.summary[key] for key in run.summary.keys()},  # noqa: SIM118
                 "rows": list(run.scan_history()), "state": UNFINISHED if run.state == "running" else run.state, "source": f"{project}/{run.id}"}
                for run in wandb.Api(timeout=60).runs(project, lazy=False, per_page=200)]
    except Exception as error:  # no network, a wrong key, no such project: wandb has a dozen kinds, not all of them wandb.Error
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"{project}: there is no such folder, and as W&B's entity/project: {said[:200]}") from None
    if not runs:
        raise UsageError(f"{project}: W&B has no run in it")
    return [_record(**run) for run in runs]


def _record(name: str, config: dict[str, Any], summary: dict[str, Any], rows: list[dict[str, Any]], state: str, source: str) -> Record:
    """W&B's words in those of a run directory: rows by optimizer step, a redone step's last; the result only of a finished run."""
    steps: dict[float, dict[str, float]] = {}
    for row in rows:
        step = row.get(STEP, row.get("step"))
        if step is None:
            continue
        numbers = {key: float(value) for key, value in row.items() if isinstance(value, int | float) and not key.startswith(NO_HISTORY)}
        numbers.pop(STEP, None)
        steps.setdefault(step, {}).update({**numbers, "step": float(step)})
    result = {key: value for key, value in summary.items()
              if not key.startswith("_") and not isinstance(value, dict) and key not in ("epoch", "step", STEP)
              and ("/" not in key or key.startswith(OF_RESULT))}
    if result.get("finished"):
        state = FINISHED  # its score is there; only the goodbye is missing
    made = Record(name, {key: value for key, value in config.items() if not key.startswith("_")}, result if state == FINISHED else {},
                  [steps[step] for step in sorted(steps)], state, source)
    if state != FINISHED:
        made.notes.append(progress(made) + (f" ({state})" if state != UNFINISHED else ""))
    elif made.best is None:
        made.notes.append("finished without a score")
    return made
