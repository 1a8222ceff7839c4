"""A student with two heads under every distillation loss: what evaluation averages has all been trained, on one rank
and on two."""

import numpy as np
import pytest
import torch
from conftest import weights_of, write_pictures
from table_files import ids, write_comp

from experiments import run
from lightning_modules.objectives.distill_losses import LOSSES

TINY = (
    "--image_size 16 --model_args.embed_dim 16 --model_args.depth 1 --recipe none --epochs 1 --warmup_steps 0 --lr "
    "1e-2 --workers 0 "
    "--logger none --global_batch_size 8 --micro_batch_size 4 --accelerator cpu --hflip 0 --model_args.patch_size 8"
)
DATA = {"pics": "--data_dir pics", "labels": "--data_dir labels --target a,b --task multilabel"}
STUDENTS = {"token": "deit_ti16_distilled --model_args.num_heads 2", "heads": "vit_nano4 --model_args.dist_head true"}


DEFAULT = ("soft", "hard", "features")  # the other losses are slow


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """Class folders and a table of two labels, each with a trained teacher of another width than the students'."""
    folder = tmp_path_factory.mktemp("taught")
    write_pictures(folder / "pics" / "train", {"dark": 14, "grey": 13, "light": 13}, seed=1)
    rng = np.random.default_rng(0)
    write_comp(folder / "labels", {"Id": ids(30), **{name: rng.integers(0, 2, 30) for name in "ab"}})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("pics", "labels"):
            line = TINY.replace("embed_dim 16", "embed_dim 32")
            assert run.main(f"{line} --model vit_nano4 {DATA[name]} --name {name}".split()) == 0
    return folder


def data_of(loss):
    return "pics" if "classification" in LOSSES[loss].tasks else "labels"


def line_of(loss, student):
    return f"{TINY} --model {STUDENTS[student]} {DATA[data_of(loss)]} --teacher runs/{data_of(loss)} --distill {loss}"


def check_heads(run, start):
    found = weights_of(run / "checkpoints" / "last.ckpt")
    for name in ("model.head.weight", "model.head.bias", "model.head_dist.weight", "model.head_dist.bias"):
        assert not torch.equal(found[name], start[name]), name


@pytest.fixture(scope="module")
def start(taught):
    """The first weights of each student on each data set: those after an epoch at rate 0."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(taught)
        for student, model in STUDENTS.items():
            for data, flags in DATA.items():
                assert run.main(f"{TINY} --model {model} {flags} --lr 0 --name start-{data}-{student}".split()) == 0
                found[student, data] = weights_of(
                    taught / "runs" / f"start-{data}-{student}" / "checkpoints" / "last.ckpt"
                )
    return found


@pytest.mark.parametrize(
    "loss, student",
    [
        *(pytest.param(each, "token", marks=() if each in DEFAULT else pytest.mark.slow) for each in LOSSES),
        ("features", "heads"),
    ],
)
def test_both_heads_are_trained(taught, start, monkeypatch, capsys, loss, student):
    monkeypatch.chdir(taught)
    assert run.main(f"{line_of(loss, student)} --name {loss}-{student}".split()) == 0
    check_heads(taught / "runs" / f"{loss}-{student}", start[student, data_of(loss)])
    assert ("the mean of its two heads learns the labels" in capsys.readouterr().out) == LOSSES[loss].on_features


@pytest.mark.parametrize(
    "loss", [loss if LOSSES[loss].on_features else pytest.param(loss, marks=pytest.mark.slow) for loss in LOSSES]
)
def test_both_heads_are_trained_on_two_ranks(taught, start, launch, loss):
    line = (
        line_of(loss, "token")
        .replace("--data_dir ", f"--data_dir {taught}/")
        .replace("--teacher ", f"--teacher {taught}/")
    )
    ended = launch(f"{line} --devices 2 --runs_dir {taught}/two --name {loss}", ranks=2)
    assert ended.code == 0, "\n".join(ended.outs)
    check_heads(taught / "two" / loss, start["token", data_of(loss)])
