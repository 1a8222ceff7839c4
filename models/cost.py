"""Cost of a network: parameters, multiply-accumulates, activation memory. Counted on `meta`: no weights, no
arithmetic."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from models.layers import attend_written_out


def parameters(model: nn.Module) -> int:
    """Trainable and frozen parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def gmacs(meta: nn.Module, image_size: tuple[int, int], in_chans: int = 3) -> float:
    """Billions of multiply-accumulates of one image's forward pass, attention products included, for a network built
    on `meta`."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta.eval()(torch.empty(1, in_chans, *image_size, device="meta"))
    return counter.get_total_flops() / 2e9


def training_flops(model: nn.Module, *given: torch.Tensor) -> float:
    """Floating-point operations of one image's forward and backward pass, attention products included and two to a
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
    """The forward pass's count for the image's gradient and for the weight's, as far as wanted (PyTorch's own forgets
    groups)."""
    return (wanted[0] + wanted[1]) * conv_flop_count(image, weight, grad_out, transposed=transposed)


def activation_bytes(
    meta: nn.Module,
    image_size: tuple[int, int],
    *inputs: torch.Tensor,
    half: torch.dtype | None = None,
    fused: bool = True,
    in_chans: int = 3,
) -> int:
    """Bytes that autograd keeps for one image's backward pass, for a network built on `meta`, as it will be trained.

    What a frozen part does not need is not kept. Weights are not counted.

    Args:
        image_size: (height, width) in pixels.
        inputs: of the network beside the image, each (2, ...).
        half: the lower precision of an autocast on a GPU, such as torch.bfloat16; None is float32 throughout.
        fused: attention keeps queries, keys, values, output and a float32 a query, as the fused kernels do; otherwise
            its weights too.
    """
    counted = _Kept(meta, half, fused)
    image = torch.empty(2, in_chans, *image_size, device="meta")  # two: batch norm wants more than one
    with counted, saved_tensors_hooks(counted.pack, lambda tensor: tensor):
        output = meta(image, *inputs)
    del output
    return sum(counted.bytes.values()) // 2


class _FusedAttention(torch.autograd.Function):
    """What a fused attention kernel keeps, without its arithmetic."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any) -> torch.Tensor:
        output = value.new_empty(*query.shape[:-1], value.shape[-1]).transpose(-2, -3).contiguous().transpose(-2, -3)
        spread = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, output, spread)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise NotImplementedError("memory is counted in the forward pass")


class _Kept(TorchFunctionMode):
    """Counts what autograd saves in a forward pass, under the rules of CUDA's autocast where `half` is given."""

    LOWER = {F.linear, F.conv1d, F.conv2d, F.conv3d, torch.conv2d, torch.matmul, torch.Tensor.matmul, torch.bmm}
    LOWER |= {torch.Tensor.__matmul__, torch.baddbmm, torch.addmm, torch.einsum, F.scaled_dot_product_attention}
    FULL = {F.layer_norm, F.group_norm, F.softmax, torch.softmax, torch.Tensor.softmax, F.normalize, F.softplus}
    FULL |= {torch.cumsum, torch.exp, torch.log, torch.rsqrt, torch.Tensor.rsqrt, torch.Tensor.pow, torch.pow}

    def __init__(self, meta: nn.Module, half: torch.dtype | None, fused: bool):
        super().__init__()
        self.half, self.fused, self.bytes = half, fused, dict[int, int]()
        self.held = [*meta.parameters(), *meta.buffers()]  # kept alive, so that no storage takes the place of another
        self.weights = {each.untyped_storage()._cdata for each in self.held}
        self.copies: dict[int, torch.Tensor] = {}  # of weights in half precision: one a step, whatever its uses

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            self.bytes[storage._cdata] = storage.nbytes()
        return tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.half is not None and func in self.LOWER | self.FULL:
            dtype = self.half if func in self.LOWER else torch.float32
            args, kwargs = tree_map(lambda each: self._cast(each, dtype), (args, kwargs))
        if func is F.scaled_dot_product_attention:
            query, key, value, *rest = args
            mask = kwargs.get("attn_mask", rest[0] if rest else None)
            if not self.fused:
                return attend_written_out(query, key, value, bias=mask)
            return _FusedAttention.apply(query, key, value, mask)
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if value.untyped_storage()._cdata not in self.weights:
            return value.to(dtype)
        if id(value) not in self.copies:
            self.copies[id(value)] = copy_ = value.to(dtype)
            self.held.append(value)
            self.weights.add(copy_.untyped_storage()._cdata)
        return self.copies[id(value)]


def layer_table(
    meta: nn.Module, image_size: tuple[int, int], in_chans: int = 3
) -> list[tuple[str, tuple[int, ...], int, float]]:
    """(name, output shape, parameters, GMACs) of each part and each block of a network built on `meta`, in the order
    they run, for one image. Parts without parameters are left out."""
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
