"""Parts of a network that do not learn: linear probing, and fine-tuning of the upper layers."""

from typing import Any

from timm.models import group_parameters
from torch import nn

from models.pretrained import head_keys


def freeze(model: nn.Module, what: str) -> list[str]:
    """Take parameters out of training (`requires_grad` False) and return their names.

    `backbone` leaves only the classifiers (linear probing). A fraction such as 0.5 freezes the first layer with
    positions and tokens, and that part of the blocks, from the input up in the order of `group_matcher`, rounded down.
    Call before the optimizer is made, and `hold_frozen` before training and after every `model.train()`. ValueError
    names the flag.
    """
    heads = head_keys(model)
    if not heads:
        raise ValueError("--freeze: the network has no classifier that could learn")
    frozen = (
        {name for name, _ in model.named_parameters()} - heads
        if what == "backbone"
        else lower_layers(model, what) - heads
    )
    if not frozen:
        raise ValueError(f"--freeze {what}: the network has nothing to freeze")
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad = False
    return [name for name, _ in model.named_parameters() if name in frozen]


def lower_layers(model: Any, what: str) -> set[str]:
    """Names of the first layer, the tensors that stand directly in the network (tokens) and the first part of the
    blocks."""
    try:
        part = float(what)
    except ValueError:
        part = 0.0
    if not 0 < part < 1:
        raise ValueError(f"--freeze {what}: give `backbone`, or a fraction of the blocks between 0 and 1 such as 0.5")
    stem, *blocks, _ = group_parameters(model, model.group_matcher(coarse=False)).values()
    lower = [stem, *blocks[: int(part * len(blocks))]]
    return {name for names in lower for name in names} | {name for name, _ in model.named_parameters(recurse=False)}


def hold_frozen(model: nn.Module) -> None:
    """Put frozen modules in evaluation mode: batch norm keeps its statistics, and no dropout or drop path before the
    first trainable one."""
    if all(parameter.requires_grad for parameter in model.parameters()):
        return
    learning = False
    for module in model.modules():
        learning |= any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        fixed = not any(parameter.requires_grad for parameter in module.parameters())
        if fixed and (not learning or any(True for _ in module.parameters())):
            module.eval()
