"""Speed against peers: python experiments/benchmark.py step --family vit --precision bf16, or benchmark.py data
--data_dir DIR

`step` times forward and backward of the same network, batch and precision as ours and as timm, torchvision and
vit-pytorch write it, in one process and interleaved: every round runs each once, in a shuffled order, so that a noisy
machine is noisy to all. In the same way `data` times training batches, ours from the picture cache and from files, and
timm's; `distill` one student's training step without a teacher, with a cached one and with the live one; `tracking` a
step with all that a run logs and with none; `load` a step beside busy processes; `memory` the forecast of a plan beside
the peak on a GPU.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a checkout need not be installed
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import timm
import torch
import torchvision
from timm.layers import set_fused_attn
from torch import nn
from torch.nn import functional as F

import models
from datamodules.loading.decode import PictureError
from experiments.benchmarks import distill
from experiments.cli.errors import Parser, piped

Makers = dict[str, Callable[[], nn.Module]]


def _timm(name: str, fused: bool) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        set_fused_attn(fused)  # read when the layers are built
        return timm.create_model(name)

    return make


def _torchvision_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(224, 16, 12, 6, 384, 1536)


def _lucidrains(kind: str) -> nn.Module:
    import vit_pytorch

    kind_of = {"vit": vit_pytorch.ViT, "simple_vit": vit_pytorch.SimpleViT}[kind]
    return kind_of(image_size=224, patch_size=16, num_classes=1000, dim=384, depth=12, heads=6, mlp_dim=1536)


def contenders(family: str) -> tuple[str, dict[str, Any], Makers]:
    """Our name and arguments, and who stands beside it."""
    if family == "vit":
        return (
            "vit_s16",
            {},
            {
                "timm": _timm("vit_small_patch16_224", False),
                "timm fused": _timm("vit_small_patch16_224", True),
                "vit-pytorch": lambda: _lucidrains("vit"),
                "torchvision": _torchvision_vit,
            },
        )
    if (
        family == "simple_vit"
    ):  # ours beside it is vit-pytorch's network; big_vision's own tanh GELU has a slow bf16 kernel on CPU
        same = {"patch_norm": True, "qkv_bias": False, "out_bias": False, "gelu": "erf", "norm_eps": 1e-5}
        return (
            "simple_vit_s16",
            same,
            {"vit-pytorch": lambda: _lucidrains("simple_vit"), "tanh GELU": lambda: models.create("simple_vit_s16")},
        )
    if family == "deit":
        name = "deit_small_distilled_patch16_224"
        return "deit_s16_distilled", {}, {"timm": _timm(name, False), "timm fused": _timm(name, True)}
    if family == "swin":
        name = "swin_tiny_patch4_window7_224"
        return (
            "swin_t",
            {},
            {"timm": _timm(name, False), "timm fused": _timm(name, True), "torchvision": torchvision.models.swin_t},
        )
    return "convnext_t", {}, {"timm": _timm("convnext_tiny", False), "torchvision": torchvision.models.convnext_tiny}


def seconds(model: nn.Module, images: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype | None) -> float:
    """One forward and backward pass with cross entropy, in seconds."""
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        logits = model(images)
    F.cross_entropy((logits[0] if isinstance(logits, tuple) else logits).float(), targets).backward()
    if images.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def step(family: str, precision: str, batch: int, rounds: int, channels_last: bool) -> None:
    """Print images/s of each contender (median over rounds), and ours over the fastest peer: ratio of medians,
    quartiles of the rounds'."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if precision == "bf16" else None
    ours, arguments, peers = contenders(family)
    makers: Makers = {"vitlab": lambda: models.create(ours, **arguments), **peers}
    if "vit-pytorch" in makers and find_spec("vit_pytorch") is None:
        print("vit-pytorch is not installed and left out")
        del makers["vit-pytorch"]
    made = {name: make().to(device).train() for name, make in makers.items()}
    if hasattr(made["vitlab"], "set_distilled_training"):
        made["vitlab"].set_distilled_training(False)
    images, targets = torch.randn(batch, 3, 224, 224, device=device), torch.randint(1000, (batch,), device=device)
    if channels_last:
        images, made = (
            images.contiguous(memory_format=torch.channels_last),
            {name: model.to(memory_format=torch.channels_last) for name, model in made.items()},
        )
    times: dict[str, list[float]] = {name: [] for name in made}
    for number in range(rounds + 2):  # two to warm up
        for name in random.sample(list(made), len(made)):
            taken = seconds(made[name], images, targets, dtype)
            if number >= 2:
                times[name].append(taken)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{ours}, batch {batch}, 224 px, {precision}, {rounds} interleaved rounds, {where}, torch {torch.__version__}"
    )
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name in sorted(medians, key=medians.get):
        print(f"  {name:<12}{batch / medians[name]:>9.1f} images/s")
    fastest = min((name for name in medians if name not in ("vitlab", "tanh GELU")), key=medians.get)
    ratios = sorted(theirs / own for own, theirs in zip(times["vitlab"], times[fastest]))
    low, _, high = statistics.quantiles(ratios, n=4)
    print(
        f"  vitlab / {fastest}: {medians[fastest] / medians['vitlab']:.3f} (quartiles of the rounds {low:.3f} to "
        f"{high:.3f})"
    )


def _data(args: argparse.Namespace) -> int:
    from experiments.benchmarks import data

    words = {
        "data_dir": args.data_dir,
        "image_size": args.image_size,
        "interpolation": args.interpolation,
        "cache_side": args.cache_side,
        "global_batch_size": args.batch,
    }
    try:
        data.measure(words, args.cache_dir, args.rounds, args.batches)
    except (ValueError, OSError, PictureError) as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="benchmark.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("step", help="forward and backward of one family against its peers")
    verb.add_argument("--family", choices=["vit", "simple_vit", "deit", "swin", "convnext"], default="vit")
    verb.add_argument("--channels_last", action="store_true", help="memory order NHWC for all")
    taught = verbs.add_parser("distill", help="a training step without a teacher, with a cached one, with the live one")
    taught.add_argument("--student", default="deit_s16_distilled", help="a name of run.py --list models")
    taught.add_argument("--teacher", default="timm/regnety_160", help="a name of run.py --list models; random weights")
    taught.add_argument("--rows", type=int, default=100_000, help="answers in the cached epoch")
    taught.add_argument("--topk", type=int, default=10, help="classes stored of each")
    for each in (verb, taught):
        each.add_argument("--precision", choices=["float32", "bf16"], default="float32")
        each.add_argument("--batch", type=int, default=8, help="pictures in a step")
        each.add_argument("--rounds", type=int, default=15, help="interleaved rounds after two to warm up, at least 2")
    verb = verbs.add_parser(
        "data", help="training batches from the picture cache and from files, and timm's, on one core"
    )
    verb.add_argument("--data_dir", required=True, help="folder with train/<class>/")
    verb.add_argument("--image_size", type=int, default=224, help="side of training crops")
    verb.add_argument("--cache_dir", help="of a cache to keep; left out: a temporary folder")
    verb.add_argument(
        "--cache_side", type=int, help="shorter side of cached pictures; left out: what evaluation resizes to"
    )
    verb.add_argument("--interpolation", choices=["bicubic", "bilinear"], default="bicubic", help="of all contenders")
    verb.add_argument("--batch", type=int, default=64, help="pictures in a batch")
    verb.add_argument("--batches", type=int, default=4, help="of each contender in a round")
    verb.add_argument("--rounds", type=int, default=15, help="interleaved rounds after one to warm up, at least 2")
    verb = verbs.add_parser("tracking", help="a training step with everything a run logs, and with none of it")
    verb.add_argument("--model", default="vit_nano4", help="a name of run.py --list models")
    verb.add_argument("--batch", type=int, default=16, help="pictures in a step")
    verb.add_argument(
        "--rounds", type=int, default=15, help="interleaved pairs of blocks after two to warm up, at least 2"
    )
    verb.add_argument("--log_every_steps", type=int, default=50, help="steps of a block, which ends with a row")
    verb = verbs.add_parser(
        "load", help="a training step quiet and beside busy processes, with OpenMP's default wait and with ours"
    )
    verb.add_argument("--model", default="vit_nano4", help="a name of run.py --list models")
    verb.add_argument("--batch", type=int, default=64, help="pictures in a step")
    verb.add_argument(
        "--rounds", type=int, default=3, help="interleaved rounds, at least 2; each measurement is a process of its own"
    )
    verb.add_argument("--busy", type=int, default=5, help="busy processes beside the training")
    verb = verbs.add_parser("memory", help="the memory that a plan forecasts, beside the peak of real steps on a GPU")
    verb.add_argument("--batch", type=int, default=64, help="images in a step")
    verb.set_defaults(rounds=2)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.batch < 1 or args.rounds < 2:
        parser.error("--batch must be at least 1 and --rounds at least 2")
    if args.verb == "tracking" and args.log_every_steps < 1:
        parser.error("--log_every_steps must be at least 1")
    try:
        for flag in {"model", "student", "teacher"} & vars(args).keys():
            models.check_name(getattr(args, flag))
    except ValueError as error:
        parser.error(f"--{flag}: {error}")
    if args.verb == "data":
        return _data(args)
    if args.verb == "tracking":
        from experiments.benchmarks import tracking

        tracking.measure(args.model, args.batch, args.rounds, args.log_every_steps)
    elif args.verb == "memory":
        if not torch.cuda.is_available():
            parser.error("memory is measured on a GPU, and PyTorch finds none")
        from experiments.benchmarks import memory

        memory.measure(args.batch)
    elif args.verb == "load":
        from experiments.benchmarks import load

        load.measure(args.model, args.batch, args.rounds, args.busy)
    elif args.verb == "step":
        step(args.family, args.precision, args.batch, args.rounds, args.channels_last)
    else:
        distill.measure(args.student, args.teacher, args.precision, args.batch, args.rounds, args.rows, args.topk)
    return 0


if __name__ == "__main__":
    sys.exit(piped(main))
