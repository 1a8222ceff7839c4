"""The memory that a plan counts: what is trained, by its optimizer, with its copies."""

import pytest
import torch
from small_networks import SMALL

import models
from experiments import run
from experiments.config import parse
from experiments.running import forecast, memory
from lightning_modules.teachers.teacher import Teacher
from models import cost

LINE = ["--model", "vit_s16", "--data", "digits", "--image_size", "64", "--recipe", "none", "--accelerator", "cpu"]


@pytest.fixture(scope="module")
def meta():
    with torch.device("meta"):
        return models.create("vit_s16", 10, 64, **SMALL["vit_s16"])


def fixed(meta, *flags: str) -> float:
    """Bytes a parameter that do not follow the batch."""
    return memory.needed(meta, parse([*LINE, *flags]))[0] / cost.parameters(meta)


@pytest.mark.parametrize(
    "flags, bytes_each",
    [
        ("", 16),
        ("--optimizer sgd", 12),
        ("--ema_decay 0.99", 20),
        ("--precision bf16-mixed", 18),
        ("--devices 2", 20),
        ("--optimizer lamb --ema_decay 0.99 --precision bf16-mixed --devices 2", 26),
    ],
)
def test_weights_gradients_moments_and_copies(meta, flags, bytes_each):
    assert fixed(meta, *flags.split()) == pytest.approx(bytes_each)


def test_muon_keeps_one_number_of_a_hidden_weight_and_frozen_parts_none(meta):
    assert 12 < fixed(meta, "--optimizer", "muon") < 14
    head = sum(each.numel() for name, each in meta.named_parameters() if name.startswith("head."))
    assert fixed(meta, "--freeze", "backbone") == pytest.approx(4 + 12 * head / cost.parameters(meta))
    assert all(each.requires_grad for each in meta.parameters())  # the network itself is left as it is


def test_an_image_costs_what_the_largest_crop_keeps(meta):
    config, smaller = parse(LINE), parse([*LINE, "--augment_args.train_size", "32"])
    per_image, small = (memory.needed(meta, cfg)[1] for cfg in (config, smaller))
    assert per_image == cost.activation_bytes(meta.train(), (64, 64), fused=False) + 15 * 64 * 64
    assert 0.15 * per_image < small < 0.35 * per_image


def test_on_a_cpu_attention_is_written_out_in_either_precision(meta):
    plain, half = (memory.needed(meta, parse([*LINE, *flags]))[1] for flags in ((), ("--precision", "bf16-mixed")))
    gpu = memory.needed(meta, parse([*LINE[:-2], "--accelerator", "gpu", "--precision", "bf16-mixed"]))[1]
    assert gpu < half < plain


def test_a_live_teacher_counts_with_its_weights(meta):
    network = models.create("vit_s16", 10, 64, **SMALL["vit_s16"])
    spec = {"mean": [0.5] * 3, "std": [0.5] * 3, "student_mean": [0.5] * 3, "student_std": [0.5] * 3}
    teacher = Teacher(network, **spec, spec={"task": "classification"})
    alone, taught = (memory.needed(meta, parse(LINE), each)[0] for each in (None, teacher))
    assert taught - alone == 4 * cost.parameters(network)


def test_the_plan_tells_it_and_cuts_passes_by_it(monkeypatch, capsys, tmp_path):
    """What fits 1 GB: 16 bytes a weight and, at 224 px without fused attention, some 100 MB an image."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "free_memory", lambda: 2**30)
    monkeypatch.setattr(forecast, "images_per_second", lambda *_: 100.0)
    line = "--model vit_s16 --data digits --recipe none --accelerator cpu --global_batch_size 64 --dry_run"
    assert run.main(line.split()) == 0
    out = capsys.readouterr().out
    with torch.device("meta"):
        network = models.create("vit_s16", 10).train()
    room = 0.8 * 2**30 - 16 * cost.parameters(network)
    most = int(room / (cost.activation_bytes(network, (224, 224), fused=False) + 15 * 224**2))
    assert 1 < most < 64 and f"copies {16 * cost.parameters(network) / 2**30:.2f}; " in out
    micro = int(out.split(" passes x ")[1].split()[0])
    assert micro <= most < 2 * micro + 1
