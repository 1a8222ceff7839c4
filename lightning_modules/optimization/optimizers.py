"""Optimizers through timm: which parameters decay, which learn at a rate of their own, and setting the rate of a
step."""

import inspect
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, get_optimizer_class, param_groups_weight_decay
from torch import nn
from torch.optim import Optimizer

from lightning_modules.optimization.layer_decay import layer_ids
from models.pretrained import head_keys

DEFAULTS: dict[
    str, dict[str, Any]
] = {  # where timm's factory would give something else than the optimizer's own authors
    "adamw": {},
    "lamb": {},
    "sgd": {},
    "muon": {"momentum": 0.95},
}


def check_optimizer(name: str, optimizer_args: dict[str, Any]) -> None:
    """Raise ValueError, naming the flag, for an argument that the optimizer does not take (timm drops some silently) or
    a value that it stumbles over in a first step."""
    allowed = sorted(
        set(inspect.signature(get_optimizer_class(name, bind_defaults=False)).parameters)
        - {"params", "lr", "weight_decay"}
    )
    if unknown := sorted(set(optimizer_args) - set(allowed)):
        raise ValueError(f"--optimizer_args {', '.join(unknown)}: {name} takes {', '.join(allowed)}")
    trial = nn.Parameter(torch.ones(2, 2))
    trial.grad = torch.ones(2, 2)
    try:
        create_optimizer_v2([trial], name, lr=1e-3, **DEFAULTS[name] | optimizer_args).step()
    except Exception as error:
        raise ValueError(
            f"--optimizer_args {optimizer_args}: {name} does not take these values ({str(error).splitlines()[0]})"
        ) from None


def optimizer(
    model: nn.Module,
    name: str,
    *,
    lr: float,
    weight_decay: float,
    layer_decay: float | None = None,
    head_lr_scale: float = 1.0,
    **optimizer_args: Any,
) -> Optimizer:
    """An optimizer of the trainable parameters: `adamw`, `lamb`, `sgd` (Nesterov momentum 0.9) or `muon`, with timm's
    defaults.

    No decay for 1-D tensors, biases and the names in `model.no_weight_decay()`. Muon orthogonalises hidden matrices and
    kernels; the first layer, the heads and what does not decay learn by AdamW at the same rate. LAMB clips the
    gradient's norm to 1 by itself (`max_grad_norm`).

    Args:
        lr: the rate of a group is this times its `lr_scale`.
        layer_decay: factor per layer from the head down to the input (`layer_decay.layer_ids`).
        head_lr_scale: factor for the classifiers.
    """
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(f"--layer_decay {layer_decay}: must be above 0 and at most 1")
    if not head_lr_scale > 0:
        raise ValueError(f"--optimizer_args.head_lr_scale {head_lr_scale}: must be above 0")
    groups = parameter_groups(model, weight_decay, layer_decay, muon=name == "muon")
    if not groups:
        raise ValueError("no parameter is left to train: --freeze froze them all")
    if head_lr_scale != 1:
        groups = scaled(groups, model, dict.fromkeys(head_keys(model), head_lr_scale))
    made = create_optimizer_v2(groups, name, lr=lr, **DEFAULTS[name] | optimizer_args)
    set_lr(made, lr)
    return made


def parameter_groups(
    model: Any, weight_decay: float, layer_decay: float | None, *, muon: bool = False
) -> list[dict[str, Any]]:
    """timm's groups of the trainable parameters by weight decay, for Muon also by `use_fallback`, and by layer where
    `layer_decay` is given."""
    settings: dict[str, Any] = {
        "weight_decay": weight_decay,
        "no_weight_decay_list": model.no_weight_decay() if hasattr(model, "no_weight_decay") else (),
    }
    if muon:
        settings["fallback_list"] = not_hidden(model)
    groups = param_groups_weight_decay(model, **settings)
    if layer_decay is None:
        return groups
    layers = layer_ids(model)
    head, place = max(layers.values()), {id(parameter): at for at, parameter in enumerate(model.parameters())}
    groups = scaled(groups, model, {name: layer_decay ** (head - layer) for name, layer in layers.items()})
    return sorted(
        groups, key=lambda group: place[id(group["params"][0])]
    )  # timm's order, so that optimizer states stay in place


def not_hidden(model: Any) -> set[str]:
    """Names of the parameters on the rim: the first layer with positions and tokens, the classifiers, and all that
    never decays."""
    layers = group_parameters(model, model.group_matcher(coarse=False))
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    return set(layers[0]) | head_keys(model) | set(exempt)


def scaled(groups: list[dict[str, Any]], model: nn.Module, factors: dict[str, float]) -> list[dict[str, Any]]:
    """Split each group by the factor that its parameters have by name (1 where none is given), which multiplies the
    group's `lr_scale`."""
    by_parameter, split = {id(parameter): factors.get(name, 1.0) for name, parameter in model.named_parameters()}, []
    for group in groups:
        parts: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(by_parameter[id(parameter)], []).append(parameter)
        split += [
            {**group, "params": parameters, "lr_scale": group.get("lr_scale", 1.0) * factor}
            for factor, parameters in parts.items()
        ]
    return split


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Give every group the rate, times its own `lr_scale` where it has one (timm's word)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
