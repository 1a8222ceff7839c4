"""A run directory: its name, who may enter it, what it starts from, and its result. Only the launching process calls this."""
import hashlib
import json
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from experiments.config import Config, UsageError, plain

CONFIG, RESULT = "config.yaml", "result.json"
NAMED_APART = ("model", "data", "seed", "eval_only")  # stand in every name


def run_name(cfg: Config, recipe_alone: Config) -> str:
    """`<data>-<model>-s<seed>[-eval]` and what else differs from the recipe: up to two keys spelled out, more as six hex digits."""
    ours, theirs = _flat(cfg, "training", "numerics"), _flat(recipe_alone, "training", "numerics")
    apart = {key: ours.get(key) for key in {**theirs, **ours} if key not in NAMED_APART and ours.get(key) != theirs.get(key)}
    if len(apart) > 2:
        tail = "-" + hashlib.sha256(json.dumps(apart, sort_keys=True, default=str).encode()).hexdigest()[:6]
    else:
        tail = "".join(f"-{key.split('.')[-1]}{_spelled(value)}" for key, value in sorted(apart.items()))
    return f"{cfg.data}-{cfg.model}-s{cfg.seed}{'-eval' * cfg.eval_only}{tail}".replace("/", "_").replace(" ", "")


def enter(cfg: Config) -> tuple[Path, str | None, bool]:
    """Make or re-enter the run's directory. Returns (directory, checkpoint to resume from or None, already finished).

    Raises UsageError when the directory belongs to a run with other training values, or is something else altogether.
    """
    folder = Path(cfg.runs_dir) / cfg.name
    _check_free(folder)
    if cfg.resume:
        resume_file(cfg.resume)
    if cfg.overwrite and folder.exists():
        shutil.rmtree(folder)
    if (folder / CONFIG).is_file():
        _check_same(folder, cfg)
        if (folder / RESULT).is_file() and json.loads((folder / RESULT).read_text()).get("finished"):
            return folder, None, True
    else:
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"the run directory {folder} cannot be made: {error.strerror}; --runs_dir names another place") from None
        write_text(folder / CONFIG, yaml.safe_dump(plain(cfg), sort_keys=False))
    return folder, resume_point(folder, cfg), False


def stored(folder: Path) -> dict[str, Any]:
    """The config of an existing run directory; {} where there is none."""
    return yaml.safe_load((folder / CONFIG).read_text()) if (folder / CONFIG).is_file() else {}


def resume_point(folder: Path, cfg: Config) -> str | None:
    """The full state a run goes on from. Where weights come from, first that is there: 1. its own last.ckpt (a killed run goes on)
    2. --resume (another run's full state) 3. --init (weights only, loaded into the model before) 4. scratch."""
    own = folder / "checkpoints" / "last.ckpt"
    if own.is_file():
        return str(own)
    return str(resume_file(cfg.resume)) if cfg.resume else None


def resume_file(path: str) -> Path:
    """The checkpoint that --resume names: a file, or the last one of a run directory. Raises UsageError."""
    file = Path(path) / "checkpoints" / "last.ckpt" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UsageError(f"--resume {path}: there is no checkpoint {file}")
    return file


def _check_free(folder: Path) -> None:
    if folder.is_dir() and not (folder / CONFIG).is_file() and any(folder.iterdir()) or folder.is_file():
        raise UsageError(f"{folder} exists and is not a run directory (no {CONFIG}): --name or --runs_dir another")


def _check_same(folder: Path, cfg: Config) -> None:
    there = _flat(Config(**{key: _tupled(value) for key, value in stored(folder).items()}), "training", "where")
    here = _flat(cfg, "training", "where")
    apart = [f"{key} {there.get(key)} -> {here.get(key)}" for key in {**there, **here} if there.get(key) != here.get(key)]
    if apart:
        raise UsageError(f"{folder} is a run with other values ({', '.join(apart)}): --name another, or --overwrite it")


def _flat(cfg: Config, *roles: str) -> dict[str, Any]:
    """Knobs of these roles, dictionaries spread out, in plain values that survive YAML."""
    flat: dict[str, Any] = {}
    for knob in fields(Config):
        if knob.metadata["role"] in roles:
            value = getattr(cfg, knob.name)
            spread = {f"{knob.name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {knob.name: value}
            flat |= {key: list(inner) if isinstance(inner, tuple) else inner for key, inner in spread.items()}
    if flat.get("data_dir"):
        flat["data_dir"] = os.path.abspath(flat["data_dir"])
    return flat


def _spelled(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "x".join(map(_spelled, value)) if isinstance(value, list) else Path(str(value)).name


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def write_result(folder: Path, result: dict[str, Any]) -> None:
    write_text(folder / RESULT, json.dumps(result, indent=1) + "\n")


def commit() -> str | None:
    """The git commit of this code, with `+` when files differ from it; None outside a checkout."""
    import subprocess
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=True).stdout.strip()
    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
