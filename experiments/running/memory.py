"""The memory a training takes, and the images that one pass of one device can hold."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from datamodules.loading.cores import free_memory
from datamodules.transforms.crop_sizes import training_sizes
from experiments.cli.errors import UsageError
from experiments.config import Config
from experiments.running.forecast import lacks_gpus, on_gpu, world_size
from lightning_modules.optimization.freeze import freeze, hold_frozen
from lightning_modules.optimization.optimizers import not_hidden
from lightning_modules.teachers.cached_teacher import CachedTeacher
from lightning_modules.teachers.teacher import Teacher, Teachers
from models import cost

ASSUMED_BYTES = 40 * 2**30  # of a GPU that a plan is made for and that is not here: an A100's smaller size
FREE_SHARE = 0.8  # of the memory found; the rest is for the framework, buffers of a pass and fragmentation
HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def free_bytes(cfg: Config, *, assumed: bool = False) -> int:
    """Memory one process may use: of its GPU, or its share of what machine and container have free; or of an `assumed`
    GPU where it has none."""
    if assumed and torch.cuda.device_count() == 0:
        return ASSUMED_BYTES
    if on_gpu(cfg):
        return torch.cuda.mem_get_info(0)[0]
    return free_memory() // cfg.devices


def needed(meta: nn.Module, cfg: Config, teacher: Teacher | Teachers | CachedTeacher | None = None) -> tuple[int, int]:
    """Estimated bytes of training on one device, (whatever the batch; for each image in a pass).

    Fixed are weights, gradients, the optimizer's moments, averaged weights, copies in half precision, DDP's buckets and
    live teachers; frozen parameters have neither gradients nor moments. An image costs what autograd keeps of it at the
    largest training crop, and its pixels as uint8 and float32.

    Args:
        meta: the network on `meta`; it is left as it is.
        teacher: the live ones count, with their weights.
    """
    meta, half = copy.deepcopy(meta).train(), HALF.get(cfg.precision)
    if cfg.freeze:
        freeze(meta, cfg.freeze)
        hold_frozen(meta)
    if cfg.train_size is not None and (set_any_size := getattr(meta, "set_any_size", None)):
        set_any_size()
    assert cfg.model is not None and cfg.image_size is not None  # filled in by now
    height, width = max(training_sizes(cfg.train_size, cfg.size, cfg.epochs))
    fused = on_gpu(cfg) or lacks_gpus(cfg) or cfg.model.startswith("timm/")  # ours on CPU writes attention out
    kept = cost.activation_bytes(meta, (height, width), half=half, fused=fused)
    trained = sum(each.numel() for each in meta.parameters() if each.requires_grad)
    everything = cost.parameters(meta) + sum(each.numel() for each in meta.buffers() if each.is_floating_point())
    fixed = 4 * everything + 4 * trained + 4 * _moments(meta, cfg)
    fixed += 4 * everything if cfg.ema_decay is not None else 0
    fixed += 2 * cost.parameters(meta) if half else 0
    fixed += 4 * trained if world_size(cfg) > 1 else 0
    taught = sum(cost.parameters(network) for network in _networks(teacher))
    return fixed + (6 if half else 4) * taught, kept + 15 * height * width


def _moments(meta: nn.Module, cfg: Config) -> int:
    """Numbers that the optimizer keeps: one a parameter of SGD and of what Muon orthogonalises, two of all others."""
    aside = not_hidden(meta) if cfg.optimizer == "muon" else set()
    return sum(
        parameter.numel() * (1 if cfg.optimizer == "sgd" or cfg.optimizer == "muon" and name not in aside else 2)
        for name, parameter in meta.named_parameters()
        if parameter.requires_grad
    )


def _networks(teacher: Teacher | Teachers | CachedTeacher | None) -> Sequence[nn.Module]:
    if isinstance(teacher, Teachers):
        return [each.network for each in teacher.teachers]
    return [teacher.network] if isinstance(teacher, Teacher) else []


def micro_batch_size(
    meta: nn.Module, cfg: Config, teacher: Teacher | Teachers | CachedTeacher | None, *, assumed: bool = False
) -> int:
    """The most images in one pass of one device that fit the memory free now, and no more than its share of the global
    batch.

    Raises UsageError when not even one fits.
    """
    fixed, per_image = needed(meta, cfg, teacher)
    room = int((FREE_SHARE * free_bytes(cfg, assumed=assumed) - fixed) / per_image)
    if room < 1:
        raise UsageError(
            f"model {cfg.model} needs about {(fixed + per_image) / 2**30:.1f} GB for one image of "
            f"{cfg.image_size} and {free_bytes(cfg, assumed=assumed) / 2**30:.1f} GB are free: a smaller "
            f"--model or --image_size"
        )
    return max(1, min(room, cfg.global_batch_size // world_size(cfg)))
