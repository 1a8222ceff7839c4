"""What a network costs: parameters, multiply-accumulates, activation memory. Counted on `meta`: no weights, no arithmetic."""
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode


def parameters(model: nn.Module) -> int:
    """Trainable and frozen parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def gmacs(meta: nn.Module, image_size: tuple[int, int], in_chans: int = 3) -> float:
    """Billions of multiply-accumulates of one picture's forward pass, attention products included, for a network built on `meta`."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta.eval()(torch.empty(1, in_chans, *image_size, device="meta"))
    return counter.get_total_flops() / 2e9


def activation_bytes(meta: nn.Module, image_size: tuple[int, int], in_chans: int = 3) -> int:
    """Bytes that autograd keeps for one picture's backward pass in float32, for a network built on `meta` (fused attention assumed)."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = meta.train()(torch.empty(2, in_chans, *image_size, device="meta"))  # two: batch norm wants more than one
    del output
    return sum(kept.values()) // 2
