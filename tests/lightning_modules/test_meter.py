"""What a row tells beside the losses: norms, rates of the groups, where a step's time goes, operations and their share
of the peak."""

import contextlib
import json
import math
import os
import re
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import FORKS, result_of
from lightning.fabric.utilities.throughput import _CUDA_FLOPS
from timm.optim import param_groups_layer_decay
from torch.utils._python_dispatch import TorchDispatchMode

import models
from lightning_modules.callbacks import meter, progress
from lightning_modules.callbacks.gpu_peak_flops import peak_flops
from lightning_modules.loggers.csv_logger import read_history
from lightning_modules.task import Task
from models import cost

TINY = (
    "--data_dir pics --image_size 16 --model vit_nano4 --model_args.embed_dim 32 --model_args.depth 2 --epochs 2 "
    "--accelerator cpu "
    "--recipe none --global_batch_size 8 --lr 2e-3 --workers 0 --logger csv --name it --log_every_steps 2"
)


def rows_of(folder: Path) -> list[dict[str, float]]:
    return read_history(folder / "runs" / "it" / "metrics.csv")


def tell_norms() -> None:
    """Each step's norms in float64, before clipping, into norms.jsonl."""
    before_step = Task.on_before_optimizer_step

    def spy(self: Task, optimizer: torch.optim.Optimizer) -> None:
        if self.global_rank == 0:

            def norm(values: list) -> float:
                return math.sqrt(sum(float(value.double().square().sum()) for value in values))

            trained = [each for each in self.parameters() if each.requires_grad]
            with open("norms.jsonl", "a") as file:
                print(json.dumps([norm([each.grad for each in trained]), norm(trained)]), file=file)
        before_step(self, optimizer)

    Task.on_before_optimizer_step = spy


@pytest.mark.parametrize("ranks", [1, 2])
def test_norms_are_those_of_the_rows_last_step_before_clipping(pics, launch, ranks):
    ended = launch(f"{TINY} --clip_grad 0.01 --micro_batch_size 2 --devices {ranks}", before=tell_norms, ranks=ranks)
    assert ended.code == 0, ended.out
    steps = [json.loads(line) for line in (pics / "norms.jsonl").read_text().splitlines()]
    rows = rows_of(pics)
    assert len(steps) == result_of(pics / "runs" / "it")["steps"] == rows[-1]["step"]
    for row in rows:
        assert [row["optim/grad_norm"], row["optim/param_norm"]] == pytest.approx(steps[int(row["step"]) - 1], rel=1e-5)
    assert min(row["optim/grad_norm"] for row in rows) > 0.1  # clipped it is 0.01


def tell_losses() -> None:
    """Each pass's epoch, loss and accuracy into losses.jsonl, of all ranks; every step is due for a line."""
    losses, progress.LINE_SECONDS = Task.losses, 0.0

    def spy(self: Task, batch: dict) -> dict:
        told = losses(self, batch)
        with open("losses.jsonl", "a") as file:
            print(json.dumps([self.current_epoch, told["loss"].item(), told["acc1"].item()]), file=file)
        return told

    Task.losses = spy


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_epochs_row_and_line_are_of_the_whole_epoch_also_over_a_resume(pics, launch, ranks):
    line = f"{TINY} --log_every_steps 3 --micro_batch_size 2 --save_every_steps 1 --devices {ranks}"
    if ranks == 1:
        assert launch(line, before=tell_losses, kill_at_step=6).code == -9
    ended = launch(line, before=tell_losses, ranks=ranks)
    assert ended.code == 0, ended.out
    told = [json.loads(each) for each in (pics / "losses.jsonl").read_text().splitlines()]
    assert len(told) == 2 * 4 * 4  # epochs, steps, passes over all ranks
    for epoch, row in enumerate(row for row in rows_of(pics) if "val/acc1" in row):
        loss, right = (sum(each[k] for each in told if each[0] == epoch) / 16 for k in (1, 2))
        assert row["epoch"] == epoch and [row["train/loss"], row["train/acc1"]] == pytest.approx(
            [loss, right], rel=1e-6
        )
        if ranks > 1 or epoch:
            assert f"epoch {epoch + 1}/2 | loss {loss:.4f} | train/acc1 {100 * right:.2f} %" in ended.out, ended.out
    steps = re.findall(
        r"^epoch [12]/2 \| step (\d)/8 \|(?: loss [\d.]+ \|)? [\d.]+ images/s \| \d+:\d\d left$",
        ended.out,
        re.MULTILINE,
    )
    assert steps == [*"12345678"[6 * (ranks == 1) :]] and "epoch 2/2 | validation, batch 1/" in ended.out, ended.out


def count_time(a_picture: float, a_pass: float, peak: float | None = None) -> None:
    """Let only pictures and passes through the network take time, by a clock that stands still else."""
    from datamodules.loading.images import TrainPictures

    clock, sample, losses = SimpleNamespace(now=0.0), TrainPictures._sample, Task.losses

    def slow_sample(self: TrainPictures, *given: object) -> dict:
        clock.now += a_picture
        return sample(self, *given)

    def slow_losses(self: Task, batch: dict) -> dict:
        clock.now += a_pass
        return losses(self, batch)

    TrainPictures._sample, Task.losses = slow_sample, slow_losses
    meter.time = SimpleNamespace(monotonic=lambda: clock.now)
    meter.device_peak = lambda *given: peak


def test_where_the_time_of_a_step_goes(pics, launch):
    """Two passes of four pictures a step; 36 pictures are four steps and a half, so an epoch has four."""
    ended = launch(f"{TINY} --micro_batch_size 4 --log_every_steps 50", before=partial(count_time, 0.25, 2.0, 1e12))
    assert ended.code == 0, ended.out
    first, second = rows_of(pics)
    for row in (first, second):
        fetched = 8 * 4 * 0.25
        assert row["perf/step_seconds"] == pytest.approx((8 * 2.0 + fetched) / 4)
        assert row["perf/images_per_sec"] == pytest.approx(8 / row["perf/step_seconds"])
        assert row["perf/data_wait_share"] == pytest.approx(fetched / (8 * 2.0 + fetched))
        network = models.create("vit_nano4", 3, 16, embed_dim=32, depth=2).train()
        flops = cost.training_flops(network, torch.zeros(2, 3, 16, 16))
        assert row["perf/tflops_per_device"] == pytest.approx(row["perf/images_per_sec"] * flops / 1e12)
        assert row["perf/mfu"] == pytest.approx(row["perf/tflops_per_device"])
        assert row["perf/memory_mb"] > 50
    assert (
        first["perf/hours_left"] == pytest.approx(4 * second["perf/step_seconds"] / 3600, rel=0.3)
        and second["perf/hours_left"] == 0
    )


def test_groups_with_a_share_of_the_rate_have_a_column_each(pics, launch):
    ended = launch(f"{TINY} --layer_decay 0.5 --epochs 1")
    assert ended.code == 0, ended.out
    network = models.create("vit_nano4", 3, 16, embed_dim=32, depth=2)
    scales = {f"{group['lr_scale']:.4g}" for group in param_groups_layer_decay(network, layer_decay=0.5)} - {"1"}
    for row in rows_of(pics):
        assert {key for key in row if key.startswith("lr/")} == {f"lr/x{scale}" for scale in scales} and len(
            scales
        ) == 3
        assert all(row[f"lr/x{scale}"] == pytest.approx(row["lr"] * float(scale)) for scale in scales)


@pytest.mark.parametrize(
    "name, stem",
    [
        ("vit_ti16", 196 * 768 * 192),
        ("timm/resnet50", 112 * 112 * 147 * 64),
        ("convnext_t", 56 * 56 * 48 * 96),
        ("timm/regnety_016", 112 * 112 * 27 * 32),
    ],
)
def test_training_is_three_forward_passes_without_the_pictures_gradient(name, stem):
    """Grouped and depthwise convolutions too, which PyTorch's own count of the backward pass gets wrong."""
    network = models.create(name).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    flops = cost.training_flops(network, torch.zeros(2, 3, 224, 224))
    with torch.device("meta"):
        forward = cost.gmacs(models.create(name), (224, 224))
    assert flops == pytest.approx(2 * (3e9 * forward - stem), rel=1e-6)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    "name",
    [
        "vit_ti16",
        "simple_vit_ti16",
        "deit_ti16_distilled",
        "deit3_s16",
        "vit5_s16",
        "swin_t",
        "convnext_t",
        "convnext_step_0",
        "timm/test_efficientnet",
        "timm/eva02_tiny_patch14_224",
    ],
)
def test_counting_leaves_a_network_as_it_was(name):
    """Tensors that modules share, as ViT-5's rotary positions, and those in no state dict too."""
    network = models.create(name, 10).train()
    side = models.preprocessing(name)["image_size"][0]
    before = {key: value.clone() for key, value in [*network.named_parameters(), *network.named_buffers()]}
    assert cost.training_flops(network, torch.zeros(2, 3, side, side)) > 1e6
    after = dict([*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)])
    assert all(value.device.type == "cpu" for value in after.values()) and before.keys() <= after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_what_is_computed_anew_is_not_counted():
    network, pictures = models.create("vit_nano4", 10), torch.zeros(2, 3, 32, 32)
    counted = cost.training_flops(network, pictures)
    network.set_grad_checkpointing()
    assert cost.training_flops(network, pictures) == counted and network.grad_checkpointing


def count_nothing() -> None:
    def fail(*given: object) -> float:
        raise NotImplementedError("no such operation on meta")

    cost.training_flops = fail


def test_a_network_that_cannot_be_counted_costs_a_warning(pics, launch):
    ended = launch(f"{TINY} --epochs 1 --log_every_steps 2", before=count_nothing)
    assert ended.code == 0 and ended.out.count("perf/tflops_per_device could not be made: NotImplementedError") == 1, (
        ended.out
    )
    assert all("perf/images_per_sec" in row and "perf/tflops_per_device" not in row for row in rows_of(pics))


def test_what_is_frozen_costs_no_gradient():
    network = models.create("vit_nano4", 10, 32).train()
    whole = cost.training_flops(network, torch.zeros(2, 3, 32, 32))
    for key, parameter in network.named_parameters():
        parameter.requires_grad_(key.startswith("head."))
    with torch.device("meta"):
        forward = cost.gmacs(models.create("vit_nano4", 10, 32), (32, 32))
    head_alone = cost.training_flops(network, torch.zeros(2, 3, 32, 32))
    assert head_alone == pytest.approx(2e9 * forward + 2 * 128 * 10) and head_alone < whole / 2.5


@pytest.mark.parametrize(
    "name, chip",
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100 sxm"),
        ("NVIDIA H100 PCIe", "h100 pcie"),
        ("NVIDIA L4", "l4"),
    ],
)
def test_peaks_are_lightnings_where_it_is_right(name, chip):
    theirs = _CUDA_FLOPS[chip]
    assert peak_flops(name, "bf16-mixed") == pytest.approx(theirs[torch.bfloat16], rel=0.01)
    assert peak_flops(name, "32-true") == pytest.approx(theirs[torch.float32], rel=0.01)
    assert peak_flops(name, "32-true", tf32=True) == pytest.approx(theirs["tfloat32"], rel=0.01)


def test_peaks_that_lightning_has_not_or_with_sparsity():
    """Why the table is our own: the H100 NVL has less than the SXM card, and H200's plain name is not found."""
    assert _CUDA_FLOPS["h100 nvl"][torch.bfloat16] > 1.9 * _CUDA_FLOPS["h100 sxm"][torch.bfloat16]
    assert (
        peak_flops("NVIDIA H100 NVL", "bf16-mixed")
        < peak_flops("NVIDIA H100 80GB HBM3", "bf16-mixed")
        == peak_flops("NVIDIA H200", "bf16-mixed")
    )


def test_peaks_of_names_and_precisions():
    assert peak_flops("NVIDIA A10G", "bf16-mixed") == 70e12 and peak_flops("NVIDIA A10", "bf16-mixed") == 125e12
    assert (
        peak_flops("NVIDIA L40S", "bf16-mixed") == 362e12 and peak_flops("NVIDIA A100-PCIE-40GB", "16-mixed") == 312e12
    )
    assert peak_flops("Tesla T4", "16-mixed", 7) == 65e12 and peak_flops("Tesla T4", "bf16-mixed", 7) is None
    assert (
        peak_flops("Tesla T4", "32-true", 7, tf32=True) == 8.1e12
        and peak_flops("Tesla V100-SXM2-16GB", "16-mixed", 7) == 125e12
    )
    assert (
        peak_flops("NVIDIA T400 4GB", "16-mixed", 7) is None
        and peak_flops("NVIDIA GeForce RTX 3080 Ti", "bf16-mixed") is None
    )
    assert (
        peak_flops("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16-mixed") is None
        and peak_flops("Some Accelerator", "bf16-mixed") is None
    )


def _benchmark(log: str) -> None:
    from experiments import benchmark

    with open(log, "w") as file, contextlib.redirect_stdout(file):
        benchmark.main(["tracking", "--model", "vit_nano4", "--batch", "2", "--rounds", "2", "--log_every_steps", "2"])


def test_the_benchmark_times_both_sides_and_what_lies_between(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    child = FORKS.Process(target=_benchmark, args=(str(tmp_path / "log"),))
    child.start()
    child.join(100)
    said = (tmp_path / "log").read_text()
    assert child.exitcode == 0 and "2 interleaved pairs" in said
    share = float(re.search(r"tracking +([\d.]+) % of a step", said)[1])
    assert share > 0 and len(re.findall(r"ms a step without, [\d.]+ ms with: [\d.]+ \(quartiles", said)) == 2


@pytest.mark.parametrize(
    "line, words",
    [
        ("--model vit_nan4", "--model: no model named vit_nan4; did you mean vit_nano4"),
        ("--log_every_steps 0", "--log_every_steps must be at least 1"),
    ],
)
def test_a_wrong_benchmark_is_one_line(capsys, line, words):
    from experiments import benchmark

    with pytest.raises(SystemExit) as stop:
        benchmark.main(["tracking", *line.split()])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def note_reads() -> None:
    """reads.txt: for each call of the hooks in a step, how many numbers it has read from the device, and whether it
    told a row."""
    told, counts, progress.LINE_SECONDS = [], [], 0.0

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default or "cpu" in str((kwargs or {}).get("device")):
                counts.append(str(func))
            return func(*args, **(kwargs or {}))

    log = meter.Meter._log
    meter.Meter._log = lambda self, *given: (told.append(1), log(self, *given))[1]

    def watch(kind: type, name: str) -> None:
        original = getattr(kind, name)

        def hook(self: Any, *given: Any) -> None:
            told.clear(), counts.clear()
            with Reads():
                original(self, *given)
            with open("reads.txt", "a") as file:
                print(name, len(counts), bool(told), file=file)

        setattr(kind, name, hook)

    for name in ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"):
        watch(meter.Meter, name)
    watch(progress.Progress, "on_train_batch_end")


def test_a_step_without_a_row_reads_nothing_from_the_device(pics, launch):
    ended = launch(f"{TINY} --log_every_steps 3", before=note_reads)
    assert ended.code == 0, ended.out
    calls = [line.split() for line in (pics / "reads.txt").read_text().splitlines()]
    assert len(calls) == 4 * 8 and {read for _, read, told in calls if told == "False"} == {"0"}
    assert {name for name, read, told in calls if told == "True" and int(read) > 0} == {"on_train_batch_end"}


def leave_in_validation() -> None:
    count_time(0.25, 2.0)
    validate = Task.validation_step

    def validation_step(self: Task, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 4 and not Path("left").exists():
            Path("left").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(self, batch, batch_idx)

    Task.validation_step = validation_step


def test_leaving_between_an_epochs_last_step_and_its_row_loses_nothing_of_it(pics, launch):
    line = f"{TINY} --save_every_steps 1 --log_every_steps 3"
    assert launch(f"{line} --overwrite", before=partial(count_time, 0.25, 2.0)).code == 0
    whole = rows_of(pics)
    assert launch(f"{line} --overwrite", before=leave_in_validation).code == 75
    assert launch(line, before=partial(count_time, 0.25, 2.0)).code == 0
    for row, other in zip(rows_of(pics), whole, strict=True):
        assert row | {"perf/memory_mb": 0} == pytest.approx(other | {"perf/memory_mb": 0})
