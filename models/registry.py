"""Networks by name: which ones are registered, how one is built, which images it wants."""

import inspect
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import timm
from timm.data import resolve_data_config
from torch import nn

from models.heads import compose_head

Size = int | tuple[int, int]


@dataclass(frozen=True)
class Entry:
    """One registered variant: how to build it, what it costs at its own image size, how its images are prepared, its
    timm twin."""

    build: Any  # class of the network; `first_conv`, `classifier` name its first convolution and its head
    args: dict[str, Any]
    gmacs: float  # multiply-accumulates of one forward pass, attention products included, 1000 outputs
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float
    timm: str | None  # the same architecture in timm, without tag


REGISTRY: dict[str, Entry] = {}
HALF = (0.5, 0.5, 0.5)  # mean = std of the ViT lineage
HEAD = ("head_hidden", "head_dropout")  # keywords of every model, as dist_head
TIMM_WORDS = {"drop_path": "drop_path_rate", "dropout": "drop_rate", "attn_dropout": "attn_drop_rate"}
OUR_WORDS = {theirs: ours for ours, theirs in TIMM_WORDS.items()} | {
    "num_classes": "num_outputs",
    "img_size": "image_size",
    "global_pool": "pool",
    "proj_drop_rate": "dropout",
    "init_values": "layer_scale",
    "pretrained": "init",
    "checkpoint_path": "init",
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def register(
    name: str,
    build: Any,
    *,
    gmacs: float,
    timm: str | None = None,
    image_size: int = 224,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    interpolation: str = "bicubic",
    crop_pct: float = 0.9,
    **args: Any,
) -> None:
    """Give `build(**args)` a name on the command line. Raises KeyError when the name is taken."""
    if name in REGISTRY:
        raise KeyError(f"model {name} is registered twice")
    REGISTRY[name] = Entry(build, args, gmacs, image_size, mean, std, interpolation, crop_pct, timm)


def names() -> list[str]:
    """Our own variants, in the order of the files and of their tables."""
    return list(REGISTRY)


def closest(word: str, known: list[str]) -> str:
    """`did you mean a, b?`, or nothing where no known word is near."""
    near = get_close_matches(word, known, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""


def check_name(name: str) -> None:
    """Raises ValueError with the closest names when `name` is neither ours nor timm's."""
    if name.startswith("timm/"):
        arch = name[len("timm/") :]
        if not timm.is_model(arch):
            near = (
                closest(arch.split(".")[0], timm.list_models()).replace("mean ", "mean timm/").replace(", ", ", timm/")
            )
            raise ValueError(f"timm has no model named {arch!r}{near}")
        bare, _, tag = arch.partition(".")
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{bare}.*")]
        if tag and tag not in tags:
            raise ValueError(
                f"timm/{bare} has no weights tagged {tag!r}{closest(tag, tags)} (its tags: {', '.join(tags) or 'none'})"
            )
    elif name not in REGISTRY:
        also = f"; timm has it: --model timm/{name}" if timm.is_model(name) else ""
        near = closest(name, names()) or f"; there are {', '.join(names())}" * (not also)
        raise ValueError(f"no model named {name!r}{also}{near}")


def keywords(name: str) -> list[str]:
    """The keywords that `create` takes for one of our own models, beside num_outputs, image_size and in_chans."""
    check_name(name)
    parameters = inspect.signature(REGISTRY[name].build.__init__).parameters
    own = [key for key in parameters if key not in ("self", "num_outputs", "image_size", "in_chans")]
    return [*own, "dist_head", *HEAD]


def build(
    name: str,
    num_outputs: int = 1000,
    image_size: Size | None = None,
    in_chans: int = 3,
    columns: int = 0,
    **model_args: Any,
) -> nn.Module:
    """Build a network with fresh weights. Arguments and errors: `models.create`."""
    check_name(name)
    hidden, dropout = (model_args.pop(key, None) for key in HEAD)
    if dropout is not None and hidden is None:
        raise ValueError("head_dropout is of a head with head_hidden")
    dist = bool(model_args.pop("dist_head", False))
    network = _build_timm if name.startswith("timm/") else _build_ours
    model = network(name, num_outputs, image_size, in_chans, model_args)
    hidden = hidden if num_outputs else None
    return compose_head(model, hidden=hidden, dropout=dropout or 0.0, columns=columns, dist=dist)


def _build_ours(
    name: str, num_outputs: int, image_size: Size | None, in_chans: int, model_args: dict[str, Any]
) -> nn.Module:
    entry, known = REGISTRY[name], keywords(name)
    for key in model_args:
        if key not in known:
            near = f"; timm's {key} is {OUR_WORDS[key]} here" if key in OUR_WORDS else closest(key, known)
            raise ValueError(f"model {name} has no argument {key!r}{near} (it takes {', '.join(known)})")
    _check_ranges(num_outputs, model_args)
    size = entry.image_size if image_size is None else image_size
    model = entry.build(num_outputs=num_outputs, image_size=size, in_chans=in_chans, **{**entry.args, **model_args})
    setattr(model, "pretrained_cfg", cfg := timm_cfg(name, num_outputs))  # noqa: B010
    setattr(model, "default_cfg", cfg)  # noqa: B010
    return model


def _check_ranges(num_outputs: int, model_args: dict[str, Any]) -> None:
    if num_outputs < 0:
        raise ValueError(f"num_outputs {num_outputs}: must not be negative (0 leaves the head out)")
    for key, value in model_args.items():
        if (
            key in ("depth", "patch_size", "embed_dim", "num_heads", "window_size")
            and isinstance(value, int)
            and value < 1
        ):
            raise ValueError(f"{key} {value}: must be at least 1")
        if key in ("dropout", "attn_dropout", "drop_path") and not 0 <= value < 1:
            raise ValueError(f"{key} {value}: must be at least 0 and below 1")


def timm_cfg(name: str, num_outputs: int) -> dict[str, Any]:
    """Settings that timm's tools read from a model: input size, normalisation, names of head and first convolution."""
    entry = REGISTRY[name]
    return {
        "num_classes": num_outputs,
        "input_size": (3, entry.image_size, entry.image_size),
        "mean": entry.mean,
        "std": entry.std,
        "interpolation": entry.interpolation,
        "crop_pct": entry.crop_pct,
        "pool_size": (entry.image_size // 32,) * 2,
        "fixed_input_size": True,
        "first_conv": entry.build.first_conv,
        "classifier": entry.build.classifier,
        "architecture": name,
    }


def _build_timm(
    name: str, num_outputs: int, image_size: Size | None, in_chans: int, model_args: dict[str, Any]
) -> nn.Module:
    words = {TIMM_WORDS.get(key, key): value for key, value in model_args.items()}
    if "num_classes" in words:
        raise ValueError(f"model {name}: timm's num_classes is num_outputs here")
    if image_size is not None:
        words["img_size"] = image_size
    try:
        return timm.create_model(name[len("timm/") :], num_classes=num_outputs, in_chans=in_chans, **words)
    except TypeError as error:
        if image_size is not None and "unexpected keyword argument 'img_size'" in str(error):
            return _build_timm(name, num_outputs, None, in_chans, model_args)  # convolutional networks take any size
        if "unexpected keyword argument" in str(error) or "multiple values for" in str(error):
            raise ValueError(f"model {name}: {error}") from None
        raise


def preprocessing(name: str) -> dict[str, Any]:
    """Preparation of the network's images: image_size (height, width), mean, std, interpolation, crop_pct,
    crop_mode.

    Ours stand in the registry; timm's are those of the weights' tag (timm.get_pretrained_cfg). Raises ValueError for an
    unknown name.
    """
    check_name(name)
    if name.startswith("timm/"):
        cfg = timm.get_pretrained_cfg(name[len("timm/") :])
        data = resolve_data_config(pretrained_cfg=cfg.to_dict() if cfg else None)
        return {
            "image_size": tuple(data["input_size"][1:]),
            **{key: data[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")},
        }
    entry = REGISTRY[name]
    return {
        "image_size": (entry.image_size, entry.image_size),
        "mean": entry.mean,
        "std": entry.std,
        "interpolation": entry.interpolation,
        "crop_pct": entry.crop_pct,
        "crop_mode": "center",
    }
