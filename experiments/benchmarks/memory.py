"""`benchmark.py memory`: the memory that a plan forecasts, beside the peak of real training steps on a GPU."""

import torch
from torch.nn import functional as F

import models
from experiments.config import parse
from experiments.running import memory
from lightning_modules.optimization.freeze import freeze, hold_frozen

MODELS = ("vit_s16", "vit_b16", "swin_t", "convnext_t", "deit_s16_distilled", "timm/resnet50")
CASES = [(name, "") for name in MODELS] + [("vit_b16", "--freeze 0.5"), ("vit_b16", "--precision 32-true")]


def measure(batch: int) -> None:
    """Print forecast, measured peak and their ratio of three AdamW steps of each case at 224 px."""
    print(f"batch {batch}, 224 px, bf16, {torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name, flags in CASES:
        line = f"--model {name} --data digits --image_size 224 --recipe none --precision bf16-mixed {flags}"
        cfg = parse(line.split())
        with torch.device("meta"):
            fixed, per_image = memory.needed(models.create(name, 1000, 224), cfg)
        forecast, real = fixed + batch * per_image, _peak(name, batch, cfg.freeze, cfg.precision == "bf16-mixed")
        print(
            f"  {f'{name} {flags}':<32}{forecast / 2**20:>8.0f} MiB forecast,{real / 2**20:>8.0f} measured, ratio "
            f"{forecast / real:.3f}"
        )


def _peak(name: str, batch: int, frozen: str | None, half: bool) -> int:
    """The most bytes allocated in three steps."""
    network = models.create(name, 1000, 224).cuda().train()
    if frozen:
        freeze(network, frozen)
        hold_frozen(network)
    optimizer = torch.optim.AdamW([each for each in network.parameters() if each.requires_grad], foreach=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        images, targets = torch.randn(batch, 3, 224, 224).cuda(), torch.randint(1000, (batch,)).cuda()
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            logits = network(images)
        F.cross_entropy((logits[0] if isinstance(logits, tuple) else logits).float(), targets).backward()
        optimizer.step()
    return torch.cuda.max_memory_allocated()
