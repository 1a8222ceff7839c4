"""The runs to compare: run directories, folders of them, offline W&B files and W&B projects all become `Record`s."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import yaml

from experiments.cli.errors import UsageError
from experiments.comparison.record import BROKEN, FINISHED, UNFINISHED, Record, number, of_place, progress

DEPTH = 4  # folders below the one given
CONFIG, RESULT, HISTORY = "config.yaml", "result.json", "metrics.csv"


def find(places: list[str]) -> list[Record]:
    """Read the runs in all these places, each once and with a unique name.

    Raises UsageError for a place without runs or one that W&B does not know; FileNotFoundError for a path that is not
    there.
    """
    records: list[Record] = []
    files: list[Path] = []
    for place in places:
        path = Path(place).expanduser()
        if path.exists():
            runs, offline = _walk(path)
            if not runs and not offline:
                raise UsageError(
                    f"{place}: there is no run in it (a run directory has {RESULT} or {CONFIG}, a W&B run a .wandb "
                    f"file)"
                )
            records += [run_directory(run) for run in runs]
            files += offline
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", place) and place.split("/")[0] not in (".", ".."):
            from experiments.comparison import wandb_records  # wandb and lightning: seconds

            records += wandb_records.online(place)
        else:
            raise FileNotFoundError(f"{place}: there is no such file or folder (nor is it W&B's entity/project)")
    if files:
        from experiments.comparison import wandb_records

        records += wandb_records.offline(files)
    once = {(each.source, each.name): each for each in records}
    return _named_apart(_gathered(list(once.values())))


def _walk(path: Path, depth: int = 0) -> tuple[list[Path], list[Path]]:
    """(run directories, .wandb files) at or below a path; a run's own folders are not entered."""
    if path.is_file():
        if path.suffix != ".wandb":
            raise UsageError(f"{path} is neither a run directory nor a .wandb file")
        return [], [path]
    if _is_run(path):
        return [path.resolve()], []
    runs: list[Path] = []
    files = sorted(path.glob("*.wandb"))
    if files or depth > DEPTH:
        return runs, files
    for child in sorted(path.iterdir(), key=lambda child: _natural(child.name)):
        if child.is_dir() and not child.name.startswith(".") and child.name != "latest-run":
            more, offline = _walk(child, depth + 1)
            runs += more
            files += offline
    return runs, files


def _is_run(path: Path) -> bool:
    return (
        (path / RESULT).is_file() or (path / CONFIG).is_file() and not _is_prediction(path) or bool(_fold_folders(path))
    )


def _is_prediction(path: Path) -> bool:
    """Whether predict.py wrote the directory: its config.yaml is of another kind."""
    with open(path / CONFIG, "rb") as file:
        return bool(re.match(rb"\W*verb\b", file.read(40)))


def _fold_folders(path: Path) -> list[Path]:
    found = [
        child
        for child in path.glob("fold*")
        if re.fullmatch(r"fold\d+", child.name) and ((child / RESULT).is_file() or (child / CONFIG).is_file())
    ]
    return sorted(found, key=lambda child: int(child.name[4:]))


def _natural(name: str) -> list[Any]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def run_directory(path: Path) -> Record:
    """The record of a run directory, whatever state it is in; what cannot be read is in its notes."""
    problems: list[str] = []
    config, result = _mapping(path / CONFIG, yaml.safe_load, problems), _mapping(path / RESULT, json.loads, problems)
    if result and not all(
        value is None or number(value) or isinstance(value, float)
        for value in (result.get("best"), result.get("overall"))
    ):
        problems.append(f"{RESULT}: best is {result.get('best')!r}, not a number")
    unsound = [key for key, value in result.items() if key.split("/")[-1] == "loss" and not number(value)]
    if unsound:  # of a run from before such outputs were refused: the likeliest of NaN is class 0
        result = {key: value for key, value in result.items() if key != "best" and not key.startswith(("val", "test"))}
    state = BROKEN if problems else FINISHED if result.get("finished") else UNFINISHED
    history = [] if state == BROKEN and not (path / HISTORY).is_file() else _history(path / HISTORY, problems)
    made = Record(path.name, config, result if state == FINISHED else {}, history, state, str(path), path, problems)
    made.folds = [run_directory(fold) for fold in _fold_folders(path)]
    for fold in made.folds:
        fold.name = f"{made.name}/{fold.name}"
    if made.folds:
        return _folded(made)
    if unsound:
        made.notes.append(f"not ranked: its {unsound[0]} is no number, so its network's outputs are not")
    elif state == FINISHED and made.best is None:
        made.notes.append(
            "finished without a score (no val split)"
            if result.get("best") is None
            else f"its best {made.metric} is {result['best']}"
        )
    if state == UNFINISHED:
        made.notes.append("; ".join([progress(made), *filter(None, [result.get("not_finite")])]))
    return made


def _folded(made: Record) -> Record:
    """A run over all folds: its config, and its score over all rows when its own result.json does not say it."""
    done = [fold for fold in made.folds if fold.state == FINISHED]
    made.config = made.config or {key: value for key, value in made.folds[0].config.items() if key != "fold"}
    asked = made.config.get("folds") or len(made.folds)
    if made.best is not None or made.state == BROKEN:
        return made
    if len(done) < asked:
        made.notes.append(f"{len(done)} of {asked} folds finished")
        return made
    from experiments.comparison.row_scores import fold_score

    value = fold_score(made.files("oof.csv"), made.metric, made.config.get("task"))
    made.state = FINISHED
    if value is None:
        made.notes.append(f"no score over all rows: neither {RESULT} nor the folds' oof.csv give {made.metric}")
    else:
        made.result = {**made.result, "metric": made.metric, "overall": value, "finished": True}
    return made


def _gathered(records: list[Record]) -> list[Record]:
    """Runs of single folds (--folds K --fold I) that lie side by side become one run over all folds, or part of the one
    that merged them."""

    def identity(each: Record) -> str:
        return json.dumps(
            {key: value for key, value in each.knobs().items() if not of_place(key) and key != "fold"},
            sort_keys=True,
            default=str,
        )

    folded = [each for each in records if number(each.config.get("folds"))]
    sets: dict[str, list[Record]] = {}
    for each in folded:
        if number(each.config.get("fold")):
            sets.setdefault(identity(each), []).append(each)
    parents = {identity(each): each for each in folded if not number(each.config.get("fold"))}
    for key, folds in sets.items():
        folds.sort(key=lambda each: each.config["fold"])
        numbers, parent = [each.config["fold"] for each in folds], parents.get(key)
        if parent:
            parent.folds = sorted(parent.folds + folds, key=lambda each: each.config.get("fold", 0))
            records = [each for each in records if each not in folds]
        elif len(folds) > 1 and len({*numbers}) == len(folds):
            name = re.sub(rf"-?f(old)?{numbers[0]}(?![0-9.])", "", folds[0].name) or folds[0].name
            config = {knob: value for knob, value in folds[0].config.items() if knob != "fold"}
            made = _folded(
                Record(
                    name, config, {}, [], UNFINISHED, folds[0].source.removesuffix(folds[0].name) + name, folds=folds
                )
            )
            records = [made if each is folds[0] else each for each in records if each is folds[0] or each not in folds]
    return records


def _mapping(path: Path, load: Any, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"{path.name} cannot be read ({str(error).splitlines()[0]})")
        return {}
    if not isinstance(values, dict):
        problems.append(f"{path.name} is not a mapping of names to values")
        return {}
    return values


def _history(path: Path, problems: list[str]) -> list[dict[str, float]]:
    """As `read_history`, but without the rows that are not numbers, which are noted in `problems`."""
    if not path.is_file():
        return []
    rows = []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(line for line in file if line.endswith("\n")):
            try:
                rows.append({key: float(value) for key, value in row.items() if key and value not in ("", None)})
            except (TypeError, ValueError):
                problems.append(f"{path.name}: a row that is no numbers is left out")
    return [row for row in rows if "step" in row or "epoch" in row]


def _named_apart(records: list[Record]) -> list[Record]:
    """Put as much of their path as is needed before equal names."""
    for parts in range(1, 12):
        names = [each.name for each in records]
        twice = {name for name in names if names.count(name) > 1}
        if not twice:
            return records
        for record in records:
            if record.name in twice:
                _rename(record, "/".join(re.split(r"[/\\]", record.source)[-1 - parts :]))
    for place, record in enumerate(records):
        if [each.name for each in records].count(record.name) > 1:
            _rename(record, f"{record.name}#{place}")
    return records


def _rename(record: Record, name: str) -> None:
    record.notes = [
        *(note for note in record.notes if not note.startswith("another run is named")),
        f"another run is named {record.folder.name if record.folder else record.name.split('/')[-1]} too",
    ]
    record.name = name
    for fold in record.folds:
        fold.name = f"{name}/{fold.name.split('/')[-1]}"
