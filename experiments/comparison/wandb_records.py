"""Records of runs in W&B, from offline `.wandb` files or its server."""

import math
from pathlib import Path
from typing import Any

from experiments.cli.errors import UsageError
from experiments.comparison.record import FINISHED, UNFINISHED, Record, progress
from lightning_modules.loggers.wandb_local import STEP, has_credentials, read

PREEMPTED = 75
OF_RESULT = ("val", "test")  # what has a slash and stands in result.json
NO_NUMBERS = {
    "NaN": math.nan,
    "Infinity": math.inf,
    "-Infinity": -math.inf,
}  # words of W&B's server, JSON has none for them
NO_HISTORY = ("_", "best/")  # W&B's own, and sizes of the images and tables that reporting/media.py logs


def offline(files: list[Path]) -> list[Record]:
    """One record a run; the files of a run that was resumed, each with a part of it, are put together in the order of
    their starts."""
    runs: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for file in sorted({file.resolve() for file in files}, key=lambda file: file.parent.name.removeprefix("offline-")):
        part = read(file)
        if part is not None:
            runs.setdefault(part["id"], []).append((file, part))
    if not runs:
        raise UsageError(
            f"{', '.join(map(str, files[:3]))}: no run in it (W&B leaves an empty file when it could not start)"
        )
    made = []
    for identity, parts in runs.items():
        config, summary = (
            {key: value for _, part in parts for key, value in part[what].items()} for what in ("config", "summary")
        )
        code = parts[-1][1]["exit_code"]
        state = {None: UNFINISHED, 0: FINISHED, PREEMPTED: "preempted"}.get(code, "failed")
        rows = [row for _, part in parts for row in part["rows"]]
        made.append(_record(parts[-1][1]["name"] or identity, config, summary, rows, state, str(parts[-1][0])))
    return made


def online(project: str) -> list[Record]:
    """The runs of a W&B project, `entity/project`. Raises UsageError without a key, a network, or such a project."""
    if not has_credentials():
        raise UsageError(
            f"{project}: there is no such folder, and as W&B's entity/project it needs a key (wandb login)"
        )
    import wandb

    try:
        runs = [
            {
                "name": run.name or run.id,
                "config": dict(run.config),
                "summary": {key: run.summary[key] for key in run.summary.keys()},  # noqa: SIM118
                "rows": list(run.scan_history()),
                "state": UNFINISHED if run.state == "running" else run.state,
                "source": f"{project}/{run.id}",
            }
            for run in wandb.Api(timeout=60).runs(project, lazy=False, per_page=200)
        ]
    except (
        Exception
    ) as error:  # no network, a wrong key, no such project: wandb has a dozen kinds, not all of them wandb.Error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"{project}: there is no such folder, and as W&B's entity/project: {reason[:200]}") from None
    if not runs:
        raise UsageError(f"{project}: W&B has no run in it")
    return [_record(**run) for run in runs]


def _record(
    name: str, config: dict[str, Any], summary: dict[str, Any], rows: list[dict[str, Any]], state: str, source: str
) -> Record:
    """W&B's words in those of a run directory: rows by optimizer step, a redone step's last; the result only of a
    finished run."""
    steps: dict[float, dict[str, float]] = {}
    for row in map(_worded, rows):
        step = row.get(STEP, row.get("step"))
        if step is None:
            continue
        numbers = {
            key: float(value)
            for key, value in row.items()
            if isinstance(value, int | float) and not key.startswith(NO_HISTORY)
        }
        numbers.pop(STEP, None)
        steps.setdefault(step, {}).update({**numbers, "step": float(step)})
    result = {
        key: value
        for key, value in _worded(summary).items()
        if not key.startswith("_")
        and not isinstance(value, dict)
        and key not in ("epoch", "step", STEP)
        and ("/" not in key or key.startswith(OF_RESULT))
    }
    if result.get("finished"):
        state = FINISHED  # its score is there; only the goodbye is missing
    made = Record(
        name,
        {key: value for key, value in config.items() if not key.startswith("_")},
        result if state == FINISHED else {},
        [steps[step] for step in sorted(steps)],
        state,
        source,
    )
    if state != FINISHED:
        made.notes.append(progress(made) + (f" ({state})" if state != UNFINISHED else ""))
    elif made.best is None:
        made.notes.append("finished without a score")
    return made


def _worded(values: dict[str, Any]) -> dict[str, Any]:
    return {key: NO_NUMBERS.get(value, value) if isinstance(value, str) else value for key, value in values.items()}
