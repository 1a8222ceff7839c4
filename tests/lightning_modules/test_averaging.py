"""Averaged checkpoints: timm's mean, of the right epochs, through kills, and what a run then stands for."""

import re
from types import SimpleNamespace

import pytest
import torch
from conftest import result_of

import models
from lightning_modules.callbacks.averaging import Averaging, mean, parse
from lightning_modules.callbacks.checkpoints import AtomicCheckpointIO
from lightning_modules.loggers.csv_logger import read_history
from models import pretrained

TINY = (
    "--data_dir pics --image_size 16 --recipe none --global_batch_size 8 --micro_batch_size 4 --lr 2e-3 --workers 0 "
    "--logger csv "
    "--accelerator cpu"
)
VIT = f"{TINY} --model vit_nano4 --model_args.embed_dim 32 --model_args.depth 2 --model_args.drop_path 0.2"


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def weights(folder, name):
    return torch.load(folder / "checkpoints" / name, weights_only=True)


def timms_mean(states):
    """The arithmetic of timm's avg_checkpoints.py (v1.0): double precision sums over counts, cut to float32's range,
    float32."""
    total, counts = {}, {}
    for state in states:
        for name, value in state.items():
            total[name] = value.double() if name not in total else total[name] + value.double()
            counts[name] = counts.get(name, 0) + 1
    limit = torch.finfo(torch.float32)
    return {name: (value / counts[name]).clamp(limit.min, limit.max).float() for name, value in total.items()}


def test_the_mean_is_timms_as_loaded_into_a_network():
    networks = []
    for seed in range(3):
        torch.manual_seed(seed)
        networks.append(models.create("timm/test_resnet", 3, 32))
        for _ in range(2 * seed + 1):  # batch norm counts 1, 3, 5 batches; then 1, 3, 6
            networks[-1](torch.randn(2, 3, 32, 32))
    networks[2](torch.randn(2, 3, 32, 32))
    states = [network.state_dict() for network in networks]
    ours, theirs = (models.create("timm/test_resnet", 3, 32) for _ in range(2))
    before = {name: value.clone() for name, value in states[0].items()}
    ours.load_state_dict(mean(iter(states)))
    theirs.load_state_dict(timms_mean(states))
    assert equal(ours.state_dict(), theirs.state_dict()) and equal(states[0], before)
    assert next(value for name, value in mean(states).items() if "num_batches" in name).tolist() == 3  # of 10 / 3
    assert {name: value.dtype for name, value in mean(states).items()} == {
        name: value.dtype for name, value in states[0].items()
    }


def test_the_mean_needs_the_same_names():
    with pytest.raises(ValueError, match="other networks"):
        mean([{"a": torch.ones(1)}, {"b": torch.ones(1)}])


@pytest.mark.parametrize("text", ["last", "last-0", "5", "first-3", "best-x", "last-5 ", "last--1"])
def test_nonsense_is_refused(text):
    with pytest.raises(ValueError, match=f"--average_checkpoints {re.escape(text)}: give last-5 or best-3"):
        parse(text)
    assert parse("last-5") == ("last", 5) and parse("best-12") == ("best", 12)


class Trained:
    """A training of epochs with these values of val/acc1; its weights are the epoch's number."""

    def __init__(self, folder, rule, mode="max", callback=None):
        self.io = AtomicCheckpointIO()
        strategy = SimpleNamespace(
            checkpoint_io=self.io, broadcast=lambda value: value, save_checkpoint=self.io.save_checkpoint
        )
        self.trainer = SimpleNamespace(
            datamodule=None, strategy=strategy, is_global_zero=True, global_step=0, callbacks=[]
        )
        self.callback, self.folder = callback or Averaging(folder, rule, "val/acc1", mode, use_ema=False), folder

    def epochs(self, values, start=0):
        for epoch, value in enumerate(values, start):
            self.trainer.current_epoch, self.trainer.callback_metrics = epoch, {"val/acc1": torch.tensor(value)}
            self.module = SimpleNamespace(
                state_dict=lambda epoch=epoch: {"model.w": torch.tensor(float(epoch))}, config={}, spec={}
            )
            self.callback.on_train_epoch_end(self.trainer, self.module)
        return self

    def files(self):
        return sorted(int(file.stem[-4:]) for file in self.folder.glob("weights-*"))


NAN = float("nan")


@pytest.mark.parametrize(
    "rule, values, mode, kept",
    [
        ("last-3", [0.5, 0.1, 0.2, NAN, 0.3], "max", [2, 3, 4]),
        ("last-9", [0.5, 0.1], "max", [0, 1]),
        ("best-2", [0.1, 0.9, 0.5, 0.6, 0.2], "max", [1, 3]),
        ("best-2", [0.1, 0.9, 0.5, 0.6, 0.2], "min", [0, 4]),
        ("best-2", [0.5, 0.5, 0.5, NAN, 0.4], "max", [0, 1]),
        ("best-2", [NAN, NAN], "max", []),
    ],
)
def test_the_right_epochs_are_kept(tmp_path, rule, values, mode, kept):
    trained = Trained(tmp_path, rule, mode).epochs(values)
    assert sorted(trained.callback.kept) == kept
    content = trained.callback.finish(trained.trainer, trained.module)
    assert (
        trained.files() == kept
        and (content is None) == (not kept)
        and (tmp_path / "averaged.ckpt").exists() == bool(kept)
    )
    if kept:
        assert content["averaged_epochs"] == kept and float(content["state_dict"]["model.w"]) == pytest.approx(
            sum(kept) / len(kept)
        )


@pytest.mark.parametrize("rule", ["last-2", "best-2"])
def test_whatever_of_the_two_last_saved_states_is_loaded_its_files_are_there(tmp_path, rule):
    trained, states = Trained(tmp_path, rule), []
    for epoch in range(8):
        trained.epochs([0.1 * epoch], epoch)
        for kept in states[-2:]:  # killed here, last.ckpt is of the epoch before, or damaged: last-1.ckpt is
            assert set(kept) <= set(trained.files())
        states.append(list(trained.callback.kept))
        assert len(trained.files()) <= 4


def test_a_state_goes_on_and_another_runs_is_forgotten(tmp_path):
    (tmp_path / "other").mkdir()
    trained = Trained(tmp_path, "best-2").epochs([0.1, 0.9, 0.5])
    state = trained.callback.state_dict()
    again, other = (
        Averaging(folder, "best-2", "val/acc1", "max", use_ema=False) for folder in (tmp_path, tmp_path / "other")
    )
    again.load_state_dict(state)
    other.load_state_dict(state)
    assert again.kept == trained.callback.kept and again.fallen == {0: 2} and other.kept == {}
    assert sorted(Trained(tmp_path, "", callback=again).epochs([0.7, 0.2], 3).callback.kept) == [1, 3]


def test_an_epoch_the_disk_does_not_take_is_not_kept(tmp_path, monkeypatch, capsys):
    trained = Trained(tmp_path, "last-2").epochs([0.1, 0.2])
    monkeypatch.setattr(
        "lightning_modules.callbacks.checkpoints._write",
        lambda content, path: (_ for _ in ()).throw(OSError(28, "No space left")),
    )
    trained.epochs([0.3], 2)
    assert sorted(trained.callback.kept) == [0, 1] and "could not be saved" in capsys.readouterr().err
    with pytest.raises(OSError, match="No space left"):
        trained.callback.finish(trained.trainer, trained.module)
    assert trained.files() == [0, 1]


def keep_files():
    Averaging.clear = lambda self: None


@pytest.mark.parametrize(
    "rule, ema, ranks",
    [
        ("last-2", "--ema_decay 0.8", 1),
        pytest.param("best-2", "--ema_decay 0.8 --use_ema false", 1, marks=pytest.mark.slow),
        pytest.param("best-2", "--ema_decay 0.8", 2, marks=pytest.mark.slow),
    ],
)
def test_killed_it_ends_as_left_alone_and_the_run_stands_for_the_average(pics, launch, rule, ema, ranks):
    line = VIT.replace("--micro_batch_size 4", f"--micro_batch_size {4 // ranks}")
    line = f"{line} {ema} --epochs 4 --average_checkpoints {rule} --devices {ranks} --save_every_steps 3"
    assert (ended := launch(f"{line} --name whole", ranks=ranks, before=keep_files)).code == 0, ended.out
    for step in (5, 13):
        assert launch(f"{line} --name killed", ranks=ranks, kill_at_step=step).code == -9
    assert (ended := launch(f"{line} --name killed", ranks=ranks, before=keep_files)).code == 0, ended.out
    one, other = pics / "runs" / "whole", pics / "runs" / "killed"
    files = sorted(file.name for file in (one / "checkpoints").iterdir())
    assert files == sorted(file.name for file in (other / "checkpoints").iterdir()) and len(files) == 6, files
    assert all(equal(weights(one, name)["state_dict"], weights(other, name)["state_dict"]) for name in files)
    average, result, use_ema = weights(one, "averaged.ckpt"), result_of(one), "false" not in ema
    kept = [weights(one, name) for name in files if name.startswith("weights-")]
    rows = [row for row in read_history(one / "metrics.csv") if "val/acc1" in row]
    ranking = [row["epoch"] for row in sorted(rows, key=lambda row: (row[result["metric"]], -row["epoch"]))]
    assert (
        [content["epoch"] for content in kept]
        == average["averaged_epochs"]
        == ([2, 3] if rule == "last-2" else sorted(ranking[-2:]))
    )
    assert equal(
        {name: value for name, value in timms_mean([content["state_dict"] for content in kept]).items()},
        average["state_dict"],
    )
    last = weights(one, "last.ckpt")
    assert average["averaged_epochs"][-1] != 3 or equal(
        kept[-1]["state_dict"], last["ema_state_dict" if use_ema else "state_dict"]
    )
    network = models.load(one)[0]
    assert equal({f"model.{name}": value for name, value in network.state_dict().items()}, average["state_dict"])
    assert equal(pretrained.read_weights(one), network.state_dict()) and average["use_ema"] is use_ema
    with pytest.raises(ValueError, match=f"holds the {'averaged' if use_ema else 'raw'} weights only"):
        models.load(one, not use_ema)
    assert result["metric"] == ("val_ema/acc1" if use_ema else "val/acc1") and result["best_epoch"] == ranking[-1]
    assert result["averaged_epochs"] == " ".join(map(str, average["averaged_epochs"])) and "val_ema/acc1" not in result
    assert {key: value for key, value in result.items() if "/" in key} == {
        key: value for key, value in result_of(other).items() if "/" in key
    }
    again = (
        "--eval_only --init runs/whole --logger csv --accelerator cpu --workers 0 --global_batch_size 8 "
        "--micro_batch_size 4 --name again"
    )
    assert (ended := launch(again)).code == 0, ended.out
    scored = result_of(pics / "runs" / "again")
    assert scored["test/loss"] == pytest.approx(result["test/loss"], rel=1e-5)
    assert result["val/loss"] not in [row[f"{stage}/loss"] for row in rows for stage in ("val", "val_ema")]


def test_killed_after_the_training_it_is_averaged_by_the_same_command(pics, launch):
    line = f"{VIT} --epochs 2 --average_checkpoints last-2"
    assert launch(f"{line} --name one", before=keep_files).code == 0
    run, first = pics / "runs" / "one", result_of(pics / "runs" / "one")
    before = weights(run, "averaged.ckpt")
    for file in (run / "checkpoints" / "averaged.ckpt", run / "result.json"):
        file.unlink()
    assert (ended := launch(f"{line} --name one")).code == 0, ended.out
    assert equal(weights(run, "averaged.ckpt")["state_dict"], before["state_dict"])
    assert not list((run / "checkpoints").glob("weights-*"))  # the run has finished
    assert {key: value for key, value in result_of(run).items() if "/" in key} == {
        key: value for key, value in first.items() if "/" in key
    }


def test_a_damaged_file_is_named_and_without_it_the_rest_is_averaged(pics, launch):
    line, folder = f"{VIT} --epochs 2 --average_checkpoints last-2 --name one", pics / "runs" / "one" / "checkpoints"
    assert launch(line, before=keep_files).code == 0
    (folder.parent / "result.json").unlink()
    content = bytearray((folder / "weights-0000.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "weights-0000.ckpt").write_bytes(content)
    refused = launch(line)
    assert refused.code == 1 and "weights-0000.ckpt is damaged" in refused.out and "Traceback" not in refused.out, (
        refused.out
    )
    (folder / "weights-0000.ckpt").unlink()
    assert launch(line).code == 0 and result_of(folder.parent)["averaged_epochs"] == "1"
