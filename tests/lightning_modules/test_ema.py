"""EMA: step by step timm's, no part of the task, scored beside the raw weights, resumed to the byte, chosen by
--use_ema."""

import os
import signal

import pandas as pd
import pytest
import torch
from conftest import result_of
from timm.utils import ModelEmaV2, ModelEmaV3

import models
from experiments import export
from experiments.config import read
from experiments.running import build, training
from lightning_modules.callbacks.ema import Ema, uses_ema
from lightning_modules.loggers.csv_logger import read_history
from lightning_modules.task import Task
from models import pretrained

TINY = (
    "--data_dir pics --image_size 16 --recipe none --global_batch_size 8 --micro_batch_size 4 --lr 2e-3 --workers 0 "
    "--logger csv "
    "--accelerator cpu --ema_decay 0.8"
)  # 4 steps of 2 passes
VIT = f"{TINY} --model vit_nano4 --model_args.embed_dim 32 --model_args.depth 2 --model_args.drop_path 0.2"
BATCH_NORM = f"{TINY} --model timm/test_resnet"
MIXED = (
    "--mixup 0.8 --cutmix 1.0 --random_erasing 0.5 --rand_augment rand-m9-mstd0.5-inc1 "
    "--augment_args.repeated_augment 2"
)


def checkpoint(folder, name="last.ckpt"):
    return torch.load(folder / "checkpoints" / name, weights_only=True)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


class Follow(Ema):
    """Beside ours, timm's own two after every optimizer step of the same training."""

    def on_fit_start(self, trainer, pl_module):
        super().on_fit_start(trainer, pl_module)
        self.timms, self.last, self.compared = (
            [kind(pl_module.model, decay=self.decay) for kind in (ModelEmaV3, ModelEmaV2)],
            0,
            0,
        )
        assert pl_module.ema is self.ema.module and all(
            ours is not theirs for ours in pl_module.modules() for theirs in self.ema.modules()
        )
        assert not {id(p) for p in self.ema.parameters()} & {
            id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]
        }
        assert not {id(p) for p in self.ema.parameters()} & {id(p) for p in pl_module.parameters()}
        assert all(key.startswith("model.") for key in pl_module.state_dict())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > self.last:
            for ema in self.timms:
                ema.update(pl_module.model)
        self.last = trainer.global_step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        ours = self.ema.module.state_dict()
        assert equal(ours, self.timms[0].module.state_dict())
        for name, value in self.timms[1].module.state_dict().items():
            if value.is_floating_point():  # V2 cuts whole numbers off, V3 copies them
                torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
        self.compared += 1


@pytest.mark.parametrize("line", [VIT, BATCH_NORM], ids=["vit", "batch_norm"])
def test_every_step_is_timms(pics, monkeypatch, line):
    monkeypatch.chdir(pics)
    monkeypatch.delenv("VITLAB_DECISION", raising=False)
    run = build.resolve(read(f"{line} --epochs 2".split()))
    task, trainer = training.task(run), training.trainer(run)
    place = next(n for n, callback in enumerate(trainer.callbacks) if isinstance(callback, Ema))
    follow = trainer.callbacks[place] = Follow(0.8)
    start = {name: value.clone() for name, value in task.model.state_dict().items()}
    trainer.fit(task, run.data)
    assert follow.compared == 16 and trainer.global_step == 8
    assert not equal(start, follow.ema.module.state_dict()) and not equal(
        task.model.state_dict(), follow.ema.module.state_dict()
    )
    saved = checkpoint(run.folder)
    assert (
        equal(saved["ema_state_dict"], follow.state()) and saved["ema_state_dict"].keys() == saved["state_dict"].keys()
    )
    assert len(saved["optimizer_states"][0]["state"]) == len(list(task.model.parameters())) and task.ema is None


def test_the_first_steps_by_hand():
    """From the initial weights: 1, then 0.9 * 1 + 0.1 * 2, 0.9 * 1.1 + 0.1 * 3."""

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Linear(1, 1, bias=False)
            torch.nn.init.ones_(self.model.weight)

    module, callback = Module(), Ema(0.9)
    trainer = type("Trainer", (), {"global_step": 0})()
    callback.on_fit_start(trainer, module)
    callback.on_train_start(trainer, module)
    for step, expected in ((1, 1.1), (1, 1.1), (2, 1.29)):
        trainer.global_step = step
        torch.nn.init.constant_(module.model.weight, step + 1.0)
        callback.on_train_batch_end(trainer, module, None, None, 0)
        assert float(callback.state()["model.weight"]) == pytest.approx(expected, rel=1e-6)


def test_frozen_weights_are_shared_and_cost_no_memory():
    module = type("Module", (torch.nn.Module,), {})()
    module.model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    module.model[0].requires_grad_(False)
    callback = Ema(0.9)
    callback.restored = {f"model.{name}": value + 0 for name, value in module.model.state_dict().items()}
    callback.on_fit_start(None, module)
    pairs = list(zip(module.model.parameters(), callback.ema.module.parameters()))
    assert [ours.data_ptr() == theirs.data_ptr() for ours, theirs in pairs] == [True, True, False, False]
    before = module.model[0].weight.clone()
    callback.ema.update(module.model)
    assert torch.equal(module.model[0].weight, before) and not any(p.requires_grad for p in callback.ema.parameters())


def evaluate(network, data, split):
    """Mean cross entropy and accuracy over a split, picture by picture in one batch."""
    data.setup("test")
    loader = {"val": data.val_dataloader, "test": data.test_dataloader}[split]()
    batches = [data.on_after_batch_transfer(batch, 0) for batch in loader]
    image, target, valid = (torch.cat([batch[key] for batch in batches]) for key in ("image", "target", "valid"))
    with torch.no_grad():
        logits = network(image[valid])
    return {
        "loss": float(torch.nn.functional.cross_entropy(logits, target[valid])),
        "acc1": float((logits.argmax(1) == target[valid]).double().mean()),
    }


def killed_and_whole(pics, launch, line, kills, ranks):
    """Two finished runs: one left alone, one killed before these steps and resumed."""
    assert (ended := launch(f"{line} --devices {ranks} --name whole", ranks=ranks)).code == 0, ended.out
    for step in kills:
        assert (
            ended := launch(f"{line} --devices {ranks} --name killed", ranks=ranks, kill_at_step=step)
        ).code == -9, ended.out
    assert (ended := launch(f"{line} --devices {ranks} --name killed", ranks=ranks)).code == 0, ended.out
    return pics / "runs" / "whole", pics / "runs" / "killed"


@pytest.mark.parametrize(
    "line, ranks", [(VIT, 1), *(pytest.param(each, 2, marks=pytest.mark.slow) for each in (VIT, BATCH_NORM))]
)
def test_killed_twice_is_the_uninterrupted_run(pics, launch, line, ranks):
    line = line.replace("--micro_batch_size 4", f"--micro_batch_size {4 // ranks}")
    runs = killed_and_whole(pics, launch, f"{line} {MIXED} --epochs 3 --save_every_steps 3", (5, 9), ranks)
    for name in ("last.ckpt", "best.ckpt"):
        one, other = (checkpoint(run, name) for run in runs)
        assert equal(one["ema_state_dict"], other["ema_state_dict"]) and equal(one["state_dict"], other["state_dict"])
        assert not equal(one["ema_state_dict"], one["state_dict"])
    one, other = (
        [score for row in read_history(run / "metrics.csv") for score in row.items() if "val" in score[0]]
        for run in runs
    )
    assert one == other and len(one) == 12
    assert result_of(runs[0])["test/loss"] == result_of(runs[1])["test/loss"]


def ask():
    """SIGTERM in the passes of the sixth optimizer step."""
    original = Task.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    Task.training_step = training_step


@pytest.mark.slow
def test_preempted_it_is_saved_after_its_update(pics, launch):
    assert launch(f"{VIT} --epochs 2 --name whole").code == 0
    assert launch(f"{VIT} --epochs 2 --name asked", before=ask).code == 75
    assert (
        checkpoint(pics / "runs" / "asked")["global_step"] == 6 and launch(f"{VIT} --epochs 2 --name asked").code == 0
    )
    assert equal(*(checkpoint(pics / "runs" / name)["ema_state_dict"] for name in ("whole", "asked")))


def data_of(run, monkeypatch):
    monkeypatch.chdir(run.parents[1])
    monkeypatch.delenv("VITLAB_DECISION", raising=False)
    return build.resolve(read(["--config", str(run / "config.yaml"), "--name", "look", "--dry_run"])).data


@pytest.mark.parametrize(
    "line, ranks", [(VIT, 1), (BATCH_NORM, 1), pytest.param(BATCH_NORM, 2, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("chosen", [True, False])
def test_both_are_scored_and_one_is_chosen(pics, launch, monkeypatch, line, ranks, chosen):
    words = "" if chosen else "--use_ema false"
    assert (ended := launch(f"{line} --epochs 3 --name one --devices {ranks} {words}", ranks=ranks)).code == 0, (
        ended.out
    )
    run = pics / "runs" / "one"
    rows, result, data = (
        [row for row in read_history(run / "metrics.csv") if "val/acc1" in row],
        result_of(run),
        data_of(run, monkeypatch),
    )
    for stage, use_ema in (("val", False), ("val_ema", True)):
        expected = evaluate(models.load(run / "checkpoints" / "last.ckpt", use_ema)[0], data, "val")
        if ranks == 1 or use_ema:  # each rank scores raw weights with its own statistics
            assert {name: rows[-1][f"{stage}/{name}"] for name in expected} == pytest.approx(expected, rel=1e-4)
    stage = "val_ema" if chosen else "val"
    best = max(rows, key=lambda row: (row[f"{stage}/acc1"], -row["epoch"]))
    assert (result["metric"], result["best"], result["best_epoch"]) == (
        f"{stage}/acc1",
        best[f"{stage}/acc1"],
        best["epoch"],
    )
    assert checkpoint(run, "best.ckpt")["epoch"] == best["epoch"] and result["val_ema/loss"] == best["val_ema/loss"]
    assert equal(models.load(run)[0].state_dict(), models.load(run, chosen)[0].state_dict())
    expected = evaluate(models.load(run, chosen)[0], data, "test")
    assert {name: result[f"test/{name}"] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert result["test/loss"] != pytest.approx(
        evaluate(models.load(run, not chosen)[0], data, "test")["loss"], rel=1e-3
    )
    table = pd.read_csv(run / "predictions.csv")
    named = [f"prediction_{name}" for name in data.spec["class_names"]]
    likelihood = [row[f"prediction_{row['target']}"] for _, row in table.iterrows()]
    assert -torch.tensor(likelihood).log().mean() == pytest.approx(result["test/loss"], rel=1e-4) and len(named) == 3


def test_eval_only_init_and_export_take_what_is_asked(pics, launch, capsys):
    line = VIT.replace(" --ema_decay 0.8", "")
    assert launch(f"{VIT} --epochs 1 --name one").code == 0 and launch(f"{line} --epochs 1 --name plain").code == 0
    runs = pics / "runs"
    assert "ema_state_dict" not in checkpoint(runs / "plain") and "val_ema/acc1" not in result_of(runs / "plain")
    raw, averaged = (models.load(runs / "one", use_ema)[0].state_dict() for use_ema in (False, True))
    for words, expected in (([], averaged), (["--use_ema", "true"], averaged), (["--use_ema", "false"], raw)):
        use_ema = {"true": True, "false": False}.get(words[-1] if words else None)
        assert equal(pretrained.read_weights(runs / "one", use_ema), expected)
        assert export.main([str(runs / "one"), *words]) == 0
        assert equal(models.load(runs / "one" / "model.safetensors")[0].state_dict(), expected)
        assert equal(pretrained.read_weights(runs / "one" / "model.safetensors", use_ema), expected)
        with pytest.raises(ValueError, match="weights only"):
            pretrained.read_weights(runs / "one" / "model.safetensors", expected is raw)
    again = "--eval_only --init runs/one --logger csv --accelerator cpu --workers 0 --global_batch_size 8"
    for use_ema in ("true", "false"):
        assert (ended := launch(f"{again} --use_ema {use_ema} --name {use_ema}")).code == 0, ended.out
    assert result_of(runs / "true")["test/loss"] == pytest.approx(result_of(runs / "one")["test/loss"])
    assert result_of(runs / "false")["test/loss"] != pytest.approx(result_of(runs / "one")["test/loss"], rel=1e-4)
    refused = launch(f"{again.replace('one', 'plain')} --use_ema true --name refused")
    assert refused.code == 2 and "keeps no averaged weights (EMA)" in refused.out and not (runs / "refused").exists()


@pytest.mark.parametrize(
    "decay, use_ema, expected", [(None, None, False), (0.9, None, True), (0.9, False, False), (0.9, True, True)]
)
def test_which_weights_a_run_chooses(decay, use_ema, expected):
    assert uses_ema(decay, use_ema) is expected


def test_a_decay_that_keeps_nothing():
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match="--ema_decay"):
            Ema(decay)
