"""Learning from a teacher, from the command line and in the task."""

import pytest
import torch
from conftest import result_of, weights_of, write_pictures
from small_runs import TINY, rows_of
from timm.loss import SoftTargetCrossEntropy
from torch import nn
from torch.nn import functional as F

import models
from experiments import run
from lightning_modules.distiller import Distiller
from lightning_modules.objectives import distill_losses, losses
from lightning_modules.optimization.optimizers import optimizer
from lightning_modules.teachers.teacher import Teacher

HALF = (0.5, 0.5, 0.5)
SPEC = {"task": "classification", "num_outputs": 5, "class_names": list("abcde"), "mean": HALF, "std": HALF}
SMALL = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8}


def student(name="vit_s16", loss="hard", teacher=None, alpha=None, widths=None, **model_args):
    torch.manual_seed(1)
    network = models.create(name, 5, 32, **SMALL, **model_args)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return Distiller(
        network,
        SPEC,
        {},
        loss=losses.create("cross_entropy", SPEC, 0.1),
        schedule=lambda step: 0.1,
        make_optimizer=lambda model: optimizer(model, "sgd", lr=0.1, weight_decay=0.0),
        seed=0,
        teacher=teacher or guide(),
        distill=distill_losses.create(loss, "classification", widths),
        weights=distill_losses.weights(loss, alpha),
    )


def guide():
    torch.manual_seed(2)
    network = models.create("vit_s16", 5, 32, **SMALL | {"embed_dim": 48})
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return Teacher(network, mean=HALF, std=HALF, student_mean=HALF, student_std=HALF)


def mixed():
    torch.manual_seed(3)
    return {"image": torch.randn(6, 3, 32, 32), "target": torch.rand(6, 5).softmax(1)}


@pytest.mark.parametrize("name, args", [("deit_s16_distilled", {}), ("vit_s16", {"dist_head": True}), ("vit_s16", {})])
def test_total_is_deits_on_its_two_heads(name, args):
    task, batch = student(name, alpha=0.3, **args), mixed()
    task.train()
    output = task.model(batch["image"])
    first, second = output if isinstance(output, tuple) else (output, output)
    assert isinstance(output, tuple) == (name != "vit_s16" or bool(args))
    base = SoftTargetCrossEntropy()(first, batch["target"])
    hard = F.cross_entropy(second, task.teacher.network(batch["image"]).argmax(1))
    found = task.losses(batch)
    assert found["loss"].item() == pytest.approx((0.7 * base + 0.3 * hard).item(), rel=1e-6)
    found["loss"].backward()
    assert all(parameter.grad is not None for parameter in task.parameters())  # nothing for DDP to miss


def test_the_teacher_is_no_part_of_the_student_and_never_moves():
    task = student("deit_s16_distilled", "soft")
    before = {key: value.clone() for key, value in task.teacher.network.state_dict().items()}
    learner = task.configure_optimizers()
    held = {id(parameter) for group in learner.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in task.model.parameters()} and all(
        key.startswith("model.") for key in task.state_dict() if "metrics" not in key
    )
    task.train()
    for _ in range(3):
        learner.zero_grad()
        task.losses(mixed())["loss"].backward()
        learner.step()
    assert not task.teacher.network.training
    assert all(torch.equal(before[key], value) for key, value in task.teacher.network.state_dict().items())


def test_features_bring_their_projection_to_the_optimizer():
    task = student("vit_s16", "features", widths=(32, 48))
    group = task.configure_optimizers().param_groups[-1]
    assert {id(parameter) for parameter in group["params"]} == {
        id(parameter) for parameter in task.distill.parameters()
    }
    task.train()
    task.losses(mixed())["loss"].backward()
    assert all(parameter.grad is not None for parameter in task.parameters())


def test_a_student_that_is_its_teacher_has_nothing_to_learn(pics, launch):
    assert launch(f"{TINY} --epochs 1 --name teacher").code == 0
    line = TINY.replace("--model_args.drop_path 0.2", "--model_args.drop_path 0.0")
    ended = launch(
        f"{line} --epochs 1 --lr 0 --init runs/teacher --teacher runs/teacher --distill soft --distill_args.alpha 1 "
        f"--mixup 0.8 "
        "--random_erasing 0.5 --name student"
    )
    assert ended.code == 0, ended.out
    row = rows_of(pics / "runs" / "student")[-1]
    assert abs(float(row["train/loss"])) < 1e-6 < float(row["train/base_loss"])


def test_killed_twice_with_a_teacher_ends_as_if_nothing_had_happened(pics, launch):
    assert launch(f"{TINY} --epochs 2 --name teacher").code == 0
    line = (
        f"{TINY} --epochs 3 --save_every_steps 3 --teacher runs/teacher --model_args.dist_head true --mixup 0.8 "
        f"--ema_decay 0.9 "
        "--distill_args.warmup_epochs 2"
    )
    assert launch(f"{line} --name whole").code == 0
    for step in (5, 7):
        assert launch(f"{line} --name killed", kill_at_step=step).code == -9
    assert launch(f"{line} --name killed").code == 0
    whole, killed = (pics / "runs" / name / "checkpoints" / "last.ckpt" for name in ("whole", "killed"))
    first, second = weights_of(whole), weights_of(killed)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert any("head_dist" in key for key in first) and not any("teacher" in key for key in first)
    scored = launch("--eval_only --init runs/whole --logger csv --workers 0 --name scored")
    assert scored.code == 0, scored.out
    assert result_of(pics / "runs" / "scored")["test/acc1"] == result_of(pics / "runs" / "whole")["test/acc1"]


def test_the_share_of_the_teacher_rises_over_its_warm_up(tmp_path, monkeypatch, capsys):
    write_pictures(tmp_path / "pics" / "train", {"dark": 10, "light": 10})
    monkeypatch.chdir(tmp_path)
    line = f"{TINY} --accelerator cpu --lr 1e-2 --warmup_steps 0"
    assert run.main(f"{line} --epochs 1 --name teacher".split()) == 0
    taught = f"{line} --epochs 3 --teacher runs/teacher --distill dkd --distill_args.beta 8"
    assert run.main(f"{taught} --name student --distill_args.warmup_epochs 2.5".split()) == 0
    for row, factor in zip(
        rows_of(tmp_path / "runs" / "student"), (0.4, 0.8, 1.0), strict=True
    ):  # mdistiller: min(epoch / warm-up, 1), from 1 on
        base, part = float(row["train/base_loss"]), float(row["train/distill_loss"])
        assert part > 1e-4 and float(row["train/loss"]) == pytest.approx(base + factor * part, rel=1e-5)
    for value in ("-1", "true", "many"):
        assert run.main(f"{taught} --name wrong --distill_args.warmup_epochs {value}".split()) == 2
        assert (
            f"warmup_epochs {value.replace('t', 'T') if value == 'true' else value}: must be" in capsys.readouterr().err
        )


def test_a_run_is_named_after_its_loss(pics, launch):
    assert launch(f"{TINY} --epochs 1 --name teacher").code == 0
    assert "-vit_nano4-hard-s0-" in launch(f"{TINY} --epochs 1 --teacher runs/teacher --dry_run").out


@pytest.mark.parametrize(
    "line, words",
    [
        ("--teacher vit_nano4", "no trained weights"),
        ("--teacher runs/none", "no such run or file"),
        ("--distill soft", "--teacher names it"),
        ("--teacher pics --distill sofft", "did you mean soft"),
        ("--teacher pics --distill soft --distill_args.tua 2", "did you mean tau"),
        ("--teacher pics --distill_args.alpha 2", "alpha 2"),
        ("--teacher pics,pics --distill features", "not of several"),
    ],
)
def test_mistakes_end_with_a_line(pics, launch, line, words):
    ended = launch(f"{TINY} --epochs 1 {line}")
    assert ended.code == 2 and words in ended.out and "Traceback" not in ended.out, ended.out
    assert not (pics / "runs").exists()
