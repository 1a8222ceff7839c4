"""Mixing on the device is timm's Mixup or big_vision's, keyed by the batch: resumable, in training only, after
erasing."""

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing

import datamodules
from datamodules.transforms.mixing import Mixer, batch_key

MODES = {
    "mixup": (dict(mixup=0.8), dict(mixup_alpha=0.8)),
    "cutmix": (dict(cutmix=1.0), dict(mixup_alpha=0.0, cutmix_alpha=1.0)),
    "deit": (
        dict(mixup=0.8, cutmix=1.0, label_smoothing=0.1),
        dict(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1),
    ),
    "pair": (
        dict(mixup=0.2, cutmix=1.0, augment_args=dict(mix_mode="pair")),
        dict(mixup_alpha=0.2, cutmix_alpha=1.0, mode="pair"),
    ),
    "elem": (
        dict(
            mixup=0.2,
            cutmix=1.0,
            label_smoothing=0.2,
            augment_args=dict(mix_mode="elem", mix_prob=0.7, mix_switch_prob=0.3),
        ),
        dict(mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=0.2, mode="elem", prob=0.7, switch_prob=0.3),
    ),
    "seldom": (dict(mixup=0.8, augment_args=dict(mix_prob=0.3)), dict(mixup_alpha=0.8, prob=0.3)),
    "minmax": (
        dict(cutmix=1.0, augment_args=dict(cutmix_minmax=[0.3, 0.8])),
        dict(mixup_alpha=0.0, cutmix_alpha=1.0, cutmix_minmax=(0.3, 0.8)),
    ),
}


def digits(**kwargs):
    words = dict(
        image_size=8,
        interpolation="bilinear",
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        global_batch_size=256,
        seed=3,
        workers=0,
    )
    return datamodules.create("digits", **{**words, **kwargs})


def on_device(data, batch: dict) -> dict:
    return data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)


def seed_of(seed: int, epoch: int, rank: int, index: torch.Tensor) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=batch_key(epoch, rank, index)).generate_state(3)[1])


@pytest.mark.parametrize("name", MODES)
def test_images_and_targets_are_timms(name):
    ours, theirs = MODES[name]
    smoothing = {"label_smoothing": 0.0}
    data, mixup = digits(**smoothing | ours), Mixup(num_classes=10, **smoothing | theirs)
    lambdas = []
    for batch in data.train_dataloader():
        plain = digits().on_after_batch_transfer(batch, 0)
        np.random.seed(99)
        mixed = on_device(data, batch)
        after = np.random.rand()
        np.random.seed(99)
        assert after == np.random.rand()  # the global state was left alone
        np.random.seed(seed_of(3, 0, 0, batch["index"]))
        image, target = mixup(plain["image"].clone(), plain["target"])
        assert torch.equal(mixed["image"], image) and torch.equal(mixed["target"], target) and target.shape == (256, 10)
        assert set(mixed) == {"image", "target", "index"}
        lambdas.append(float(target.square().sum()))
    assert len(set(lambdas)) > 1  # each batch draws anew


def test_roll_is_big_visions():
    data = digits(mixup=0.3, label_smoothing=0.1, augment_args=dict(mix_mode="roll"), global_batch_size=125)
    for batch in data.train_dataloader():
        image = digits().on_after_batch_transfer(batch, 0)["image"].numpy()
        np.random.seed(seed_of(3, 0, 0, batch["index"]))
        a = np.random.beta(0.3, 0.3)
        a = max(a, 1 - a)
        target = np.full((125, 10), 0.01)
        target[np.arange(125), batch["target"]] = 0.91
        mixed = on_device(data, batch)
        np.testing.assert_allclose(mixed["image"], a * image + (1 - a) * np.roll(image, 1, axis=0), atol=1e-6)
        np.testing.assert_allclose(mixed["target"], a * target + (1 - a) * np.roll(target, 1, axis=0), atol=1e-6)
        assert mixed["image"].dtype == mixed["target"].dtype == torch.float32


def test_the_key_is_epoch_rank_and_indices():
    data = digits(mixup=1.0)
    batch = next(iter(data.train_dataloader()))

    def mixed(data, batch, **place):
        data.trainer = type("Trainer", (), dict(global_rank=0, current_epoch=0, world_size=2) | place)()
        return on_device(data, dict(batch))["target"]

    first = mixed(data, batch)
    np.random.seed(1)
    assert torch.equal(first, mixed(data, batch)) and torch.equal(first, mixed(digits(mixup=1.0), batch))
    others = [
        mixed(data, batch, current_epoch=1),
        mixed(data, batch, global_rank=1),
        mixed(digits(mixup=1.0, seed=4), batch),
        mixed(data, {**batch, "index": batch["index"].flip(0)}),
    ]
    assert len({round(float(each.square().sum()), 4) for each in (first, *others)}) == 5


def test_pictures_are_erased_before_they_are_mixed():
    args = dict(erasing_mode="const")
    data, mixup = (
        digits(mixup=0.8, random_erasing=1.0, augment_args=args),
        Mixup(0.8, num_classes=10, label_smoothing=0.0),
    )
    batch = next(iter(data.train_dataloader()))
    erased = on_device(digits(random_erasing=1.0, augment_args=args), batch)["image"]
    assert not torch.equal(
        erased, on_device(digits(), {key: batch[key] for key in ("image", "index", "target")})["image"]
    )
    np.random.seed(seed_of(3, 0, 0, batch["index"]))
    assert torch.equal(on_device(data, batch)["image"], mixup(erased.clone(), batch["target"])[0])
    assert RandomErasing(1.0, device="cpu").max_area == 1 / 3


def test_off_is_off():
    data = digits(label_smoothing=0.1)
    mixed = on_device(data, next(iter(data.train_dataloader())))
    assert mixed["target"].dtype == torch.int64 and mixed["target"].shape == (256,) and not data.mixing


def test_pairs_need_even_passes():
    assert [
        digits(global_batch_size=12, micro_batch_size=micro, mixup=0.1).accumulation(1) for micro in (12, 7, 3, 2)
    ] == [1, 2, 6, 6]
    assert digits(global_batch_size=12, micro_batch_size=3).accumulation(1) == 4
    with pytest.raises(
        ValueError, match="--global_batch_size 6 is 3 pictures for each of 2 processes.* --mixup and --cutmix mix pairs"
    ):
        digits(global_batch_size=6, cutmix=1.0).accumulation(2)
    with pytest.raises(ValueError, match="even number of at most --micro_batch_size 1"):
        digits(global_batch_size=8, micro_batch_size=1, mixup=1.0).accumulation(1)
    assert digits(global_batch_size=6, mixup=1.0, augment_args=dict(mix_mode="roll")).accumulation(2) == 1
    assert digits(global_batch_size=6, mixup=1.0, eval_only=True).accumulation(2) == 1


def test_roll_is_mixup_alone():
    for more in (dict(cutmix=1.0), dict(mixup=0.1, augment_args=dict(mix_mode="roll", mix_prob=0.5))):
        with pytest.raises(ValueError, match="mix_mode roll is Mixup of every batch"):
            digits(**{"augment_args": dict(mix_mode="roll"), **more})


class Recorder(L.LightningModule):
    """Writes down (epoch, a number of the pictures, one of the targets) of every training batch; evaluation batches
    must be plain."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen, self.evaluated = torch.nn.Linear(1, 1), [], 0

    def training_step(self, batch, _):
        assert batch["target"].shape == (len(batch["index"]), 10) and batch["target"].dtype == torch.float32
        self.seen.append(
            (
                self.current_epoch,
                round(batch["image"].double().abs().sum().item(), 3),
                round(batch["target"].square().sum().item(), 4),
            )
        )
        return self.layer(batch["image"].mean().view(1, 1)).sum()

    def validation_step(self, batch, _):
        assert batch["target"].dtype == torch.int64 and set(batch) == {"image", "target", "index", "valid"}
        self.evaluated += 1

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def fit(folder, data, resume=None) -> list:
    module, save = Recorder(), ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, dirpath=folder, filename="{step}")
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1)
    trainer = L.Trainer(
        max_epochs=2,
        use_distributed_sampler=False,
        accumulate_grad_batches=data.accumulation(1),
        callbacks=[save],
        **quiet,
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    trainer.test(module, datamodule=data, verbose=False)
    assert module.evaluated >= 3
    return module.seen


def test_a_resumed_run_mixes_as_an_uninterrupted_one(tmp_path):
    words = dict(
        mixup=0.8,
        cutmix=1.0,
        random_erasing=0.5,
        rand_augment="rand-m9-n6-mstd0.5-inc1",
        repeated_augment=3,
        micro_batch_size=128,
    )
    whole = fit(tmp_path / "whole", digits(**words))
    assert len(whole) == 20 and len({lam for *_, lam in whole}) > 10 and len(set(whole)) == 20
    for step, workers in ((3, 0), (5, 0), (7, 1)):
        np.random.seed(step)
        assert (
            fit(tmp_path / str(step), digits(**words, workers=workers), tmp_path / "whole" / f"step={step}.ckpt")
            == whole[2 * step :]
        )
    with pytest.raises(ValueError, match="repeated_augment was 3, is 1"):
        fit(tmp_path / "other", digits(**{**words, "repeated_augment": 1}), tmp_path / "whole" / "step=3.ckpt")


NUMBERS = torch.tensor(np.random.default_rng(5).uniform(-20, 80, (256, 3)), dtype=torch.float32)


def mixer(**words):
    data = digits(**words)
    settings = dict(mixup=data.mixup, cutmix=data.cutmix, augment=data.augment, num_classes=0, smoothing=0.1)
    return {task: Mixer(task=task, **settings) for task in ("multilabel", "regression")}


@pytest.mark.parametrize("name", [name for name in MODES if "smoothing" not in str(MODES[name])] + ["roll", "odd roll"])
@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_numbers_are_mixed_as_timm_mixes_classes(name, task):
    """One-hot rows as numbers come out as classes do; pictures are the same, bit for bit; other numbers follow
    linearly."""
    words = MODES[name][0] if name in MODES else dict(mixup=0.3, augment_args=dict(mix_mode="roll"))
    of_numbers, count = mixer(**words)[task], 255 if "odd" in name else 256
    of_classes = Mixer(
        task="classification",
        mixup=words.get("mixup", 0.0),
        cutmix=words.get("cutmix", 0.0),
        augment=digits(**words).augment,
        num_classes=10,
        smoothing=0.0,
    )
    image, classes, key = torch.randn(count, 3, 8, 8), torch.arange(count) % 10, (1, 2, 3)
    expected_image, expected = of_classes(image.clone(), classes, 3, key)
    one_hot = torch.nn.functional.one_hot(classes, 10).float()
    found_image, found = of_numbers(image.clone(), one_hot, 3, key)
    assert torch.equal(found_image, expected_image) and torch.equal(found, expected) and found.dtype == torch.float32
    eye = torch.eye(count)
    shares = of_numbers(image.clone(), eye, 3, key)[1]  # (B, B) of each picture in each other
    mixed = of_numbers(image.clone(), NUMBERS[:count], 3, key)[1]
    torch.testing.assert_close(mixed, shares @ NUMBERS[:count])
    assert torch.allclose(shares.sum(1), torch.ones(count)) and (
        name == "seldom" or not torch.equal(mixed, NUMBERS[:count])
    )
    assert torch.equal(mixed, of_numbers(image.clone(), NUMBERS[:count], 3, key)[1])
    assert name == "seldom" or not torch.equal(mixed, of_numbers(image.clone(), NUMBERS[:count], 4, key)[1])


def test_scaling_and_mixing_commute():
    low, high = -20.0, 80.0
    image, of_numbers = torch.zeros(256, 3, 8, 8), mixer(mixup=0.8)["regression"]
    before, after = (of_numbers(image, numbers, 3, (1,))[1] for numbers in ((NUMBERS - low) / (high - low), NUMBERS))
    torch.testing.assert_close(before, (after - low) / (high - low))
