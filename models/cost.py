"""What a network costs: parameters, multiply-accumulates, activation memory. Counted on `meta`: no weights, no
arithmetic."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count


def parameters(model: nn.Module) -> int:
    """Trainable and frozen parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def gmacs(meta: nn.Module, image_size: tuple[int, int], in_chans: int = 3) -> float:
    """Billions of multiply-accumulates of one picture's forward pass, attention products included, for a network built
    on `meta`."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta.eval()(torch.empty(1, in_chans, *image_size, device="meta"))
    return counter.get_total_flops() / 2e9


def training_flops(model: nn.Module, *given: torch.Tensor) -> float:
    """Floating-point operations of one picture's forward and backward pass, attention products included and two to a
    multiply-accumulate; what is frozen, and gradients that nothing asks for, cost nothing.

    Args:
        model: on any device, trainable as it will be trained; it is left as it is, gradients included.
        given: its inputs, each (B, ...); of them only the shape counts.
    """
    memo = {id(value): nn.Parameter(value.detach().to("meta"), value.requires_grad) for value in model.parameters()}
    network: Any = copy.deepcopy(
        model, memo | {id(value): value.to("meta") for value in model.buffers()}
    )  # without a copy of any weight
    if hasattr(network, "set_grad_checkpointing"):
        network.set_grad_checkpointing(False)  # what is computed anew is no work done
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward}
    ) as counter:
        meta = tuple(torch.empty_like(value, device="meta", dtype=torch.float32) for value in given)
        output = network(*meta)
        sum(part.sum() for part in (output if isinstance(output, tuple) else (output,))).backward()
    return counter.get_total_flops() / len(given[0])


def _convolution_backward(
    grad_out: Any,
    image: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    wanted: list[bool],
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """The forward pass's count for the picture's gradient and for the weight's, as far as wanted (PyTorch's own forgets
    groups)."""
    return (wanted[0] + wanted[1]) * conv_flop_count(image, weight, grad_out, transposed=transposed)


def activation_bytes(meta: nn.Module, image_size: tuple[int, int], in_chans: int = 3) -> int:
    """Bytes that autograd keeps for one picture's backward pass in float32, for a network built on `meta` (fused
    attention assumed)."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = meta.train()(
            torch.empty(2, in_chans, *image_size, device="meta")
        )  # two: batch norm wants more than one
    del output
    return sum(kept.values()) // 2


def layer_table(
    meta: nn.Module, image_size: tuple[int, int], in_chans: int = 3
) -> list[tuple[str, tuple[int, ...], int, float]]:
    """(name, output shape, parameters, GMACs) of each part and each block of a network built on `meta`, in the order
    they run, for one picture. Parts without parameters are left out."""
    shapes: dict[str, tuple[int, ...]] = {}
    parts = {name: module for name, module in meta.named_modules() if _shown(name) and parameters(module)}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, inputs, output: shapes.update(
            {name: tuple(output.shape) if isinstance(output, torch.Tensor) else ()}
        )

    handles = [module.register_forward_hook(hook(name)) for name, module in parts.items()]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta.eval()(torch.empty(1, in_chans, *image_size, device="meta"))
    for handle in handles:
        handle.remove()
    flops, root = counter.get_flop_counts(), type(meta).__name__
    return [
        (name, shape, parameters(parts[name]), sum(flops.get(f"{root}.{name}", {}).values()) / 2e9)
        for name, shape in shapes.items()
    ]


def _shown(name: str) -> bool:
    """Top-level parts, members of a list of blocks or stages, and the blocks inside a stage; not what a block is made
    of."""
    words = name.split(".")
    return name != "" and (len(words) == 1 or words[-1].isdigit()) and sum(word.isdigit() for word in words) <= 2
