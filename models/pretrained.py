"""Files <-> weights: read any common weight file safely, fit it to a network, bring a trained network back from its checkpoint."""
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import models

# where trainers keep the weights inside a checkpoint
EMA, RAW = ("ema_state_dict", "state_dict_ema", "model_ema"), ("state_dict", "model")
PREFIXES = ("module.", "_orig_mod.", "model.")  # DDP, torch.compile, our LightningModules
AVERAGED, BEST = "averaged.ckpt", "best.ckpt"  # of a run directory: the mean of several epochs, and the best epoch
LAST = ("last.ckpt", "last-1.ckpt")  # of a run directory: the last step saved, and the one saved before
FILES = (AVERAGED, BEST, *LAST)  # whose weights a run directory stands for, the first that is there
SEAL = b"sha256:"  # our checkpoints end in this and 64 hex digits: the comment of the zip archive that torch.save writes


def checkpoint_in(path: str | Path, names: tuple[str, ...] = FILES) -> Path:
    """The file of weights that a path names: itself, or of a run directory the averaged checkpoint, else the best, else the last (the first
    of `names`). Raises FileNotFoundError."""
    check_local(path)
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"no weights at {path}")
        return path
    for name in names:
        if (path / "checkpoints" / name).is_file():
            return path / "checkpoints" / name
    raise FileNotFoundError(f"{path} is not a run with weights: there is no checkpoints/best.ckpt or checkpoints/last.ckpt in it")


def check_local(path: str | Path) -> None:
    """Raises ValueError for an address: what is read from the network could be anyone's."""
    if "://" in str(path):
        raise ValueError(f"{path}: weights and checkpoints are read from files only, never from the network; download it, look where it "
                         "comes from, and give the file")


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
    return digest.hexdigest().encode() == tail[2 + len(SEAL):]


def read_checkpoint(path: str | Path, *, mapped: bool = False) -> dict[str, Any]:
    """The content of a .safetensors, .pth, .pt, .bin or .ckpt file, loaded with weights_only=True. Raises ValueError when it is not one,
    or not as it was written. `mapped` leaves the tensors on disk until they are used, for one of our checkpoints."""
    check_local(path)
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if intact(path):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a readable file of weights: {_line(error)}") from None
    except Exception:  # torch's restricted unpickler raises pickle.UnpicklingError and others, with advice to load it unsafely
        raise ValueError(f"{path} is no file of weights, or holds more than tensors and plain data, and is not loaded (it could run code)") from None
    raise ValueError(f"{path} is damaged: its sha256 is not the one it was written with")


def read_weights(path: str | Path, use_ema: bool | None = None) -> dict[str, Tensor]:
    """Names -> tensors of a file or run directory, unwrapped from the trainer's dict and freed of the prefixes trainers add.

    use_ema: as for `load`. Raises ValueError when the file has no such weights.
    """
    file = checkpoint_in(path)
    state = _chosen(_content(file), use_ema, file)
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)} if isinstance(state, dict) else {}
    if not state:
        raise ValueError(f"{path} holds no tensors by name")
    state = {key: value for key, value in state.items() if not key.startswith("aux.")} if any(key.startswith("model.") for key in state) else state
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key[len(prefix):]: value for key, value in state.items()}
    return state


def published_weights(name: str, tag: str | None = None) -> dict[str, Tensor]:
    """The weights timm publishes for a model, in the tag's version or the default one (downloaded, or from the hub's cache).

    Raises ValueError when timm has no such weights or they cannot be fetched.
    """
    arch = name[len("timm/"):] if name.startswith("timm/") else models.REGISTRY[name].timm
    if arch is None:
        raise ValueError(f"there are no published weights for {name}" + (f", and no file or run {tag}" if tag else ""))
    arch = f"{arch.split('.')[0]}.{tag}" if tag else arch
    tags = sorted(full.partition(".")[2] for full in timm.list_pretrained(f"{arch.split('.')[0]}.*"))
    if not tags or "." in arch and arch.partition(".")[2] not in tags:
        raise ValueError(f"timm has no weights {arch!r}; its tags for this model are {', '.join(tags) or 'none'}")
    try:
        return timm.create_model(arch, pretrained=True).state_dict()
    except Exception as error:
        raise ValueError(f"the weights {arch} could not be fetched ({type(error).__name__}: {_line(error)[:120]}); "
                         "without internet give a file: --init PATH") from None


def head_keys(model: nn.Module) -> set[str]:
    """Names of the classifier's tensors in the model's state dict."""
    heads = model.get_classifier()
    heads = [*(heads if isinstance(heads, tuple | list) else [heads]), *filter(None, [getattr(model, "column_mlp", None)])]
    parameters = {id(p) for head in heads for p in head.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in parameters}


def initialise(model: nn.Module, source: str, *, name: str, reset_head: bool = False, whole: bool = False, use_ema: bool | None = None) -> str:
    """Load `--init` into a network: `pretrained`, a file, a run directory, or one of timm's tags. Returns a line that says what was loaded.

    Missing and unexpected tensors are reported in the line; tensors of another shape are resized where they are positions. A head of
    another size raises ValueError unless `reset_head`, which `pretrained` implies; so does any other misfit, and
    with `whole`, as for an evaluation, a tensor left at its fresh values. `use_ema` chooses among the weights of a file, as for `load`.
    """
    if source == "pretrained" or not Path(source).exists() and _looks_like_tag(source):
        weights = published_weights(name, None if source == "pretrained" else source)
        reset_head |= source == "pretrained"
    else:
        weights = read_weights(source, use_ema)
    weights, notes = fit(model, weights, source)
    own, heads = model.state_dict(), head_keys(model)
    wrong = {key for key in weights.keys() & own.keys() if weights[key].shape != own[key].shape}
    if wrong - heads:  # before the head: another width makes both misfit
        key = sorted(wrong - heads)[0]
        raise ValueError(f"--init {source}: {len(wrong)} tensors have another shape, the first is {key} "
                         f"{tuple(weights[key].shape)} for {tuple(own[key].shape)}; is it another model or patch size?")
    if wrong:
        key = sorted(wrong)[-1]
        if not reset_head:
            raise ValueError(f"--init {source}: its head is {tuple(weights[key].shape)} and the model's {tuple(own[key].shape)} ({key}); "
                             "--init_head reset starts a fresh one")
        notes.append(f"head of {len(weights[key])} outputs left out, a fresh one of {len(own[key])} starts")
        start_small_({name: own[name] for name in wrong})
        weights = {key: value for key, value in weights.items() if key not in heads}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if whole and missing:
        raise ValueError(f"--init {source} leaves {_some(missing)} untrained: there is nothing to evaluate"
                         + "; its head is of other classes than the data's" * (set(missing) <= heads))
    notes += [f"missing: {_some(missing)}"] * bool(missing) + [f"unexpected: {_some(unexpected)}"] * bool(unexpected)
    return f"init {source}: {len(weights) - len(unexpected)} of {len(own)} tensors" + "".join(f"; {note}" for note in notes)


@torch.no_grad()
def start_small_(head: dict[str, Tensor]) -> None:
    """A fresh classifier on trained features: matrices N(0, 0.01), biases 0, so that it starts without an opinion. A family's own start may be
    far from it: timm's EfficientNets draw U(-1, 1) for one output."""
    for tensor in head.values():
        nn.init.trunc_normal_(tensor, std=0.01) if tensor.ndim > 1 else nn.init.zeros_(tensor)


def fit(model: nn.Module, weights: dict[str, Tensor], source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Bring foreign tensors under the model's own names and sizes; returns them with a note for each thing done."""
    own, notes = model.state_dict(), []
    adapt = getattr(model, "adapt_state_dict", None) or _timm_filter(model)
    adapted = adapt(weights)
    resized = sum(key in adapted and adapted[key].shape != value.shape for key, value in weights.items())
    notes += [f"{resized} tensors resized to the image size"] * bool(resized)
    if not adapted.keys() & own.keys():
        heads = head_keys(model)
        alike = len(adapted) == len(own) and all(theirs.shape == ours.shape or key in heads
                                                 for theirs, (key, ours) in zip(adapted.values(), own.items()))
        if not alike:
            raise ValueError(f"--init {source}: none of its {len(adapted)} tensors has a name of this model (first: {next(iter(adapted))}; "
                             f"the model's first: {next(iter(own))})")
        notes.append("no name matched, every shape did: taken in order")
        adapted = dict(zip(own, adapted.values()))
    return adapted, notes


def _timm_filter(model: nn.Module) -> Any:
    """timm's own key map and resizing for one of its models (`checkpoint_filter_fn` in the model's file), or the identity."""
    module = sys.modules[type(model).__module__]
    own = getattr(module, "checkpoint_filter_fn", None)
    return (lambda weights: own(dict(weights), model)) if own else dict


def _looks_like_tag(source: str) -> bool:
    return not any(mark in source for mark in ("/", "\\")) and Path(source).suffix not in (".ckpt", ".pth", ".pt", ".bin", ".safetensors")


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _some(keys: list[str]) -> str:
    return f"{len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"


def read_about(path: str | Path) -> dict[str, Any]:
    """`config` and `spec` as kept in one of our checkpoints or exported files; {} for other weights."""
    file = checkpoint_in(path)
    content = _exported(file) if file.suffix == ".safetensors" else read_checkpoint(file)
    known = isinstance(content, dict) and all(isinstance(content.get(key), dict) for key in ("config", "spec"))
    return {key: content[key] for key in ("config", "spec")} if known else {}


def _exported(file: Path) -> dict[str, Any]:
    """What experiments/export.py wrote beside the tensors: config, spec, use_ema, source; {} for another's file."""
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
    """The weights inside a file's content, with the names they have there. A file of one kind (exported, averaged.ckpt) says which."""
    if not isinstance(content, dict):
        return content
    averaged, one_kind = chooses_ema(content, use_ema), isinstance(content.get("use_ema"), bool)
    if one_kind and use_ema not in (None, averaged):
        raise ValueError(f"{file} holds the {'averaged' if averaged else 'raw'} weights only")
    if use_ema and not averaged:
        raise ValueError(f"{file} keeps no averaged weights (EMA)")
    return next((content[key] for key in (EMA if averaged and not one_kind else RAW) if isinstance(content.get(key), dict)), content)


def chooses_ema(content: dict[str, Any], use_ema: bool | None) -> bool:
    """Whether it is the averaged weights (EMA) that `use_ema` takes out of a checkpoint. None: as its run did, else where they are kept."""
    if isinstance(content.get("use_ema"), bool):
        return content["use_ema"]
    wanted = (content.get("config") or {}).get("use_ema") if use_ema is None else use_ema
    return wanted is not False and any(isinstance(content.get(key), dict) for key in EMA)


def load(path: str | Path, use_ema: bool | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The trained network of one of our checkpoints, run directories or exported files, in evaluation mode, and its data specification.

    use_ema: True the averaged weights (EMA), False the raw ones, None those that the run has chosen and tested: the averaged ones where it
    kept them, but for `--use_ema false`. The mean of several epochs (averaged.ckpt) is of one kind only.
    Raises FileNotFoundError, or ValueError when the file is no vitlab checkpoint or has no such weights.
    """
    file = checkpoint_in(path)
    content = _content(file)
    if not {"state_dict", "config", "spec"} <= content.keys():
        raise ValueError(f"{file} is not a vitlab checkpoint: it lacks config or spec; plain weights go to --init")
    config, spec = content["config"], content["spec"]
    arguments = {key: value for key, value in config["model_args"].items() if key not in ("pretrained", "checkpoint_path")}  # nothing else is read
    model = models.create(config["model"], spec["num_outputs"], tuple(spec["image_size"]), columns=columns_of(spec), **arguments)
    model.load_state_dict(network_state(content, use_ema, file))
    return model.eval(), spec


def columns_of(spec: dict[str, Any]) -> int:
    """How many columns of a table a network of these data takes beside the picture."""
    return len((spec.get("columns") or {}).get("names", ()))


def network_state(content: dict[str, Any], use_ema: bool | None, file: Path) -> dict[str, Tensor]:
    """The network's own state dict out of one of our checkpoints' content. Raises ValueError when it has no such weights."""
    state = _chosen(content, use_ema, file)
    if file.suffix == ".safetensors":
        return state
    return {key[len("model."):]: value for key, value in state.items() if key.startswith("model.")}
