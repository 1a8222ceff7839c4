"""The first 50 steps beside the official trainers': each one's own main script was run on these pictures from these
weights (fixtures say how)."""

import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import datamodules
import models
from datamodules.base import PictureData
from datamodules.loading.images import Split
from datamodules.transforms import mixing
from experiments.config import parse
from experiments.running import build, objects, training
from models.pretrained import fit

FIXTURES = Path(__file__).parents[1] / "fixtures"
OUTLIERS = 1e-3  # trunc_normal_ gives about one weight in 2**24 a value of its cut, 100 sigma away
DEIT = "--model_args.patch_size 8 --model_args.embed_dim 64 --model_args.depth 2 --model_args.num_heads 2"
MIX = "--mixup 0.8 --cutmix 1.0"
ADAMW = "--lr 1e-3 --optimizer_args.warmup_lr 1e-6 --min_lr 1e-5 --weight_decay 0.05"
COMMANDS = {
    "deit": f"--model deit_s16 {DEIT} {MIX} {ADAMW} --schedule deit --clip_grad null",
    "deit3": f"--model deit3_s16 {DEIT} {MIX} --schedule deit --lr 4e-3 --optimizer_args.warmup_lr 1e-6 --min_lr 1e-5 "
    "--weight_decay 0.05 --optimizer lamb --optimizer_args.eps 1e-8 --loss bce_deit3 --label_smoothing 0 "
    "--clip_grad null",
    "swin": "--model swin_t --model_args.embed_dim 24 --model_args.depths [2,2] --model_args.num_heads [2,4] "
    "--model_args.window_size 4 "
    f"{MIX} {ADAMW} --schedule swin --clip_grad 1",
    "convnext": f"--model convnext_t --model_args.dims [16,32,64,128] --model_args.depths [1,1,2,1] {MIX} --schedule "
    f"convnext --lr 4e-3 "
    "--min_lr 1e-6 --weight_decay 0.05 --clip_grad null",
    "resnet": "--model timm/resnet18 --model_args.layers [1,1,1,1] --model_args.channels [16,32,48,64] --mixup 0.2 "
    "--cutmix 1.0 --schedule timm "
    "--lr 5e-3 --optimizer_args.warmup_lr 1e-4 --min_lr 1e-6 --weight_decay 0.01 --optimizer lamb --loss bce_rsb "
    "--clip_grad null",
    "vit": f"--model vit_ti16 {DEIT} {MIX} {ADAMW} --schedule cosine --clip_grad 1",
}


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """Ten batches of 16 pictures (3, 32, 32), as if normalised, and their classes 0-9."""
    rng = np.random.RandomState(5)
    return torch.from_numpy(rng.randn(160, 3, 32, 32).astype(np.float32)), torch.from_numpy(rng.randint(0, 10, 160))


def weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Normal noise of a seed for each tensor, in the order of the names; vectors around what they start from.

    Positions and tokens are large, so that a loss would show their decay.
    """
    made = {}
    for index, (key, shape) in enumerate(sorted(shapes.items())):
        noise = torch.from_numpy(np.random.RandomState(index).randn(*shape).astype(np.float32))
        centre = 1.0 if key.endswith("weight") else 0.5 if "gamma" in key else 0.0
        size = 2.0 if "pos" in key or "token" in key else 0.06
        made[key] = size * noise if len(shape) > 1 else centre + 0.1 * noise
    return made


@dataclass(kw_only=True, eq=False, repr=False)
class Fixed(PictureData):
    """The pictures in their own order, without augmentation but for the mix."""

    in_memory: ClassVar[bool] = True

    def read(self):
        return [str(n) for n in range(10)], {
            "train": Split(np.array([b"%d" % n for n in range(160)]), pictures()[1].numpy(), None)
        }

    def train_dataloader(self):
        image, target = pictures()
        return torch.utils.data.DataLoader(
            [{"image": image[n], "target": target[n], "index": torch.tensor(n)} for n in range(160)], batch_size=16
        )


@pytest.fixture
def known_mix(monkeypatch):
    """numpy's state before each mix as in the official runs."""
    steps = iter(range(1000, 1050))

    @contextmanager
    def keyed(seed, *key):
        np.random.seed(next(steps))
        yield

    monkeypatch.setattr(mixing, "keyed_rng", keyed)


@pytest.mark.parametrize("trainer", COMMANDS)
def test_losses_and_rates(trainer, known_mix, monkeypatch, tmp_path):
    official = json.loads((FIXTURES / f"first_steps_{trainer}.json").read_text())
    losses, rates = run(COMMANDS[trainer], official["shapes"], monkeypatch, tmp_path)
    print(
        f"{trainer}: largest difference {np.abs(np.subtract(losses, official['loss'])).max():.1e} of the loss, "
        f"{np.abs(np.subtract(rates, official['lr'])).max():.1e} of the rate"
    )
    assert len(losses) == len(rates) == 50
    np.testing.assert_allclose(rates, official["lr"], rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(losses[:40], official["loss"][:40], rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        losses[40:], official["loss"][40:], rtol=0, atol=1e-4
    )  # batch norm amplifies another CPU's rounding: 4e-5 seen


def run(command, shapes, monkeypatch, folder):
    """Losses and learning rates of the steps of a run built as run.py builds it, from the official network's
    weights."""
    cfg = parse(
        f"--recipe none --image_size 32 --epochs 5 --warmup_epochs 2 --global_batch_size 16 --precision 32-true "
        f"--accelerator cpu "
        f"--logger none --data folder {command}".split()
    )
    cfg = replace(cfg.filled(**models.preprocessing(cfg.model)), micro_batch_size=16)
    taken = {knob.name for knob in fields(Fixed)}
    monkeypatch.setattr(
        datamodules, "create", lambda name, **knobs: Fixed(**{key: knobs[key] for key in knobs.keys() & taken})
    )
    data = objects.datamodule(cfg)
    network, _ = objects.model(cfg, data)
    adapted, _ = fit(network, weights(shapes), "official")
    missing, unexpected = network.load_state_dict(adapted, strict=False)
    assert not unexpected and all("running" in key or "batches" in key for key in missing)
    made = build.Run(cfg, folder, None, False, data, network)
    task, trainer, losses, rates = training.task(made), training.trainer(made), [], []
    original = task.training_step

    def training_step(batch, batch_idx):
        result = original(batch, batch_idx)
        losses.append(result["loss"].item())
        return result

    task.training_step = training_step
    hook = register_optimizer_step_post_hook(
        lambda optimizer, *_: rates.append(max(group["lr"] for group in optimizer.param_groups))
    )
    try:
        trainer.fit(task, datamodule=data)
    finally:
        hook.remove()
    return losses, rates


INITS = {
    "deit_ti16": {},
    "deit_ti16_distilled": {},
    "deit3_s16": {},
    "swin_t": {},
    "convnext_t": {},
    "vit_b16": {"depth": 2},
    "vit_b16_mlp_tanh": {"depth": 2, "head": "mlp_tanh"},
    "simple_vit_s16": {"depth": 2},
}


@pytest.mark.parametrize("name", INITS)
def test_initialisation_has_the_official_moments(name):
    """Mean and standard deviation by kind of tensor, within five sampling errors of both; constants exactly."""
    official = json.loads((FIXTURES / f"init_{name}.json").read_text())["kinds"]
    torch.manual_seed(11)
    network, kinds = models.create(name.removesuffix("_mlp_tanh"), **INITS[name]), {}
    for key, parameter in network.named_parameters():
        kinds.setdefault(re.sub(r"\.\d+(?=\.)", ".*", key), []).append(parameter.detach().flatten())
    assert kinds.keys() == official.keys()
    for kind, tensors in kinds.items():
        (mean, std, count), ours = official[kind], torch.cat(tensors).double()
        error = std * (1 / count + 1 / len(ours)) ** 0.5
        measured = ours.mean().item(), ours.std(correction=0).item()
        assert abs(measured[0] - mean) <= 5 * error + 1e-6 * abs(mean), (kind, measured, mean, std)
        assert abs(measured[1] - std) <= 5 * error / 2**0.5 + OUTLIERS * std, (kind, measured, mean, std)
