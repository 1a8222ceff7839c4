"""What is frozen stays as it was through training steps, in weights and in batch-norm statistics, and costs no
gradient."""

import copy
from functools import partial

import lightning as L
import pytest
import timm
import torch
from conftest import weights_of
from torch import nn
from torch.nn import functional as F

import datamodules
import models
from experiments import run
from lightning_modules.objectives import losses
from lightning_modules.optimization.freeze import freeze, hold_frozen
from lightning_modules.optimization.optimizers import optimizer
from lightning_modules.task import Task


def small(name):
    return models.create(name, num_outputs=5, image_size=64)


def trained(model, what):
    """The model before and after three steps on noise, the whole network in training mode but for what is held."""
    torch.manual_seed(0)
    names = freeze(model, what)
    before, made = copy.deepcopy(model), optimizer(model, "adamw", lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model.train()
        hold_frozen(model)
        output = model(torch.randn(4, 3, 64, 64))
        sum(
            F.cross_entropy(part, torch.arange(4)) for part in (output if isinstance(output, tuple) else (output,))
        ).backward()
        made.step()
    return names, before.state_dict(), model.state_dict()


@pytest.mark.parametrize(
    "make, heads",
    [
        (lambda: small("vit_ti16"), ("head.",)),
        (lambda: small("deit_ti16_distilled"), ("head.", "head_dist.")),
        (lambda: small("convnext_t"), ("head.fc.",)),
        (lambda: timm.create_model("resnet18", num_classes=5), ("fc.",)),
    ],
)
def test_a_linear_probe_moves_the_heads_alone(make, heads):
    names, before, after = trained(make(), "backbone")
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if key.startswith(heads)}  # batch-norm statistics are among the keys
    assert not moved & set(names)


def depth(name):
    part = name.split(".")
    return int(part[1]) if part[0] == "blocks" else 99


@pytest.mark.parametrize(
    "make",
    [
        lambda: small("vit_ti16"),
        lambda: small("deit_ti16_distilled"),
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=5, reg_tokens=2),
    ],
)
@pytest.mark.parametrize("what, blocks", [("0.5", 6), ("0.25", 3), ("0.01", 0), ("0.99", 11)])
def test_a_fraction_freezes_embedding_tokens_and_lower_blocks(make, what, blocks):
    model = make()
    names = freeze(model, what)
    expected = [
        name
        for name, _ in model.named_parameters()
        if depth(name) < blocks or name.startswith("patch_embed") or "." not in name
    ]
    assert names == expected and "cls_token" in names and "pos_embed" in names
    assert names == [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def test_half_of_networks_with_stages():
    def last(name):
        return freeze(models.create(name), "0.5")[-1].rsplit(".blocks.", 1)[0]

    assert last("swin_t") == last("convnext_t").replace("stages", "layers") == "layers.2"
    frozen = freeze(timm.create_model("resnet18"), "0.5")
    assert {name.split(".")[0] for name in frozen} == {"conv1", "bn1", "layer1", "layer2"}


def test_half_a_network_moves_the_other_half():
    names, before, after = trained(timm.create_model("resnet18", num_classes=5), "0.5")
    still = {key for key in before if torch.equal(before[key], after[key])}
    lower = {key for key in before if key.startswith(("conv1", "bn1", "layer1", "layer2"))}
    assert still == lower > set(names)


def test_no_chance_is_left_in_the_frozen_part():
    model = models.create("vit_ti16", num_outputs=5, image_size=64, dropout=0.5, drop_path=0.5)
    freeze(model, "0.5")
    model.train()
    hold_frozen(model)
    found = {5: [], 6: []}
    for block, outputs in found.items():
        model.blocks[block].register_forward_hook(lambda _, __, output, outputs=outputs: outputs.append(output))
    x = torch.randn(2, 3, 64, 64)
    model(x), model(x)
    assert torch.equal(*found[5]) and not torch.equal(*found[6])
    assert model.training and model.blocks[6].training and not model.blocks[5].training and not model.pos_drop.training


def test_a_network_that_learns_whole_is_left_alone():
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).train()
    hold_frozen(model)
    assert model[0].training


LINE = (
    "--data_dir pics --recipe none --image_size 32 --global_batch_size 8 --epochs 2 --workers 0 --logger csv "
    "--accelerator cpu"
)


@pytest.mark.parametrize(
    "what, still", [pytest.param("backbone", "", marks=pytest.mark.slow), ("0.5", ("conv1", "bn1", "layer1", "layer2"))]
)
def test_frozen_statistics_stay_through_a_run(pics, monkeypatch, what, still):
    monkeypatch.chdir(pics)
    line = f"{LINE} --model timm/resnet10t --lr 1e-2"
    if not (pics / "runs" / "first").exists():
        assert run.main(f"{line} --epochs 1 --name first".split()) == 0
    assert run.main(f"{line} --init runs/first --freeze {what} --name {what}".split()) == 0
    before, after = (
        weights_of(pics / "runs" / name / "checkpoints" / file)
        for name, file in (("first", "best.ckpt"), (what, "last.ckpt"))
    )
    statistics = [key for key in before if key.endswith("running_mean")]
    held = [key for key in statistics if key.removeprefix("model.").startswith(still)]
    assert len(statistics) == 14 and [key for key in statistics if torch.equal(before[key], after[key])] == held
    assert len(held) == 14 if what == "backbone" else 0 < len(held) < 14


@pytest.mark.parametrize(
    "name, what, args",
    [
        ("vit_nano4", "backbone", {"embed_dim": 32, "depth": 2, "dropout": 0.5, "drop_path": 0.5}),
        ("timm/resnet10t", "0.5", {"drop_rate": 0.5}),
        (
            "timm/vit_tiny_patch16_224",
            "0.5",
            {"depth": 4, "embed_dim": 48, "img_size": 32, "drop_path_rate": 0.5, "proj_drop_rate": 0.5},
        ),
    ],
)
def test_frozen_parts_are_in_evaluation_mode_in_every_step_of_a_stock_trainer(tmp_path, name, what, args):
    data = datamodules.create("digits", image_size=32, global_batch_size=256, workers=0)
    model = models.create(name, num_outputs=10, **args)
    frozen, expected = {*freeze(model, what)}, copy.deepcopy(model).train()
    hold_frozen(expected)
    task = Task(
        model,
        data.spec,
        {},
        loss=losses.create("cross_entropy", data.spec),
        schedule=lambda step: 1e-3,
        seed=0,
        make_optimizer=partial(optimizer, name="adamw", lr=1e-3, weight_decay=0.0),
    )
    modes, step = [], task.training_step
    task.training_step = lambda *given: (modes.append([module.training for module in model.modules()]), step(*given))[1]
    trainer = L.Trainer(
        max_epochs=2,
        limit_train_batches=2,
        limit_val_batches=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        accelerator="cpu",
    )
    trainer.fit(task, data)
    assert frozen and modes == [[module.training for module in expected.modules()]] * 4 and not all(modes[0])


@pytest.mark.parametrize("what", ["head", "0", "1", "1.5", "-0.5", "nan", ""])
def test_nonsense_is_refused(what):
    with pytest.raises(ValueError, match=f"--freeze {what}: give `backbone`, or a fraction"):
        freeze(small("vit_ti16"), what)


def test_a_network_without_a_head_cannot_be_probed():
    model = models.create("vit_ti16", image_size=64)
    model.reset_classifier(0)
    with pytest.raises(ValueError, match="--freeze: the network has no classifier"):
        freeze(model, "backbone")
