"""What is frozen stays as it was through training steps, in weights and in batch-norm statistics, and costs no gradient."""
import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import models
from lightning_modules.freeze import freeze, hold_frozen
from lightning_modules.optim import optimizer


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
        sum(F.cross_entropy(part, torch.arange(4)) for part in (output if isinstance(output, tuple) else (output,))).backward()
        made.step()
    return names, before.state_dict(), model.state_dict()


@pytest.mark.parametrize("make, heads", [(lambda: small("vit_ti16"), ("head.",)), (lambda: small("deit_ti16_distilled"), ("head.", "head_dist.")),
                                         (lambda: small("convnext_t"), ("head.fc.",)),
                                         (lambda: timm.create_model("resnet18", num_classes=5), ("fc.",))])
def test_a_linear_probe_moves_the_heads_alone(make, heads):
    names, before, after = trained(make(), "backbone")
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if key.startswith(heads)}  # batch-norm statistics are among the keys
    assert not moved & set(names)


def depth(name):
    part = name.split(".")
    return int(part[1]) if part[0] == "blocks" else 99


@pytest.mark.parametrize("make", [lambda: small("vit_ti16"), lambda: small("deit_ti16_distilled"),
                                  lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=5, reg_tokens=2)])
@pytest.mark.parametrize("what, blocks", [("0.5", 6), ("0.25", 3), ("0.01", 0), ("0.99", 11)])
def test_a_fraction_freezes_embedding_tokens_and_lower_blocks(make, what, blocks):
    model = make()
    names = freeze(model, what)
    expected = [name for name, _ in model.named_parameters() if depth(name) < blocks or name.startswith("patch_embed") or "." not in name]
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


@pytest.mark.parametrize("what", ["head", "0", "1", "1.5", "-0.5", "nan", ""])
def test_nonsense_is_refused(what):
    with pytest.raises(ValueError, match=f"--freeze {what}: give `backbone`, or a fraction"):
        freeze(small("vit_ti16"), what)


def test_a_network_without_a_head_cannot_be_probed():
    model = models.create("vit_ti16", image_size=64)
    model.reset_classifier(0)
    with pytest.raises(ValueError, match="--freeze: the network has no classifier"):
        freeze(model, "backbone")
