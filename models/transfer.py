"""Transfer of weights to another network: names, prefixes, positions of another image size, rows of a head by class.

Legend: K outputs of a network, D features.
"""

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import Tensor, nn

from models.layers import saved_grid
from models.swin import window_of

State = dict[str, Tensor]
About = Mapping[str, Any]  # a specification (models/spec.py), or what is known of one
TABLE = "relative_position_bias_table"
LIBRARIES = {
    r"features\.\d|encoder\.layers\.encoder_layer_": "torchvision",
    r"(vit|deit|swin|convnext)\w*\.(embeddings|encoder)\.": "transformers",
}


def head_keys(model: nn.Module) -> set[str]:
    """Names of the classifier's tensors in the model's state dict."""
    heads = [*_heads(model), *filter(None, [getattr(model, "column_mlp", None)])]
    parameters = {id(p) for head in heads for p in head.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in parameters}


def _heads(model: nn.Module) -> list[nn.Module]:
    heads = cast(Any, model).get_classifier()
    return [*heads] if isinstance(heads, tuple | list) else [heads]


def fit(model: nn.Module, weights: State, source: str, saved: nn.Module | None = None) -> tuple[State, list[str]]:
    """Bring foreign tensors under the model's own names and sizes; returns them with a note for each thing done.

    saved: the network that the weights are of, at its image size, where it is known (on any device, meta included).
    Raises ValueError when no tensor has a place in the model, or positions cannot be resized.
    """
    own, adapt = model.state_dict(), _adapter(model, source, saved)
    prefix = _prefix(weights, own.keys(), adapt)
    beside = [key for key in weights if not key.startswith(prefix)]
    weights = _stripped(weights, prefix)
    adapted = adapt(weights)
    notes = [f"left out beside {prefix}*: {some(beside)}"] * bool(beside)
    resized = sum(key in adapted and _changed(value, adapted[key]) for key, value in weights.items())
    notes += [f"{resized} tensors resized to the image size"] * bool(resized)
    notes += _doubtful_grid(model, weights) if saved is None else []
    if adapted.keys() & own.keys():
        return adapted, notes
    heads = head_keys(model)
    alike = len(adapted) == len(own) and all(
        theirs.shape == ours.shape or key in heads for theirs, (key, ours) in zip(adapted.values(), own.items())
    )
    if not alike:
        raise ValueError(
            f"--init {source}: none of its {len(adapted)} tensors has a name of this model "
            f"(first: {next(iter(adapted))}; the model's first: {next(iter(own))}{library_of(adapted)})"
        )
    return dict(zip(own, adapted.values())), [*notes, "no name matched, every shape did: taken in order"]


def _prefix(weights: State, own: Iterable[str], adapt: Callable[[State], State]) -> str:
    """Prefix of the network's names in a file: the first of the leading paths whose removal makes most names
    fit; "" is nothing."""
    own, paths = {*own}, Counter[str]()
    for key in weights:
        parts = key.split(".")
        paths.update(".".join(parts[:length]) + "." for length in range(1, min(4, len(parts))))
    best, most = "", -1
    for prefix in ["", *(path for path, count in paths.items() if 4 * count >= len(weights))]:
        stripped = _stripped(weights, prefix)
        try:
            names = adapt(stripped).keys()
        except ValueError:  # of tensors that are not the network's, or that do not fit: `fit` raises it for the best
            names = stripped.keys()
        if len(names & own) > most:
            best, most = prefix, len(names & own)
        if most == len(own):
            break
    return best


def _stripped(weights: State, prefix: str) -> State:
    return {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}


def _changed(before: Tensor, after: Tensor) -> bool:
    return before.shape != after.shape or before is not after and not torch.equal(before, after)


def _adapter(model: nn.Module, source: str, saved: nn.Module | None) -> Callable[[State], State]:
    """The model's own map of names and sizes, or timm's. Raises ValueError where it fails."""
    own = getattr(model, "adapt_state_dict", None)

    def adapt(weights: State) -> State:
        try:
            return own(weights, saved) if own else _adapt_timm(model, weights, saved)
        except (RuntimeError, KeyError, AttributeError, AssertionError, IndexError) as error:  # timm's own
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"--init {source}: its tensors cannot be brought to this model ({reason})") from None

    return adapt


def _adapt_timm(model: nn.Module, weights: State, saved: nn.Module | None) -> State:
    """timm's key map and resizing for one of its models (`checkpoint_filter_fn` in the model's file), with the grid and
    the windows that the weights really have: timm takes them as square."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    weights, own, tables = dict(weights), model.state_dict(), {}
    positions, foreign = weights.get("pos_embed"), "mask_token" in weights  # DINOv2's names, which timm converts
    if (learned := _positions(model)) and positions is not None and positions.ndim == 3 and not foreign:
        network: Any = model
        weights["pos_embed"] = _fit_positions(positions, *learned, _grid(saved))
        network.pretrained_model_args = {"img_size": tuple(network.patch_embed.img_size)}  # timm leaves them as now
    for key in [key for key in weights if key.endswith(TABLE) and key in own]:
        window, old = window_of(model, key), window_of(saved, key) if saved is not None else None
        if window and old:
            table = weights.pop(key)
            if window != old:
                table = resize_rel_pos_bias_table(table, window, own[key].shape, old_window_size=old)
            tables[key] = table
    return {**(convert(weights, model) if convert else weights), **tables}


def _positions(model: nn.Module) -> tuple[Tensor, tuple[int, int]] | None:
    """Learned positions (1, P + N, D) and the grid of patches they are for; None where a model lacks either."""
    positions, grid = getattr(model, "pos_embed", None), _grid(model)
    if not isinstance(positions, nn.Parameter) or positions.ndim != 3 or grid is None:
        return None
    return positions, grid


def _grid(network: nn.Module | None) -> tuple[int, int] | None:
    return getattr(getattr(network, "patch_embed", None), "grid_size", None)


def _fit_positions(saved: Tensor, ours: Tensor, grid: tuple[int, int], old: tuple[int, int] | None) -> Tensor:
    """Positions (1, P + N, D) of the grid `old`, or where it is None of the likeliest, resized to ours; those for
    another number of prefix tokens are returned as they are."""
    lead = ours.shape[1] - grid[0] * grid[1]
    if old is None and saved.shape[1] == ours.shape[1]:
        return saved
    if old is None:
        lead, old = saved_grid(saved.shape[1], grid, (lead,))
    if old == grid or saved.shape[1] != lead + old[0] * old[1]:
        return saved
    return resample_abs_pos_embed(saved, grid, old, num_prefix_tokens=lead)


def _doubtful_grid(model: nn.Module, weights: State) -> list[str]:
    """A line where saved positions fit a square as well as the aspect that was asked for."""
    positions, learned = weights.get("pos_embed"), _positions(model)
    if learned is None or positions is None or positions.ndim != 3:
        return []
    ours, grid = learned
    if grid[0] == grid[1]:
        return []
    tokens = sum(key in weights for key in ("cls_token", "dist_token"))
    leads = (tokens, 0) if ours.shape[1] > grid[0] * grid[1] else (0, tokens)
    _, old = saved_grid(positions.shape[1], grid, leads)
    side = math.isqrt(old[0] * old[1])
    doubtful = old[0] != old[1] and side * side == old[0] * old[1]
    return [f"positions taken as those of {old[0]}x{old[1]} patches, as asked for, not of {side}x{side}"] * doubtful


def check_resized(weights: State, saved: nn.Module, larger: nn.Module, own: State, source: str) -> None:
    """Raises ValueError for tensors that depend on the image size, fit by chance and are not known to be resized.

    `larger` is the network `saved` at another size: what differs between the two in shape depends on it.
    """
    theirs, other = saved.state_dict(), larger.state_dict()
    bound = [
        key for key, value in theirs.items() if value.ndim < 4 and key in other and other[key].shape != value.shape
    ]
    wrong = [
        key
        for key in bound
        if key != "pos_embed"
        and not key.endswith(TABLE)
        and key in own
        and key in weights
        and weights[key].shape == theirs[key].shape == own[key].shape
    ]
    if wrong:
        raise ValueError(
            f"--init {source}: {some(wrong)} are of the image size it was trained at, and nothing resizes "
            "them for this model; give that --image_size"
        )


def fit_head(model: nn.Module, weights: State, theirs: About, ours: About) -> tuple[State, list[str]]:
    """Take the rows of the classifier by the names of what they predict, where both data specifications have them.

    Rows whose name the file lacks start fresh (`start_small_`). The weights are returned as they are where the names
    are the same or not known, or where another number of outputs shares none: that is a head of another size.
    """
    names, wanted = outputs(theirs), outputs(ours)
    if not names or not wanted or names == wanted:
        return weights, _other_range(theirs, ours) if names == wanted else []
    place = {name: row for row, name in enumerate(names)}
    taken = [(row, place[name]) for row, name in enumerate(wanted) if name in place]
    if not taken and len(names) != len(wanted):
        return weights, []
    own, weights = model.state_dict(), dict(weights)
    for key in _output_keys(model):
        if key in weights and len(weights[key]) == len(names) and weights[key].shape[1:] == own[key].shape[1:]:
            fresh = torch.empty_like(own[key])
            start_small_({key: fresh})
            for row, old in taken:
                fresh[row] = weights[key][old]
            weights[key] = fresh
    left, new = [name for name in names if name not in {*wanted}], [name for name in wanted if name not in place]
    if not left and not new:
        note = f"rows of the head put in the order of these {len(wanted)} {_kind(ours)}"
        return weights, [note, *_other_range(theirs, ours)]
    note = (
        f"rows of the head by name: {len(taken)} of {len(wanted)} {_kind(ours)} taken, "
        f"fresh: {some(_words(new))}, left out: {some(_words(left))}"
    )
    return weights, [note, *_other_encoding(names, wanted), *_other_range(theirs, ours)]


def _other_encoding(names: list[tuple[Any, ...]], wanted: list[tuple[Any, ...]]) -> list[str]:
    """A line where the outputs have the same names and stand for something else."""
    (_, theirs, each, _), (_, ours, here, _) = names[0], wanted[0]
    apart = {row[0] for row in names} & {row[0] for row in wanted} and (theirs, each) != (ours, here)
    return [f"its outputs are {theirs} ({each} a target), these {ours} ({here})"] * bool(apart)


def outputs(spec: About) -> list[tuple[Any, ...]]:
    """Meaning of each output of a network of these data, in order; equal entries mean the same. [] if not known."""
    names = spec.get("class_names") or spec.get("target_names") or []
    each = spec["num_outputs"] // len(names) if names else 0
    kind = spec.get("encoding") if spec.get("task") == "regression" else "class"
    return [(str(name), kind, each, place) for name in names for place in range(each)]


def _kind(spec: About) -> str:
    return "targets" if spec.get("task") == "regression" else "classes"


def _words(rows: list[tuple[Any, ...]]) -> list[str]:
    return [name if each == 1 else f"{name} {place + 1}/{each}" for name, _, each, place in rows]


def _other_range(theirs: About, ours: About) -> list[str]:
    there, here = theirs.get("target_range"), ours.get("target_range")
    return [f"its targets lay within {there}, these within {here}"] * bool(there and here and there != here)


def _output_keys(model: nn.Module) -> set[str]:
    """Names of the tensors (K, ...) whose rows are the outputs: weight and bias of each classifier's last layer."""
    layers = [[each for each in head.modules() if isinstance(each, nn.Linear | nn.Conv2d)] for head in _heads(model)]
    last = {id(each[-1]) for each in layers if each}
    return {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if id(module) in last
        for key, _ in module.named_parameters()
    }


@torch.no_grad()
def start_small_(head: State) -> None:
    """A fresh classifier on trained features: matrices N(0, 0.01), biases 0, so that it starts without an opinion. A
    family's own start may be far from it: timm's EfficientNets draw U(-1, 1) for one output."""
    for tensor in head.values():
        nn.init.trunc_normal_(tensor, std=0.01) if tensor.ndim > 1 else nn.init.zeros_(tensor)


def check_whole(missing: list[str], unexpected: list[str], own: State, source: str) -> None:
    """Raises ValueError for tensors of the model beside its head that are not in the file, with the likely reason."""
    if not missing:
        return
    if unexpected:
        why = (
            f"{len(unexpected)} of the file's have no place in it ({unexpected[0]}, ...): another network, or its "
            f"names in another library{library_of(unexpected)}"
        )
    elif all(".ls" in key or "gamma" in key for key in missing):
        why = "the file is of a network without LayerScale"
    else:
        why = "the file holds a part of a network, or one of fewer layers"
    raise ValueError(
        f"--init {source}: {len(missing)} of the model's {len(own)} tensors are missing beside the head "
        f"({', '.join(missing[:3])}{', ...' * (len(missing) > 3)}): {why}; --init_partial starts them "
        "fresh"
    )


def library_of(keys: Iterable[str]) -> str:
    """`; they look like those of torchvision`, where the names are recognised; "" where not."""
    keys = [*keys]
    found = [name for pattern, name in LIBRARIES.items() if any(re.match(pattern, key) for key in keys)]
    return f"; they look like those of {found[0]}" if found else ""


def some(keys: list[str]) -> str:
    """`12 (a, b, c, ...)`; `none` of nothing."""
    return f"{len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else "none"
