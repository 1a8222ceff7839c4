"""Weight files: reading the common ones safely, starting a network from one, loading a trained network."""

import argparse
import copy
import hashlib
import json
import os
import pathlib
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from models import transfer
from models.registry import REGISTRY, build, preprocessing
from models.spec import Spec
from models.transfer import About, fit, head_keys, some, start_small_

__all__ = ["fit", "head_keys", "start_small_"]  # of transfer.py, beside what stands here

# where trainers keep the weights inside a checkpoint
EMA, RAW = ("ema_state_dict", "state_dict_ema", "model_ema"), ("state_dict", "model")
SUFFIXES = (".ckpt", ".pth", ".pt", ".bin", ".safetensors", ".tar")
# What the trainers of timm, DeiT, MAE and ConvNeXt keep beside tensors and plain data: their command line, paths,
# NumPy's numbers. Making any
# of these runs no code of the file's.
SCALAR = np.float64(0).__reduce__()[0]  # what NumPy makes a number of; NumPy 1 and 2 write it under other names
PLAIN_TYPES: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    np.dtype,
    (SCALAR, "numpy.core.multiarray.scalar"),
    (SCALAR, "numpy._core.multiarray.scalar"),
    *{type(np.dtype(kind)) for kind in "?bhilBHILefd"},
]
AVERAGED, BEST = "averaged.ckpt", "best.ckpt"  # of a run directory: the mean of several epochs, and the best epoch
LAST = ("last.ckpt", "last-1.ckpt")  # of a run directory: the last step saved, and the one saved before
FILES = (AVERAGED, BEST, *LAST)  # whose weights a run directory stands for, the first that is there
SEAL = (
    b"sha256:"  # our checkpoints end in this and 64 hex digits: the comment of the zip archive that torch.save writes
)


def checkpoint_in(path: str | Path, names: tuple[str, ...] = FILES) -> Path:
    """The file of weights that a path names: itself, or of a run directory the averaged checkpoint, else the best, else
    the last (the first of `names`). Raises FileNotFoundError."""
    check_local(path)
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"no weights at {path}")
        return path
    for name in names:
        if (path / "checkpoints" / name).is_file():
            return path / "checkpoints" / name
    if (path / "fold0").is_dir():
        raise FileNotFoundError(
            f"{path} is a run over folds and has no weights of its own: name one of them, as {path / 'fold0'}"
        )
    raise FileNotFoundError(
        f"{path} is not a run with weights: there is no checkpoints/best.ckpt or checkpoints/last.ckpt in it"
    )


def check_local(path: str | Path) -> None:
    """Raises ValueError for an address: what is read from the network could be anyone's."""
    if re.match(r"[A-Za-z][\w+.-]+:/", str(path)):  # a Path has made one slash of two
        raise ValueError(
            f"{path}: weights and checkpoints are read from files only, never from the network; download it, look "
            f"where it "
            "comes from, and give the file"
        )


def intact(path: Path) -> bool:
    """Whether a file with a seal is, byte for byte, what was written; a file without one passes."""
    length = 2 + len(SEAL) + 64  # of the archive's last field, two bytes of length and the comment
    with open(path, "rb") as file:
        left = file.seek(0, os.SEEK_END) - length
        file.seek(max(0, left))
        tail = file.read()
        if not tail[2:].startswith(SEAL):
            return True
        digest = hashlib.sha256()
        file.seek(0)
        while left:
            digest.update(chunk := file.read(min(left, 2**20)))
            left -= len(chunk)
        digest.update(b"\0\0")  # the length before there was a comment
    return digest.hexdigest().encode() == tail[2 + len(SEAL) :]


def read_checkpoint(path: str | Path, *, mapped: bool = False) -> dict[str, Any]:
    """The content of a .safetensors, .pth, .pt, .bin or .ckpt file, loaded with weights_only=True. Raises ValueError
    when it is not one, or not as it was written. `mapped` leaves the tensors on disk until they are used, for one of
    our checkpoints."""
    check_local(path)
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if intact(path):
            with torch.serialization.safe_globals(PLAIN_TYPES):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a readable file of weights: {_line(error)}") from None
    # torch's restricted unpickler raises pickle.UnpicklingError and others, with advice to load it unsafely
    except Exception as error:
        raise ValueError(_refusal(path, error)) from None
    raise ValueError(f"{path} is damaged: its sha256 is not the one it was written with")


def _refusal(path: Path, error: Exception) -> str:
    """The reason that torch's restricted unpickler refuses a file: the type it found, and the remedy."""
    found = re.search(r"GLOBAL ([\w.]+)|got <class '([\w.]+)'>", str(error))
    kind = f"an object of the type {found[1] or found[2]}" if found else "something else than tensors and plain data"
    return (
        f"{path} is no file of weights, or holds {kind}, and is not loaded (it could run code). Where you trust it, "
        f"save its weights "
        "alone: torch.save(torch.load(FILE, weights_only=False)[KEY], 'weights.pth'), KEY as model or state_dict"
    )


def not_finite(state: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity; one look at the device."""
    names = [
        name
        for name, value in state.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.element_size() > 1
    ]
    if get_total_norm([state[name] for name in names]).isfinite():
        return []  # a tenth of the time; where large numbers overflow the norm, the tensors are looked at
    marks = torch.stack([state[name].isfinite().all().to(state[names[0]].device) for name in names])
    return [name for name, sound in zip(names, marks.tolist()) if not sound]


def check_finite(state: dict[str, Tensor], file: str | Path) -> None:
    """Raises ValueError for weights that hold NaN or infinity."""
    if names := not_finite(state):
        raise ValueError(
            f"{file}: {len(names)} of {len(state)} tensors hold NaN or infinity (the first is {names[0]}): its "
            f"training has failed, and "
            "nothing can be made of it"
        )


def read_weights(path: str | Path, use_ema: bool | None = None) -> dict[str, Tensor]:
    """Names -> tensors of a file or run directory, unwrapped from the trainer's dict; of one of our checkpoints the
    network's own.

    use_ema: as for `load`. Raises ValueError when the file has no such weights.
    """
    file = checkpoint_in(path)
    content = _content(file)
    ours = isinstance(content, dict) and {"state_dict", "config", "spec"} <= content.keys()
    state = network_state(content, use_ema, file) if ours else _chosen(content, use_ema, file)
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)} if isinstance(state, dict) else {}
    if not state:
        raise ValueError(f"{path} holds no tensors by name")
    check_finite(state, file)
    return state


def published_name(name: str, tag: str | None = None) -> str:
    """timm's full name, `architecture.tag`, of the weights it publishes for a model; without a tag its default ones.

    Raises ValueError.
    """
    arch = name[len("timm/") :] if name.startswith("timm/") else REGISTRY[name].timm
    if arch is None:
        raise ValueError(f"there are no published weights for {name}" + (f", and no file or run {tag}" if tag else ""))
    bare = arch.split(".")[0]
    arch = f"{bare}.{tag}" if tag else arch
    tags = sorted(full.partition(".")[2] for full in timm.list_pretrained(f"{bare}.*"))
    if not tags or "." in arch and arch.partition(".")[2] not in tags:
        raise ValueError(f"timm has no weights {arch!r}; its tags for this model are {', '.join(tags) or 'none'}")
    return arch if "." in arch else f"{bare}.{_published_cfg(arch).tag}"


def _published_cfg(arch: str) -> Any:
    return timm.get_pretrained_cfg(arch)


def published_weights(name: str, tag: str | None = None) -> dict[str, Tensor]:
    """The weights timm publishes for a model, in the tag's version or the default one (downloaded, or from the hub's
    cache).

    Raises ValueError when timm has no such weights or they cannot be fetched.
    """
    arch = published_name(name, tag)
    try:
        return timm.create_model(arch, pretrained=True).state_dict()
    except Exception as error:
        raise ValueError(
            f"the weights {arch} could not be fetched ({type(error).__name__}: {_line(error)[:120]}); "
            "without internet give a file: --init PATH"
        ) from None


WORDS = {
    "in1k": "ImageNet-1k",
    "in12k": "ImageNet-12k",
    "in21k": "ImageNet-21k",
    "in22k": "ImageNet-22k",
    "in22ft1k": "ImageNet-22k, then ImageNet-1k",
}


def trained_on(tag: str) -> str:
    """The training data that timm's tag names, as `ImageNet-22k, then ImageNet-1k` of `ms_in22k_ft_in1k`; ""
    where they do not."""
    known = [WORDS[word] for word in tag.split("_") if word in WORDS]
    others = re.search(r"(laion|openai|dfn|metaclip|webli|lvd|merged|datacomp|cc12m|yfcc|ig1b|swag|swsl|ssl)[^_]*", tag)
    return ", then ".join([*([others[0]] if others else []), *known])


def about(source: str, name: str) -> dict[str, Any]:
    """`config` (model, model_args) and `spec` (image size, normalisation, classes) of what `--init` names: one of our
    files, or weights that timm publishes for the model `name`; {} for a file without them.

    Raises ValueError or FileNotFoundError.
    """
    if not is_published(source):
        return read_about(source)
    arch = published_name(name, None if source == "pretrained" else source)
    prepared = preprocessing(f"timm/{arch}")
    spec = {"num_outputs": _published_cfg(arch).num_classes, **prepared}
    return {"config": {"model": f"timm/{arch}", "model_args": {}}, "spec": spec}


def is_published(source: str) -> bool:
    """Whether `--init` names weights of timm's (`pretrained`, a tag) and no file or run."""
    return source == "pretrained" or not Path(source).exists() and _looks_like_tag(source)


def saved_network(known: dict[str, Any], factor: int = 1) -> nn.Module | None:
    """The network that weights are of, on the meta device, at its image size times `factor`; None where it is not known
    or cannot be built."""
    if not known:
        return None
    config, spec = known["config"], known["spec"]
    side = tuple(factor * each for each in spec["image_size"])
    try:
        with torch.device("meta"):
            return _network_of(config, spec, side)
    except (ValueError, KeyError, AssertionError):  # a model that is no longer registered, or takes one size only
        return None


def initialise(
    model: nn.Module,
    source: str,
    *,
    name: str,
    spec: Spec | None = None,
    reset_head: bool = False,
    partial: bool = False,
    whole: bool = False,
    use_ema: bool | None = None,
) -> str:
    """Load `--init` into a network: `pretrained`, a file, a run directory, or one of timm's tags. Returns a line on
    what was loaded.

    Unexpected tensors are reported in the line; tensors that depend on the image size are resized, from the size that
    the file's specification has. Rows of the head are taken by the names of classes or targets, where the file and
    `spec`, the data's, have them; with `reset_head` another head starts fresh. A head of another size raises ValueError
    unless `reset_head`, which published weights imply; so does any other misfit, tensors missing beside the head unless
    `partial`, and with `whole`, as for an evaluation, a tensor left at its fresh values. `use_ema` chooses among the
    weights of a file, as for `load`.
    """
    published, known = is_published(source), about(source, name)
    arch = known["config"]["model"].removeprefix("timm/") if published else ""
    weights = published_weights(f"timm/{arch}") if published else read_weights(source, use_ema)
    saved, reset_head = saved_network(known), reset_head or published
    weights, notes = fit(model, weights, source, saved)
    own, heads = model.state_dict(), head_keys(model)
    if saved is not None and name.startswith("timm/") and (larger := saved_network(known, 2)) is not None:
        transfer.check_resized(weights, saved, larger, own, source)
    theirs, ours = (None, None) if whole else (known.get("spec"), spec)
    weights, head_notes = _with_head(model, weights, source, theirs or {}, ours or {}, reset_head)
    missing, unexpected = [key for key in own if key not in weights], [key for key in weights if key not in own]
    if whole and missing:
        raise ValueError(
            f"--init {source} leaves {some(missing)} untrained: there is nothing to evaluate"
            + "; its head is of other classes than the data's" * (set(missing) <= heads)
        )
    if not partial:
        transfer.check_whole([key for key in missing if key not in heads], unexpected, own, source)
    model.load_state_dict(weights, strict=False)
    notes += [*head_notes, *[f"missing: {some(missing)}"] * bool(missing)]
    notes += [f"unexpected: {some(unexpected)}"] * bool(unexpected)
    training = trained_on(arch.partition(".")[2])
    origin = f" ({arch}{', trained on ' * bool(training)}{training})" if published else ""
    return "; ".join([f"init {source}{origin}: {len(weights) - len(unexpected)} of {len(own)} tensors", *notes])


def _with_head(
    model: nn.Module, weights: dict[str, Tensor], source: str, theirs: About, ours: About, reset: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights with a head that fits, its rows by name or left out for a fresh one, and notes. Raises ValueError for
    any misfit."""
    own, heads = model.state_dict(), head_keys(model)

    def wrong() -> list[str]:
        return sorted(key for key in weights.keys() & own.keys() if weights[key].shape != own[key].shape)

    if beside := [key for key in wrong() if key not in heads]:  # before the head: another width makes both misfit
        key = beside[0]
        raise ValueError(
            f"--init {source}: {len(beside)} tensors have another shape, the first is {key} "
            f"{tuple(weights[key].shape)} for {tuple(own[key].shape)}; is it another model or patch size?"
        )
    if reset and (wrong() or transfer.outputs(theirs) and transfer.outputs(ours) not in ([], transfer.outputs(theirs))):
        count = len(weights[(wrong() or sorted(heads & weights.keys()))[-1]])
        start_small_({key: own[key] for key in heads})
        note = f"head of {count} outputs left out, a fresh one of {len(own[sorted(heads)[-1]])} starts"
        return {key: value for key, value in weights.items() if key not in heads}, [note]
    weights, notes = transfer.fit_head(model, weights, theirs, ours)
    if misfits := wrong():
        key = misfits[-1]
        raise ValueError(
            f"--init {source}: its head is {tuple(weights[key].shape)} and the model's {tuple(own[key].shape)} "
            f"({key}); --init_head reset starts a fresh one"
        )
    return weights, notes


def _looks_like_tag(source: str) -> bool:
    return not any(mark in source for mark in ("/", "\\")) and Path(source).suffix not in SUFFIXES


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_about(path: str | Path) -> dict[str, Any]:
    """`config`, `spec` and the `fingerprint` of its data (None where it was not kept) of one of our checkpoints or
    exported files; {} for other weights."""
    file = checkpoint_in(path)
    stat = file.stat()
    return copy.deepcopy(_read_about(file, stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=8)  # a launch asks several times, and the seal of a large file takes seconds to check
def _read_about(file: Path, mtime_ns: int, size: int) -> dict[str, Any]:
    content = _exported(file) if file.suffix == ".safetensors" else read_checkpoint(file)
    known = isinstance(content, dict) and all(isinstance(content.get(key), dict) for key in ("config", "spec"))
    if not known:
        return {}
    fingerprint = content.get("fingerprint") or (content.get("DataModule") or {}).get("fingerprint")
    return {"config": content["config"], "spec": content["spec"], "fingerprint": fingerprint}


def _exported(file: Path) -> dict[str, Any]:
    """The metadata that experiments/export.py writes: config, spec, use_ema, source; {} for any other file."""
    try:
        with safe_open(file, "pt") as content:
            return json.loads((content.metadata() or {}).get("vitlab", "{}"))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a readable file of weights: {_line(error)}") from None


def _content(file: Path) -> Any:
    """A file's content, that of an exported file as a checkpoint's."""
    content = read_checkpoint(file)
    return {"state_dict": content} | _exported(file) if file.suffix == ".safetensors" else content


def _chosen(content: Any, use_ema: bool | None, file: Path) -> Any:
    """The weights inside a file's content, with the names they have there. A file of one kind (exported, averaged.ckpt)
    says which."""
    if not isinstance(content, dict):
        return content
    averaged, one_kind = chooses_ema(content, use_ema), isinstance(content.get("use_ema"), bool)
    if one_kind and use_ema not in (None, averaged):
        raise ValueError(f"{file} holds the {'averaged' if averaged else 'raw'} weights only")
    if use_ema and not averaged:
        raise ValueError(f"{file} keeps no averaged weights (EMA)")
    return next(
        (content[key] for key in (EMA if averaged and not one_kind else RAW) if isinstance(content.get(key), dict)),
        content,
    )


def chooses_ema(content: dict[str, Any], use_ema: bool | None) -> bool:
    """Whether it is the averaged weights (EMA) that `use_ema` takes out of a checkpoint. None: as its run did, else
    where they are kept."""
    if isinstance(content.get("use_ema"), bool):
        return content["use_ema"]
    wanted = (content.get("config") or {}).get("use_ema") if use_ema is None else use_ema
    return wanted is not False and any(isinstance(content.get(key), dict) for key in EMA)


def load(path: str | Path, use_ema: bool | None = None) -> tuple[nn.Module, Spec]:
    """The trained network of one of our checkpoints, run directories or exported files, in evaluation mode, and its
    data specification.

    use_ema: True the averaged weights (EMA), False the raw ones, None those that the run has chosen and tested: the
    averaged ones where it kept them, but for `--use_ema false`. The mean of several epochs (averaged.ckpt) is of one
    kind only. Raises FileNotFoundError, or ValueError when the file is no vitlab checkpoint or has no such weights.
    """
    file = checkpoint_in(path)
    content = _content(file)
    if not {"state_dict", "config", "spec"} <= content.keys():
        raise ValueError(f"{file} is not a vitlab checkpoint: it lacks config or spec; plain weights go to --init")
    config, spec = content["config"], content["spec"]
    model = _network_of(config, spec, tuple(spec["image_size"]))
    model.load_state_dict(network_state(content, use_ema, file))
    return model.eval(), spec


def _network_of(config: dict[str, Any], spec: Spec, image_size: tuple[int, int]) -> nn.Module:
    if "model" not in config:
        raise ValueError(
            "the checkpoint does not say how its network is built (models.create did not build it): make the network, "
            "then Task.load_from_checkpoint(path, model=network)"
        )
    arguments = {
        key: value for key, value in config["model_args"].items() if key not in ("pretrained", "checkpoint_path")
    }  # nothing else is read
    return build(config["model"], spec["num_outputs"], image_size, columns=columns_of(spec), **arguments)


def columns_of(spec: About) -> int:
    """Number of table columns that a network of these data takes beside the image."""
    columns = spec.get("columns")
    return len(columns["names"]) if columns else 0


def network_state(content: dict[str, Any], use_ema: bool | None, file: Path) -> dict[str, Tensor]:
    """The network's own state dict out of one of our checkpoints' content. Raises ValueError when it has no such
    weights, or they hold NaN."""
    state = _chosen(content, use_ema, file)
    if file.suffix != ".safetensors":
        state = {key[len("model.") :]: value for key, value in state.items() if key.startswith("model.")}
    check_finite(state, file)
    return state
