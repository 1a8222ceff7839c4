"""A run directory: its name, who may enter it, what it starts from, and its result. Only the launching process calls
this."""

import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from datamodules.loading.files import write_text
from datamodules.loading.image_check import only_skips_differ
from experiments.cli.errors import UsageError
from experiments.config import Config, plain

if TYPE_CHECKING:  # models imports torch
    from models.spec import Spec

CONFIG, RESULT = "config.yaml", "result.json"
OPTIMIZER = (
    "optimizer",
    "optimizer_args",
    "weight_decay",
    "layer_decay",
    "head_lr_scale",
    "freeze",
)  # what its saved state is the state of
PATHS = (
    "data_dir",
    "cache_dir",
    "init",
    "extend",
    "teacher",
    "teacher_init",
    "group",
    "metric",
    "augment",
)  # knobs that may name files
MOST_SHOWN = 8  # differences in one line
NAMED_APART = ("model", "data", "distill", "seed", "fold", "eval_only")  # stand in every name


def run_name(cfg: Config, recipe_alone: Config) -> str:
    """`<data>-<model>[-<distill>]-s<seed>[-f<fold>][-eval]` and what else differs from the recipe: up to two keys
    spelled out, more as six hex digits."""
    ours, theirs = (_for_name(each) for each in (cfg, recipe_alone))
    changes = {
        key: ours.get(key) for key in {**theirs, **ours} if key not in NAMED_APART and ours.get(key) != theirs.get(key)
    }
    if len(changes) > 2:
        tail = "-" + hashlib.sha256(json.dumps(changes, sort_keys=True, default=str).encode()).hexdigest()[:6]
    else:
        tail = "".join(f"-{key.split('.')[-1]}{_spelled(value)}" for key, value in sorted(changes.items()))
    of_fold = "" if cfg.fold is None else f"-f{cfg.fold}"
    return name_start(cfg) + f"{of_fold}{'-eval' * cfg.eval_only}{tail}".replace("/", "_").replace(" ", "")


def name_start(cfg: Config) -> str:
    """`<data>-<model>[-<distill>]-s<seed>`."""
    return f"{'-'.join(filter(None, (cfg.data, cfg.model, cfg.distill)))}-s{cfg.seed}".replace("/", "_").replace(
        " ", ""
    )


def _for_name(cfg: Config) -> dict[str, Any]:
    """Knobs that are part of the name, independent of the working folder: weights as absolute paths, the user's files
    by their base name."""
    flat = _spread(plain(cfg), "training", "numerics")
    flat |= {
        key: os.path.abspath(flat[key])
        for key in ("init", "extend", "teacher", "teacher_init")
        if flat.get(key) and os.path.exists(flat[key])
    }
    return flat | {
        key: os.path.basename(flat[key]) for key in ("group", "metric", "augment") if flat.get(key) and "." in flat[key]
    }


def placed(cfg: Config) -> Config:
    """The config with absolute paths, valid from any folder."""

    def whole(path: str) -> str:
        file, mark, function = path.rpartition(":") if ".py:" in path else (path, "", "")
        return os.path.abspath(file) + mark + function if os.path.exists(file) and path != "pretrained" else path

    given = {key: getattr(cfg, key) for key in PATHS if getattr(cfg, key)}
    found: dict[str, Any] = {
        key: ",".join(whole(part.strip()) for part in path.split(",")) if key == "teacher" else whole(path)
        for key, path in given.items()
    }
    found |= {key: os.path.abspath(given[key]) for key in ("data_dir", "cache_dir") if key in given}
    return replace(cfg, **found)


def look(cfg: Config, identity: dict[str, Any]) -> bool:
    """Whether the run has finished, without writing. Raises UsageError for a directory of another run."""
    folder = cfg.folder
    _check_free(folder)
    if cfg.overwrite or not (folder / CONFIG).is_file():
        return False
    _check_same(folder, cfg)
    before = result(folder)
    if before.get("finished"):
        _check_same_data(folder, before, identity)
    return bool(before.get("finished"))


def enter(cfg: Config, spec: "Spec", identity: dict[str, Any]) -> tuple[Path, str | None, bool]:
    """Create or re-enter the run directory. Returns (directory, checkpoint to resume from or None, already finished).

    `spec` and `identity` are the data's as they are now. Raises UsageError when the directory belongs to a run with
    other training values or other data, is not writable, has no readable checkpoint left, or is no run directory.
    """
    folder = cfg.folder
    finished, gone = look(cfg, identity), None if cfg.overwrite else _gone(stored(folder), cfg, folder)
    if gone:
        print(
            f"data folder {gone} of {folder} is gone, and {cfg.data_dir} is taken: it must hold the same files and "
            f"classes"
        )
    if finished:
        return folder, None, True
    start = None if cfg.overwrite else resume_point(folder, cfg)
    if start:
        _check_fits(start, cfg, spec, identity)
    try:
        if cfg.overwrite and folder.exists():
            remove(folder)
        _prepare(folder, cfg, start)
    except OSError as error:
        raise UsageError(
            f"the run directory {folder} cannot be written: {error.strerror or error}; --runs_dir names another place"
        ) from None
    if not start:
        return folder, None, False
    for note in start.notes:
        print(note)
    return folder, str(start.file), False


def _prepare(folder: Path, cfg: Config, start: "Start | None") -> None:
    """Write what training needs; a problem with the disk shows here and not after the first epoch. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    before = stored(folder)
    if not before or before.get("data_dir") != cfg.data_dir:
        write_text(folder / CONFIG, yaml.safe_dump({**plain(cfg), **before, "data_dir": cfg.data_dir}, sort_keys=False))
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    for place in (folder, checkpoints):
        for left in place.glob(".*.partial"):  # of a run killed while it wrote
            left.unlink()
        write_text(place / ".probe", "can be written")
        (place / ".probe").unlink()
    if "not_finite" in result(folder):
        (folder / RESULT).unlink()  # it goes on, and may end otherwise
    for damaged in start.damaged if start else ():
        if damaged.parent == checkpoints:
            os.replace(
                damaged, damaged.with_name(f"damaged-{damaged.name}")
            )  # else it would push out the whole one at the next save


def remove(folder: Path) -> None:
    """Delete a run atomically: a kill in between leaves no partial directory under its name."""
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def stored(folder: Path) -> dict[str, Any]:
    """The config of an existing run directory; {} where there is none."""
    return yaml.safe_load((folder / CONFIG).read_text()) if (folder / CONFIG).is_file() else {}


@dataclass(frozen=True)
class Start:
    """A checkpoint to resume from.

    Args:
        content: as read. notes: lines to print. damaged: files found damaged on the way.
    """

    file: Path
    content: dict[str, Any]
    notes: list[str]
    damaged: list[Path]


def resume_point(folder: Path, cfg: Config) -> Start | None:
    """The full state a run goes on from. Where weights come from, first that is there: 1. its own last.ckpt (a killed
    run goes on), or the one before when that is damaged 2. --resume or --extend (another run's full state) 3. --init
    (weights only, loaded into the model before)
    4. scratch.

    Raises UsageError when there are checkpoints and none can be read: nothing starts from scratch over a run.
    """
    from models import pretrained  # imports torch, which the name of a run does without

    own = [folder / "checkpoints" / name for name in pretrained.LAST]
    if any(file.is_file() for file in own):
        return _first_whole(
            own,
            f"{folder} is the run's directory and none of its checkpoints can be read, so nothing is started over it. "
            "Put a whole copy of last.ckpt there, or start again with --overwrite, or beside it with --name"
            + _best_instead(folder),
        )
    flag, source = ("resume", cfg.resume) if cfg.resume else ("extend", cfg.extend)
    if not source:
        return None
    pretrained.check_local(source)
    path = Path(source)
    files = [path / "checkpoints" / name for name in pretrained.LAST] if path.is_dir() else [path]
    if not any(file.is_file() for file in files):
        raise UsageError(f"--{flag} {path}: there is no checkpoint {files[0]}")
    return _first_whole(files, f"--{flag} {path}: no checkpoint can be read")


def _first_whole(files: list[Path], refusal: str) -> Start:
    from models import pretrained  # imports torch, which the name of a run does without

    problems, damaged = [], []
    for file in files:
        if not file.is_file():
            problems.append(f"{file} is not there")
            continue
        try:
            content = pretrained.read_checkpoint(file, mapped=True)
            pretrained.check_finite(content.get("state_dict", {}) if isinstance(content, dict) else {}, file)
        except ValueError as error:
            problems.append(str(error))
            damaged.append(file)
            continue
        step = content.get("global_step") if isinstance(content, dict) else None
        return Start(
            file, content, [f"{problem}; going on from {file.name}, step {step}" for problem in problems], damaged
        )
    raise UsageError("\n".join([refusal, *problems]))


def _best_instead(folder: Path) -> str:
    from models import pretrained  # imports torch, which the name of a run does without

    best = folder / "checkpoints" / "best.ckpt"
    return f" and --resume {best}" if best.is_file() and pretrained.intact(best) else ""


def _check_fits(start: Start, cfg: Config, spec: "Spec", identity: dict[str, Any]) -> None:
    """Refuse a state of another model or other data; another number of processes is a note. Raises UsageError."""
    content = start.content
    if not isinstance(content, dict) or not {"config", "spec", "DataModule", "loops"} <= content.keys():
        raise UsageError(f"{start.file} is not the state of a vitlab run; weights alone go to --init")
    there, here = content["config"], plain(cfg)
    changes = [
        f"{key} {there.get(key)} -> {here[key]}" for key in ("model", "model_args") if there.get(key) != here[key]
    ]
    changes += [
        f"{key} {there[key]} -> {here[key]}"
        for key in OPTIMIZER
        if not cfg.eval_only and there.get(key, here[key]) != here[key]
    ]
    changes += [f"image_size {content['spec']['image_size']} -> {spec['image_size']}"] * (
        content["spec"]["image_size"] != spec["image_size"]
    )
    classes, now = (each["class_names"] or each["target_names"] or [] for each in (content["spec"], spec))
    if classes != now:
        gone, new = sorted({*classes} - {*now}), sorted({*now} - {*classes})
        changes.append(
            f"{len(classes)} classes -> {len(now)}"
            + f", gone: {', '.join(gone[:5])}" * bool(gone)
            + f", new: {', '.join(new[:5])}" * bool(new)
            + ", in another order" * (not gone and not new)
        )
    if not cfg.eval_only:
        changes += _other_data(content["DataModule"], identity)
        start.notes.extend(_other_skips(content["DataModule"], identity))
        changes += ["the teacher cache: its content is another"] * (
            content.get("teacher_digest") != identity.get("teacher_digest")
        )
    if changes:
        raise UsageError(
            f"{start.file} cannot go on here, it was saved with other values or data:\n  "
            + "\n  ".join(changes)
            + "\nPut back what was there, or start another run with --name"
            + (" (--init takes the weights alone)" if cfg.resume else ", or this one again with --overwrite")
        )
    before, world = content["DataModule"].get("world_size"), cfg.devices * cfg.num_nodes
    if before not in (None, world) and not cfg.eval_only:
        start.notes.append(
            f"saved by {before} process{'es' * (before > 1)}, going on with {world} at the same sample (dropout, drop "
            f"path "
            "and mixing draw anew, so the weights are no longer those of a run on one number of processes)"
        )


def _other_data(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences between the identities of two data sets, one line each."""
    changes = [
        f"{key} {before.get(key)} -> {now.get(key)}"
        for key in ("seed", "global_batch_size", "repeated_augment", "augment")
        if before.get(key, now.get(key)) != now.get(key)
    ]
    if before.get("fingerprint") == now["fingerprint"] or only_skips_differ(before, now):
        return changes
    changes += _sizes(before, now)
    changes.append(
        f"the files or their classes (fingerprint {str(before.get('fingerprint'))[:12]} -> {now['fingerprint'][:12]})"
    )
    return changes + _other_folders(before.get("folders", {}), now.get("folders", {}))


def _sizes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    there = before.get("sizes", now["sizes"])
    return [
        f"{split}: {there.get(split)} samples -> {number}"
        for split, number in now["sizes"].items()
        if there.get(split) != number
    ]


def _other_folders(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """The class folders that have changed, with a hint where images are missing."""
    if not before:
        return []
    counts = [{name: int(text.split()[0]) for name, text in each.items()} for each in (before, now)]
    changed = [
        name for name in sorted(before.keys() & now.keys()) if before[name] != now[name]
    ]  # classes that are new or gone are listed separately
    lines = [
        f"{name}: {counts[0][name]} pictures -> {counts[1][name]}"
        + ", of other names" * (counts[0][name] == counts[1][name])
        for name in changed[:5]
    ]
    lines += [f"and {len(changed) - 5} more folders"] * (len(changed) > 5)
    gone = any(counts[0][name] > counts[1][name] for name in changed)
    return ["; ".join(lines)] * bool(lines) + [
        "an empty file in the place of a picture that is gone, and --bad_images skip, go on without it"
    ] * gone


def _other_skips(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A note on images whose readability has changed."""
    if before.get("fingerprint") == now["fingerprint"] or not only_skips_differ(before, now):
        return []
    return [
        f"other pictures than before cannot be read ({'; '.join(_sizes(before, now))}): going on at the same step, in "
        f"another order"
    ]


def _check_same_data(folder: Path, result: dict[str, Any], identity: dict[str, Any]) -> None:
    before = result.get("data_fingerprint")
    if before not in (None, identity["fingerprint"]):
        raise UsageError(
            f"{folder} is finished, and the files or their classes have changed since (fingerprint {before[:12]} -> "
            f"{identity['fingerprint'][:12]}): --name another run, or --overwrite it"
        )


def _check_free(folder: Path) -> None:
    others = [file for file in folder.iterdir() if not file.name.endswith(".partial")] if folder.is_dir() else []
    if others and not (folder / CONFIG).is_file() or folder.is_file():
        raise UsageError(f"{folder} exists and is not a run directory (no {CONFIG}): --name or --runs_dir another")


def differences(folder: Path, cfg: Config) -> list[str]:
    """`key before -> now` of the training values and places that a run directory's config has otherwise. Knobs that it
    does not have stood at their defaults; paths are compared as places, and a data folder that is gone may be another
    one now (its content is compared elsewhere)."""
    before = stored(folder)
    there, here = _spread(plain(Config()) | before, "training", "where"), flat(cfg, "training", "where")
    same = {
        key
        for key in PATHS
        if _same_place(there.get(key), here.get(key), folder) or key == "data_dir" and _gone(before, cfg, folder)
    }
    return [
        f"{key} {there.get(key)} -> {here.get(key)}"
        for key in {**there, **here}
        if key not in same and there.get(key) != here.get(key)
    ]


def _same_place(before: str | None, now: str | None, folder: Path) -> bool:
    """Whether two values are the same files; a relative one was meant from here, or from a folder around the run's."""
    if not before or not now:
        return before == now

    def same(one: str, other: str) -> bool:
        (file, _, function), (their, _, theirs) = (
            each.rpartition(":") if ".py:" in each else (each, "", "") for each in (one, other)
        )
        return (
            function == theirs
            and os.path.exists(their)
            and any(os.path.samefile(place, their) for place in _places(file, folder))
        )

    parts, others = ([part.strip() for part in each.split(",")] for each in (before, now))
    return same(before, now) or len(parts) == len(others) > 1 and all(map(same, parts, others))


def _places(path: str, folder: Path) -> list[Path]:
    """The existing places that a stored path may mean."""
    places = [Path(path), *(parent / path for parent in folder.absolute().parents[:3])]
    return [place for place in places if place.exists()]


def _gone(before: dict[str, Any], cfg: Config, folder: Path) -> str | None:
    """The data folder of the stored run, if it no longer exists and another one is given."""
    path = before.get("data_dir")
    return path if path and cfg.data_dir and os.path.isdir(cfg.data_dir) and not _places(path, folder) else None


def _check_same(folder: Path, cfg: Config) -> None:
    changes = differences(folder, cfg)
    if not changes:
        return
    recipe = stored(folder).get("recipe")
    more = [f"recipe {recipe} -> {cfg.recipe}"] * (recipe != cfg.recipe)
    shown = ", ".join([*more, *changes[:MOST_SHOWN]]) + f" and {len(changes) - MOST_SHOWN} more" * (
        len(changes) > MOST_SHOWN
    )
    moved = any(each.startswith("data_dir ") for each in changes)
    ends = [os.path.basename(os.path.abspath(cfg.data_dir))] if cfg.data_dir and moved else []
    ends += [str(cfg.recipe)] * bool(more)
    other = f"{cfg.name}-{'-'.join(ends)}".replace(" ", "_") if ends else "another"
    longer = result(folder).get("finished") and cfg.epochs > stored(folder).get("epochs", cfg.epochs)
    raise UsageError(
        f"{folder} is a run with other values ({shown}): --name {other}, or --overwrite it"
        + f". To train longer what is finished: --extend {folder} --name other goes on with its state, --init "
        f"{folder} --name other "
        "starts anew from its weights" * bool(longer)
    )


def flat(cfg: Config, *roles: str) -> dict[str, Any]:
    """Knobs of these roles, dictionaries spread out, in plain values that survive YAML; paths are absolute."""
    return _spread(plain(placed(cfg)), *roles)


def _spread(values: dict[str, Any], *roles: str) -> dict[str, Any]:
    """Knobs of these roles, dictionaries spread out, in plain values that survive YAML."""
    flat: dict[str, Any] = {}
    for knob in fields(Config):
        if knob.metadata["role"] in roles and knob.name in values:
            value = values[knob.name]
            flat |= (
                {f"{knob.name}.{key}": inner for key, inner in value.items()}
                if isinstance(value, dict)
                else {knob.name: value}
            )
    return flat


def _spelled(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str) and os.path.isabs(value):  # weights: the run's name or the file's, and which of that name
        path = Path(value)
        name = path.parents[1].name if path.parent.name == "checkpoints" else path.name
        return f"{name}-{hashlib.sha256(value.encode()).hexdigest()[:6]}"
    return "x".join(map(_spelled, value)) if isinstance(value, list) else str(value)


def result(folder: Path) -> dict[str, Any]:
    """The content of result.json; {} where there is none."""
    return json.loads((folder / RESULT).read_text()) if (folder / RESULT).is_file() else {}


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write result.json, with null for NaN and infinity, which JSON lacks."""
    result = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in result.items()
    }
    write_text(folder / RESULT, json.dumps(result, indent=1) + "\n")


def write_skipped(folder: Path, skipped: Any) -> None:
    """Write skipped.csv from a DataFrame of skipped images; nothing for none."""
    if skipped is not None and len(skipped):
        write_text(folder / "skipped.csv", skipped.to_csv(index=False))


def commit() -> str | None:
    """The git commit of this code, with `+` when files differ from it; of an installed copy the one that pip took it
    from, None where no commit is known. A checkout around the installed copy is somebody else's."""
    import subprocess

    home = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(home), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() == home:
            return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    installed = json.loads(_metadata("direct_url.json") or "{}")  # PEP 610
    return installed.get("vcs_info", {}).get("commit_id", "")[:12] or None


def version() -> str | None:
    """The version of vitlab that is installed; None where it runs from a checkout that is not."""
    try:
        return metadata.version("vitlab")
    except metadata.PackageNotFoundError:
        return None


def _metadata(file: str) -> str | None:
    try:
        return metadata.distribution("vitlab").read_text(file)
    except metadata.PackageNotFoundError:
        return None
