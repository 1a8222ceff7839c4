"""Optimizers against written-out formulas and timm, decay and layer groups against the authors' counts, and metrics
against scikit-learn."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

import models
from lightning_modules.objectives.evaluation import Metrics
from lightning_modules.optimization.layer_decay import layer_ids
from lightning_modules.optimization.optimizers import check_optimizer, optimizer, set_lr


def meta(make, *args, **kwargs):
    with torch.device("meta"):
        return make(*args, **kwargs)


def exempt(model):
    return model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()


def by_name(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(p)]: (group["weight_decay"], pytest.approx(group.get("lr_scale", 1.0)))
        for group in groups
        for p in group["params"]
    }


@pytest.mark.parametrize(
    "name, counts, elements",
    [
        ("deit_ti16_distilled", (104, 51), None),
        (
            "swin_t",
            (120, 53),
            (88930, 28199424),
        ),  # Swin's set_weight_decay on Swin's own network (optimizer.py:59-74, f82860b)
        (
            "convnext_t",
            (123, 59),
            (65128, 28524000),
        ),  # ConvNeXt's get_parameter_groups on its own network (optim_factory.py:69-104, 048efce)
    ],
)
def test_decay_groups_equal_the_authors_and_timms(name, counts, elements):
    model, twin = meta(models.create, name), meta(timm.create_model, models.REGISTRY[name].timm)
    ours = optimizer(model, "adamw", lr=1.0, weight_decay=0.3).param_groups
    assert [group["weight_decay"] for group in ours] == [0.0, 0.3] and tuple(
        len(group["params"]) for group in ours
    ) == counts
    if elements:
        assert tuple(sum(p.numel() for p in group["params"]) for group in ours) == elements
    theirs = by_name(twin, param_groups_weight_decay(twin, 0.3, no_weight_decay_list=exempt(twin)))
    assert by_name(model, ours) == theirs


@pytest.mark.parametrize("name, count", [("deit_ti16_distilled", 28), ("vit_b16", 28), ("deit3_s16", 28)])
def test_layer_decay_groups_equal_timms(name, count):
    model, twin = meta(models.create, name), meta(timm.create_model, models.REGISTRY[name].timm)
    ours = optimizer(model, "adamw", lr=2.0, weight_decay=0.05, layer_decay=0.75).param_groups
    theirs = param_groups_layer_decay(twin, 0.05, no_weight_decay_list=exempt(twin), layer_decay=0.75)
    assert len(ours) == len(theirs) == count
    assert [(len(g["params"]), g["weight_decay"], g["lr_scale"]) for g in ours] == [
        (len(g["params"]), g["weight_decay"], g["lr_scale"]) for g in theirs
    ]
    assert by_name(model, ours) == by_name(twin, theirs)
    assert all(group["lr"] == 2.0 * group["lr_scale"] for group in ours) and ours[-1]["lr_scale"] == 1


@pytest.mark.parametrize("name", ["convnext_t", "convnext_s", "swin_t", "swin_s"])
def test_layers_of_convnext_and_swin_are_the_published_ones(name):
    """Their own functions on their own names (tests/fixtures/layer_decay.json), which `adapt_state_dict` turns into
    ours."""
    published = json.loads((Path(__file__).parents[1] / "fixtures" / "layer_decay.json").read_text())[name]
    model, twin = meta(models.create, name), meta(timm.create_model, models.REGISTRY[name].timm)
    layers = layer_ids(model)
    renamed = model.adapt_state_dict({official: torch.tensor(layer) for official, layer in published.items()})
    assert len(renamed) == len(published) and {key: layers[key] for key in renamed} == {
        key: int(layer) for key, layer in renamed.items()
    }
    assert {*published.values()} == {*layers.values()} and layers == layer_ids(twin)
    made = optimizer(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.7).param_groups
    assert {key: value[1] for key, value in by_name(model, made).items()} == {
        key: pytest.approx(0.7 ** (max(layers.values()) - layer)) for key, layer in layers.items()
    }


@pytest.mark.parametrize("layer_decay", [None, 0.5])
@pytest.mark.parametrize(
    "make, heads",
    [
        (lambda: models.create("deit_ti16_distilled"), {"head", "head_dist"}),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), {"head"}),
    ],
)
def test_the_head_learns_at_a_rate_of_its_own(make, heads, layer_decay):
    model = meta(make)
    plain = by_name(model, optimizer(model, "lamb", lr=1.0, weight_decay=0.1, layer_decay=layer_decay).param_groups)
    made = optimizer(model, "lamb", lr=1.0, weight_decay=0.1, layer_decay=layer_decay, head_lr_scale=10.0)
    scaled = by_name(model, made.param_groups)
    assert scaled.keys() == plain.keys()
    for name, (decay, scale) in scaled.items():
        factor = 10 if name.split(".")[0] in heads else 1
        assert (decay, scale) == (plain[name][0], plain[name][1].expected * factor), name
    set_lr(made, 0.5)
    assert max(group["lr"] for group in made.param_groups) == 5.0


def test_frozen_parameters_are_left_out():
    model = meta(models.create, "vit_ti16")
    for parameter in model.blocks.parameters():
        parameter.requires_grad = False
    for settings in ({}, {"layer_decay": 0.9}, {"head_lr_scale": 3.0}):
        made = optimizer(model, "sgd", lr=1.0, weight_decay=0.1, **settings)
        assert sum(len(group["params"]) for group in made.param_groups) == 8
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="--freeze"):
        optimizer(model, "sgd", lr=1.0, weight_decay=0.1)


def test_adamw_is_torchs_with_its_defaults():
    made = optimizer(meta(models.create, "vit_ti16"), "adamw", lr=1.0, weight_decay=0.3)
    plain = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    assert type(made) is torch.optim.AdamW
    assert {key: value for key, value in made.defaults.items() if key != "weight_decay"} == {
        key: value for key, value in plain.defaults.items() if key != "weight_decay"
    }


STEPS, RATES = 20, np.linspace(0.1, 0.01, 20)


def gradients(model, scale=1.0):
    rng = np.random.default_rng(0)
    return [[scale * rng.normal(size=p.shape) for p in model.parameters()] for _ in range(STEPS)]


def run(model, made, grads):
    for rate, step in zip(RATES, grads):
        for parameter, grad in zip(model.parameters(), step):
            parameter.grad = torch.tensor(grad, dtype=parameter.dtype)
        set_lr(made, float(rate))
        made.step()
    return [parameter.detach().numpy() for parameter in model.parameters()]


@pytest.fixture
def little():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()


def adam_direction(grads, index, step, state, betas, eps):
    """Bias-corrected m / (sqrt(v) + eps) of Kingma & Ba's algorithm 1 for one tensor; `state` holds m and v."""
    m, v = state.get(index, (0.0, 0.0))
    state[index] = m, v = (
        betas[0] * m + (1 - betas[0]) * grads[index],
        betas[1] * v + (1 - betas[1]) * grads[index] ** 2,
    )
    return m / (1 - betas[0] ** step) / (np.sqrt(v / (1 - betas[1] ** step)) + eps)


def test_twenty_steps_of_adamw(little):
    """Loshchilov & Hutter 2019, algorithm 2."""
    grads, state = gradients(little), {}
    p = [parameter.detach().numpy().copy() for parameter in little.parameters()]
    ours = run(little, optimizer(little, "adamw", lr=0.1, weight_decay=0.2, betas=(0.8, 0.95), eps=1e-6), grads)
    for t, rate in enumerate(RATES, 1):
        for i, value in enumerate(p):
            p[i] = value - rate * (
                adam_direction(grads[t - 1], i, t, state, (0.8, 0.95), 1e-6) + (0.2 if value.ndim > 1 else 0) * value
            )
    for mine, theirs in zip(ours, p):
        np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-12)


def test_big_visions_decay_is_adamws_divided_by_the_rate(little):
    """big_vision (optax.py:86-156) subtracts schedule * (lr * adam + wd * p): wd does not shrink with lr."""
    grads, state, lr, wd = gradients(little), {}, 0.1, 0.02
    p = [parameter.detach().numpy().copy() for parameter in little.parameters()]
    ours = run(little, optimizer(little, "adamw", lr=lr, weight_decay=wd / lr), grads)
    for t, rate in enumerate(RATES, 1):
        for i, value in enumerate(p):
            p[i] = value - rate / lr * (
                lr * adam_direction(grads[t - 1], i, t, state, (0.9, 0.999), 1e-8)
                + (wd if value.ndim > 1 else 0) * value
            )
    for mine, theirs in zip(ours, p):
        np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("clip, scale", [(1.0, 1.0), (1.0, 0.01), (None, 1.0)])
def test_twenty_steps_of_lamb(little, clip, scale):
    """apex's FusedLAMB: the whole gradient clipped to norm 1 first, and a trust ratio only where there is decay."""
    grads, state = gradients(little, scale), {}
    p = [parameter.detach().numpy().copy() for parameter in little.parameters()]
    ours = run(
        little, optimizer(little, "lamb", lr=0.1, weight_decay=0.2, **({} if clip else {"max_grad_norm": None})), grads
    )
    for t, rate in enumerate(RATES, 1):
        norm = np.sqrt(sum((grad**2).sum() for grad in grads[t - 1]))
        clipped = [grad / max(1.0, norm / clip) if clip else grad for grad in grads[t - 1]]
        for i, value in enumerate(p):
            update = adam_direction(clipped, i, t, state, (0.9, 0.999), 1e-6)
            if value.ndim > 1:
                update = update + 0.2 * value
                update = update * np.linalg.norm(value) / np.linalg.norm(update)
            p[i] = value - rate * update
    for mine, theirs in zip(ours, p):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("nesterov", [True, False])
def test_twenty_steps_of_sgd(little, nesterov):
    grads, buffers = gradients(little), {}
    p = [parameter.detach().numpy().copy() for parameter in little.parameters()]
    ours = run(
        little, optimizer(little, "sgd", lr=0.1, weight_decay=0.2, **({} if nesterov else {"nesterov": False})), grads
    )
    for t, rate in enumerate(RATES):
        for i, value in enumerate(p):
            grad = grads[t][i] + (0.2 if value.ndim > 1 else 0) * value
            buffers[i] = 0.9 * buffers.get(i, 0.0) + grad
            p[i] = value - rate * (grad + 0.9 * buffers[i] if nesterov else buffers[i])
    for mine, theirs in zip(ours, p):
        np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-12)


def test_muon_takes_the_hidden_matrices_and_torchs_adamw_the_rest():
    torch.manual_seed(0)
    model = models.create("deit_ti16_distilled", depth=2, embed_dim=32, num_heads=2, image_size=32, num_outputs=8)
    twin, grads = copy.deepcopy(model), gradients(model)
    made = optimizer(model, "muon", lr=0.1, weight_decay=0.05)
    run(model, made, grads)
    run(twin, optimizer(twin, "adamw", lr=0.1, weight_decay=0.05, betas=(0.9, 0.95), eps=1e-7), grads)
    hidden = {f"blocks.{i}.{part}.weight" for i in range(2) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters()):
        assert ("momentum_buffer" in made.state[ours]) == (name in hidden), name
        if name not in hidden:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "make, rim",
    [
        (lambda: models.create("swin_t"), ("patch_embed", "head", "relative_position_bias_table")),
        (lambda: models.create("convnext_t"), ("stem", "head", "conv_dw.weight")),
        (
            lambda: timm.create_model("vit_small_patch14_reg4_dinov2"),
            ("patch_embed", "head", "cls_token", "reg_token", "pos_embed"),
        ),
        (lambda: timm.create_model("resnet18"), ("^conv1", "fc")),
    ],
)
def test_muon_leaves_the_rim_alone(make, rim):
    """One step, then the optimizer's own record of who got which update."""
    torch.manual_seed(0)
    model = make()
    made = optimizer(model, "muon", lr=1e-3, weight_decay=0.0, ns_steps=1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    for name, parameter in model.named_parameters():
        edge = parameter.ndim < 2 or any(part in f"^{name}" for part in rim)
        assert ("momentum_buffer" in made.state[parameter]) != edge, name


def test_muons_update_is_orthogonal_and_as_large_as_adamws():
    model = models.create("vit_ti16", depth=1, embed_dim=64, num_heads=2, image_size=32)
    made, weight = optimizer(model, "muon", lr=0.5, weight_decay=0.0), model.blocks[0].mlp.fc1.weight
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    made.step()
    update = (before - weight.detach()) / 0.5
    assert float(update.square().mean().sqrt()) == pytest.approx(
        0.2, rel=0.15
    )  # about AdamW's, so one rate serves both
    singular = torch.linalg.svdvals(update) / (0.2 * 256**0.5)
    assert float(singular.min()) > 0.7 and float(singular.max()) < 1.3
    assert {group["momentum"] for group in made.param_groups} == {0.95}  # not the 0.9 that timm's factory would give


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd", "muon"])
def test_a_resumed_optimizer_goes_on_as_if_nothing_had_been(name):
    torch.manual_seed(0)
    model = models.create("vit_ti16", depth=2, embed_dim=32, num_heads=2, image_size=32)
    grads, settings = gradients(model), {"lr": 0.1, "weight_decay": 0.05, "layer_decay": 0.8, "head_lr_scale": 5.0}
    made = optimizer(model, name, **settings)
    run(model, made, grads[:5])
    again = copy.deepcopy(model)
    other = optimizer(again, name, **settings)
    other.load_state_dict(copy.deepcopy(made.state_dict()))
    for mine, theirs in zip(run(model, made, grads[5:]), run(again, other, grads[5:])):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
    "name, arguments, says",
    [
        (
            "sgd",
            {"eps": 1e-8, "momentum": 0.9},
            "--optimizer_args eps: sgd takes .*momentum",
        ),  # timm would drop eps without a word
        ("adamw", {"momentum": 0.9}, "--optimizer_args momentum: adamw takes .*betas"),
        ("lamb", {"lr": 0.1, "clip": 1}, "--optimizer_args clip, lr: lamb takes .*max_grad_norm"),
        ("adamw", {"betas": 0.9}, "adamw does not take these values"),
        ("sgd", {"momentum": "high"}, "sgd does not take these values"),
    ],
)
def test_unknown_optimizers_and_arguments_are_refused(name, arguments, says):
    with pytest.raises(ValueError, match=says):
        check_optimizer(name, arguments)


def test_nonsense_scales_are_refused(little):
    for settings in ({"layer_decay": 0.0}, {"layer_decay": 1.5}, {"head_lr_scale": 0.0}):
        with pytest.raises(ValueError, match=rf"{next(iter(settings))} [\d.]+: must be above 0"):
            optimizer(little, "adamw", lr=0.1, weight_decay=0.1, **settings)


@pytest.mark.parametrize("split", [[13], [5, 8], [1, 4, 4, 4]])
def test_metrics_equal_scikit_learn_however_batched_and_padded(split):
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(13, 7)), rng.integers(0, 7, 13)
    metrics, start, rows = Metrics({"task": "classification", "num_outputs": 7}), 0, torch.arange(15)
    for size in split:
        part = slice(start, start + size)
        padded = torch.tensor(np.concatenate([logits[part], rng.normal(size=(2, 7))]))
        metrics.update(
            padded,
            torch.tensor(np.concatenate([target[part], [3, 3]])),
            torch.tensor([True] * size + [False] * 2),
            rows[: size + 2],
        )
        start += size
    found = {name: float(metric.compute()) for name, metric in metrics.named("val").items()}
    probabilities = torch.tensor(logits).softmax(1).numpy()
    assert found["val/acc1"] == pytest.approx(accuracy_score(target, logits.argmax(1)), abs=1e-7)
    assert found["val/acc5"] == pytest.approx(top_k_accuracy_score(target, logits, k=5, labels=range(7)), abs=1e-7)
    assert found["val/loss"] == pytest.approx(log_loss(target, probabilities, labels=range(7)), rel=1e-5)


def test_a_batch_of_padding_alone_weighs_nothing():
    metrics = Metrics({"task": "classification", "num_outputs": 3})
    metrics.update(torch.eye(3), torch.arange(3), torch.tensor([True, True, False]), torch.arange(3))
    metrics.update(
        torch.randn(4, 3), torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.bool), torch.arange(4)
    )
    assert float(metrics.metrics["acc1"].compute()) == 1.0
