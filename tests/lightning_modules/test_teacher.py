"""The teacher: never changed, never saved, shown the student's own pictures prepared its own way, and refused where it
does not fit."""

import copy

import lightning as L
import pytest
import timm
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import models
from lightning_modules.objectives.distill_losses import create, weights
from lightning_modules.task import Task
from lightning_modules.teachers.teacher import Teacher, Teachers

HALF, IMAGENET = {"mean": (0.5,) * 3, "std": (0.5,) * 3}, {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
OURS = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8}
SPEC = {
    "task": "classification",
    "num_outputs": 3,
    "class_names": ["ant", "bee", "cat"],
    "image_size": [32, 32],
    "interpolation": "bicubic",
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
}
WIRING = {
    "loss": lambda logits, target: F.cross_entropy(logits, target),
    "schedule": lambda step: 1e-2,
    "make_optimizer": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "seed": 0,
}


def network(seed=0):
    """Something that batch norm, dropout and training would change."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(8, 3),
    )


def teacher(net=None, **given):
    return Teacher(net or network(), **{**IMAGENET, "student_mean": HALF["mean"], "student_std": HALF["std"], **given})


def pictures(*size, seed=0):
    """(B, 3, H, W) in 0..1"""
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed))


def normalised(x, mean, std):
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


class Distilled(Task):
    """A student as the distiller wires it, its batches mixed."""

    def __init__(self, teacher, **given):
        super().__init__(
            models.create("vit_s16", 3, 32, **OURS), SPEC, {"model": "vit_s16", "model_args": OURS}, **WIRING
        )
        self.teacher, self.distill, self.seen = teacher, create("soft"), []
        self.model.register_forward_pre_hook(
            lambda model, images: self.seen.append(images[0].clone()) if model.training else None
        )

    def setup(self, stage):
        self.teacher.to(self.device)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "image": 0.6 * batch["image"] + 0.4 * batch["image"].flip(0)} if self.training else batch

    def losses(self, batch):
        logits, (of_base, of_teacher) = self(batch["image"]), weights("soft")
        loss = of_base * F.cross_entropy(logits, batch["target"]) + of_teacher * self.distill(
            logits, self.teacher(batch["image"]), batch["target"]
        )
        return {"loss": loss}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A student trained for two epochs with an EMA: (student, teacher, its state before, what it was shown, its random
    draws, folder)."""
    folder, net = tmp_path_factory.mktemp("run"), network()
    before, shown = copy.deepcopy(net.state_dict()), []
    guide = teacher(net)
    net.register_forward_pre_hook(
        lambda module, images: shown.append((images[0].clone(), module.training, torch.is_grad_enabled()))
    )
    student = Distilled(guide)
    x = normalised(pictures(16, 3, 32, 32), **HALF)
    rows = [{"image": x[i], "target": i % 3, "index": i, "valid": True} for i in range(16)]
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[EMAWeightAveraging(decay=0.9)],
        enable_checkpointing=False,
    )
    start = copy.deepcopy(student.model.state_dict())
    trainer.fit(student, DataLoader(rows, 4), DataLoader(rows, 4))
    trainer.save_checkpoint(folder / "last.ckpt")
    assert any(not torch.equal(start[key], value) for key, value in student.model.state_dict().items())
    return student, guide, before, shown, folder


def test_training_leaves_it_as_it_was(trained):
    student, guide, before, shown, _ = trained
    assert all(torch.equal(before[key], value) for key, value in guide.network.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in guide.network.parameters())
    assert len(shown) == 8 and not any(training or grad for _, training, grad in shown)
    student.train()
    assert not any(module.training for module in guide.network.modules())


def test_it_is_nowhere_in_the_student(trained):
    student, guide, _, _, folder = trained
    own = {id(tensor) for tensor in guide.network.state_dict().values()}
    assert not [
        name for name, parameter in student.named_parameters() if id(parameter) in own or not name.startswith("model.")
    ]
    assert not [module for module in student.modules() if module is guide.network]
    assert student.state_dict().keys() == Task(student.model, SPEC, {}, **WIRING).state_dict().keys()
    held = {id(parameter) for group in student.configure_optimizers().param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in student.model.parameters()}
    content = torch.load(folder / "last.ckpt", weights_only=True)
    assert {key.split(".")[0] for key in content["state_dict"]} == {"model"}
    assert {key.split(".")[0] for key in content["current_model_state"]} == {"model"}
    assert copy.deepcopy(student).teacher is guide


def test_it_sees_the_pictures_of_the_student_mixed(trained):
    student, _, _, shown, _ = trained
    assert len(student.seen) == len(shown) == 8  # and in validation it was not asked
    for x, (y, *_) in zip(student.seen, shown):
        torch.testing.assert_close(normalised(x * 0.5 + 0.5, **IMAGENET), y, rtol=1e-4, atol=1e-5)
    plain = normalised(pictures(16, 3, 32, 32), **HALF)
    assert not any(torch.equal(x[0], each) for x in student.seen for each in plain)


def test_its_own_normalisation_and_size():
    x, net = pictures(2, 3, 40, 40), network().eval()
    direct = net(normalised(x, **IMAGENET))
    torch.testing.assert_close(teacher()(normalised(x, **HALF)), direct, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(net(normalised(x, **HALF)), direct, atol=1e-3)
    same = teacher(student_mean=list(IMAGENET["mean"]), student_std=list(IMAGENET["std"]))
    assert same.prepare(x) is x  # nothing to do, nothing done
    for kind in ("bilinear", "bicubic"):
        resized = F.interpolate(x, (17, 23), mode=kind, antialias=True)
        guide = teacher(image_size=(17, 23), interpolation=kind)
        torch.testing.assert_close(
            guide.prepare(normalised(x, **HALF)), normalised(resized, **IMAGENET), rtol=1e-4, atol=1e-5
        )
    assert teacher(image_size=(40, 40), student_mean=IMAGENET["mean"], student_std=IMAGENET["std"]).prepare(x) is x


def test_normalisation_is_timms():
    task = pytest.importorskip("timm.task")
    net, student = timm.create_model("test_vit"), timm.create_model("test_vit")
    net.pretrained_cfg, student.pretrained_cfg = {**net.pretrained_cfg, **IMAGENET}, {**student.pretrained_cfg, **HALF}
    peer = task.LogitDistillationTask(student, net, criterion=nn.CrossEntropyLoss(), verbose=False)
    x = normalised(pictures(2, 3, 160, 160), **HALF)
    torch.testing.assert_close(
        teacher(net).prepare(x),
        peer.teacher.normalize_input(x, peer.student_mean, peer.student_std),
        rtol=1e-5,
        atol=1e-6,
    )


def test_its_own_precision():
    x = normalised(pictures(4, 3, 32, 32), **HALF)
    full, half = teacher()(x), teacher(precision="bf16-mixed")(x)
    assert full.dtype == half.dtype == torch.float32 and not torch.equal(full, half)
    torch.testing.assert_close(full, half, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher()(x), full)
        assert torch.equal(teacher(precision="bf16-mixed")(x), half)
    same = teacher(student_mean=IMAGENET["mean"], student_std=IMAGENET["std"])
    assert torch.equal(same(x.bfloat16()), same(x.bfloat16().float()))
    with pytest.raises(ValueError, match="64-true"):
        teacher(precision="64-true")


def test_features_are_those_before_the_classifier():
    net = timm.create_model("test_convnext", num_classes=3)
    guide, x = teacher(net), normalised(pictures(2, 3, 64, 64), **HALF)
    assert guide.features(x).shape == (2, guide.width) and not guide.features(x).requires_grad
    torch.testing.assert_close(net.get_classifier()(guide.features(x)), guide(x))


def test_several_teachers_are_the_mean_of_their_probabilities():
    x, guides = (
        normalised(pictures(4, 3, 32, 32), **HALF),
        [teacher(network(seed), std=(0.1 * (seed + 1),) * 3) for seed in range(3)],
    )
    logits = torch.stack([guide(x) for guide in guides])
    torch.testing.assert_close(Teachers(guides, "classification")(x).softmax(1), logits.softmax(2).mean(0))
    torch.testing.assert_close(Teachers(guides, "multilabel")(x).sigmoid(), logits.sigmoid().mean(0))
    torch.testing.assert_close(Teachers(guides, "regression")(x), logits.mean(0))
    one = Teachers(guides[:1], "classification")
    torch.testing.assert_close(
        create("soft", tau=3.0)(logits[1], one(x), None), create("soft", tau=3.0)(logits[1], logits[0], None)
    )
    assert copy.deepcopy(one) is one and one.to("cpu") is one


def checkpoint(path, seed=0, ema=False, config=None, **spec):
    torch.manual_seed(seed)
    model = models.create("deit_s16", 3, 32, **OURS)
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    other = {"ema_state_dict": {key: value + 1 for key, value in state.items()}} if ema else {}
    content = {
        "state_dict": state,
        "config": {"model": "deit_s16", "model_args": OURS, **(config or {})},
        "spec": {**SPEC, **IMAGENET, **spec},
    }
    (path / "checkpoints").mkdir(parents=True)
    torch.save({**content, **other}, path / "checkpoints" / "best.ckpt")
    return model.eval()


@pytest.mark.parametrize("ema", [False, True])
def test_a_run_or_its_checkpoint_teaches(tmp_path, ema):
    model, x = checkpoint(tmp_path / "run", ema=ema), pictures(2, 3, 48, 48)
    if ema:
        with torch.no_grad():
            [parameter.add_(1) for parameter in model.parameters()]
    expected = model(normalised(F.interpolate(x, (32, 32), mode="bicubic", antialias=True), **IMAGENET))
    for source in (tmp_path / "run", tmp_path / "run/checkpoints/best.ckpt"):
        guide = Teacher.load(str(source), student=SPEC)
        torch.testing.assert_close(guide(normalised(x, **HALF)), expected, rtol=1e-3, atol=1e-4)


def test_a_name_with_weights_teaches_and_draws_nothing(tmp_path):
    net = timm.create_model("test_resnet", num_classes=3)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    torch.manual_seed(7)
    guide = Teacher.load("timm/test_resnet", str(tmp_path / "w.pth"), student=SPEC)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(1))
    preparation = models.preprocessing("timm/test_resnet")
    x = pictures(2, 3, *preparation["image_size"])
    torch.testing.assert_close(
        guide(normalised(x, **HALF)),
        net.eval()(normalised(x, preparation["mean"], preparation["std"])),
        rtol=1e-3,
        atol=1e-4,
    )
    assert guide.image_size == preparation["image_size"]
    assert Teacher.load("timm/test_resnet", str(tmp_path / "w.pth"), student=SPEC, image_size=(32, 32)).image_size == (
        32,
        32,
    )


def test_a_name_without_a_file_takes_the_published_weights(monkeypatch):
    asked = []

    def published(name, tag):
        asked.append((name, tag))
        return timm.create_model("test_resnet", num_classes=3).state_dict()

    monkeypatch.setattr("models.pretrained.published_weights", published)
    assert Teacher.load("timm/test_resnet.r160_in1k", student=SPEC) and Teacher.load(
        "timm/test_resnet.r160_in1k", "pretrained", student=SPEC
    )
    assert asked == [("timm/test_resnet.r160_in1k", None)] * 2
    with pytest.raises(ValueError, match="has 3 classes, the student's data 10"):
        Teacher.load("timm/test_resnet.r160_in1k", student={**SPEC, "num_outputs": 10})


def test_what_does_not_fit_is_refused(tmp_path):
    checkpoint(tmp_path / "run")
    run, file = str(tmp_path / "run"), str(tmp_path / "w.pth")
    state = timm.create_model("test_resnet", num_classes=3).state_dict()
    torch.save({key: value for key, value in state.items() if not key.startswith("fc.")}, file)
    cases = [
        (
            (run,),
            {**SPEC, "num_outputs": 2, "class_names": ["ant", "bee"]},
            r"3 class_names \(ant, bee, cat.*not 2 \(ant, bee",
        ),
        ((run,), {**SPEC, "class_names": ["ant", "cat", "bee"]}, "class_names number 1 is 'bee', not 'cat'"),
        ((run,), {**SPEC, "num_outputs": 5, "class_names": None}, "num_outputs 3, not 5"),
        ((run,), {**SPEC, "task": "regression"}, "task classification, not regression"),
        ((run, file), SPEC, "brings its weights with it"),
        (("timm/test_resnet", file), SPEC, "leaves 2 tensors untrained, the first is fc.bias"),
        (("timm/test_vit", file), SPEC, "none of its"),
        (("vit_nano4",), SPEC, "--teacher vit_nano4 has no trained weights.*--teacher_init PATH"),
        (("vit_nano4", run), SPEC, "that is a deit_s16"),
        (("regnety_160",), SPEC, "timm/regnety_160"),
    ]
    for given, student, said in cases:
        with pytest.raises(ValueError, match=said):
            Teacher.load(*given, student=student)
    with pytest.raises(FileNotFoundError, match="runs/none: there is no such run"):
        Teacher.load("runs/none", student=SPEC)
