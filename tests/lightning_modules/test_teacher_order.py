"""A teacher of plain weights tells nothing of its classes: what is assumed is said, and its score shows a wrong order
before the first step."""

import re

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import launcher, weights_of, write_pictures
from table_files import ids, write_comp
from timm.data import ImageNetInfo

from experiments import prepare, run
from lightning_modules.teachers.teacher import Teacher

TINY = (
    "--image_size 16 --recipe none --model vit_nano4 --warmup_steps 0 --workers 0 --logger none --global_batch_size 8 "
    "--micro_batch_size 8 "
    "--accelerator cpu --hflip 0 --val_fraction 0.2 --crop_scale [0.5,1]"
)
SMALL = f"{TINY} --model_args.embed_dim 16 --model_args.depth 1 --model_args.patch_size 8"
SPEC = {"task": "classification", "num_outputs": 1000, "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Class folders whose second set sorts the other way, a run on the first that is right on nearly all, and its
    weights as a plain file."""
    folder = tmp_path_factory.mktemp("trained")
    for place, counts in (
        ("pics", {"ant": 30, "bee": 30, "cat": 30}),
        ("turned", {"c_ant": 30, "b_bee": 30, "a_cat": 30}),
    ):
        write_pictures(folder / place / "train", counts, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run.main(f"{TINY} --data_dir pics --epochs 4 --lr 1e-3 --name t".split()) == 0
    weights = {
        key.removeprefix("model."): value
        for key, value in weights_of(folder / "runs" / "t" / "checkpoints" / "best.ckpt").items()
    }
    torch.save(weights, folder / "plain.pth")
    return folder


PLAIN = "--teacher vit_nano4 --teacher_init plain.pth"


def acc1(told):
    """(the teacher's accuracy in percent, how many lines tell one)."""
    found = re.findall(r"^teacher \S+: val/acc1 ([\d.]+) % on 18 pictures \(chance is 33.33 %\)$", told, re.M)
    return float(found[0]) if found else None, len(found)


@pytest.mark.parametrize(
    "words, data, low, high, order",
    [
        (PLAIN, "pics", 90, 100, "ant, bee, cat"),
        (PLAIN, "turned", 0, 40, "a_cat, b_bee, c_ant"),
        ("--teacher runs/t,runs/t", "pics", 90, 100, None),
    ],
)
def test_the_order_is_told_and_scored_before_the_first_step(trained, monkeypatch, capfd, words, data, low, high, order):
    monkeypatch.chdir(trained)
    assert run.main(f"{SMALL} --data_dir {data} {words} --epochs 1 --name student --overwrite".split()) == 0
    told = capfd.readouterr().out
    value, lines = acc1(told)
    assert lines == 1 and low <= value <= high and told.index("teacher ") < told.index("epoch 1/1"), told
    assert told.count("names of its classes are not known") == (order is not None)
    assert (
        order is None or f"{PLAIN}: the names of its classes are not known: taken to be in this order: {order}" in told
    ), told


def test_the_score_changes_no_training(trained, monkeypatch, capfd):
    monkeypatch.chdir(trained)
    line = f"{SMALL} --data_dir pics {PLAIN} --epochs 1 --model_args.drop_path 0.2 --mixup 0.8 --random_erasing 0.5"
    for name in ("told", "not"):
        if name == "not":
            monkeypatch.setattr("experiments.running.teacher_score.tell", lambda *_: None)
        assert run.main(f"{line} --name {name}".split()) == 0
    told, silent = (weights_of(trained / "runs" / name / "checkpoints" / "last.ckpt") for name in ("told", "not"))
    assert all(torch.equal(told[key], silent[key]) for key in told)


@pytest.mark.slow
def test_two_ranks_tell_it_once(trained):
    two = launcher(trained)(f"{SMALL} --data_dir pics {PLAIN} --epochs 1 --devices 2 --name two", ranks=2)
    assert two.code == 0 and acc1(two.outs[0])[1] == 1 and acc1(two.outs[1])[1] == 0, two.outs


def test_the_answers_of_a_cache_too(trained, monkeypatch, capfd):
    monkeypatch.chdir(trained)
    assert prepare.main(f"teacher --out answers {SMALL} --data_dir turned {PLAIN} --epochs 1".split()) == 0
    told = capfd.readouterr().out
    assert acc1(told)[0] <= 40 and "taken to be in this order: a_cat, b_bee, c_ant" in told, told


def test_a_regression_says_what_scale_it_takes(trained, monkeypatch, capfd):
    write_comp(
        trained / "comp",
        {"Id": ids(24), "Score": np.arange(24.0)},
        {"Id": ids(4, "e")},
        {"Id": ids(4, "e"), "Score": [5.5] * 4},
    )
    monkeypatch.chdir(trained)
    net = timm.create_model("test_resnet", num_classes=1)
    torch.save(net.state_dict(), "one.pth")
    assert (
        run.main(
            f"{SMALL} --data_dir comp --teacher timm/test_resnet --teacher_init one.pth --epochs 1 --name "
            f"numbers".split()
        )
        == 0
    )
    told = capfd.readouterr().out
    assert re.search(
        r"its targets and their scale are not known: taken to be Score \(sigmoid, \d to 2\d\), as the student's", told
    ), told
    assert re.search(r"^teacher timm/test_resnet: val/rmse [\d.]+ on \d+ pictures$", told, re.M), told
    assert len(pd.read_csv(trained / "runs" / "numbers" / "oof.csv")) > 0


def test_the_classes_of_weights_that_timm_publishes_for_imagenet_are_known(monkeypatch):
    monkeypatch.setattr("models.pretrained.published_weights", lambda *_: timm.create_model("test_resnet").state_dict())
    info = ImageNetInfo()
    words = [
        f"{text} ({wnid})" if text == "crane" else text
        for text, wnid in zip(info.label_descriptions(), info.label_names())
    ]

    def load(names):
        return Teacher.load("timm/test_resnet.r160_in1k", student=SPEC | {"class_names": names})

    for names in (info.label_names(), words):
        assert load(names).notes == []
    for names in (info.label_names()[::-1], words[1:] + words[:1], [f"class{n:04}" for n in range(1000)]):
        with pytest.raises(
            ValueError, match="was trained for other targets than the student's: class_names number 0 is"
        ):
            load(names)
