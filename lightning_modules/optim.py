"""Optimizer, weight-decay groups and the learning rate as a pure function of the step."""
import math

from timm.optim import param_groups_weight_decay
from torch import nn
from torch.optim import AdamW, Optimizer


def adamw(model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019) that decays matrices only: no 1-D tensor, no bias, no name in `model.no_weight_decay()` (as timm)."""
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    return AdamW(param_groups_weight_decay(model, weight_decay, exempt), lr=lr, betas=betas, eps=eps)


def warmup_cosine(step: int, *, peak: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based): linear from 0 to `peak` over the warm-up, then half a cosine down to `min_lr`.

    Step 0 of a warm-up has rate 0, as in big_vision (utils.py:1113-1138); past the last step it stays at `min_lr`.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_lr + (peak - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Give every group the rate, times its own `lr_scale` where it has one (timm's word)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
