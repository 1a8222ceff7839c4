"""A network goes through export.py and comes back the same: models.load, --init, class order and what is said of it."""

import json

import pytest
import torch
from conftest import result_of
from safetensors import safe_open

import models
from datamodules.loading.files import sha256_of
from experiments import export
from models import pretrained


def logits(network):
    torch.manual_seed(0)
    with torch.no_grad():
        return network(torch.randn(2, 3, 16, 16))


@pytest.fixture
def run(tmp_path):
    """A run directory with raw and averaged weights, as training leaves it."""
    torch.manual_seed(1)
    network = models.create("vit_nano4", 3, 16, embed_dim=32, depth=2)
    spec = {
        "task": "classification",
        "num_outputs": 3,
        "class_names": ["b", "a", "c"],
        "image_size": [16, 16],
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.2, 0.3],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
        "id_column": None,
    }
    raw = {f"model.{key}": value for key, value in network.state_dict().items()}
    content = {
        "state_dict": raw,
        "ema_state_dict": {key: value * 0.5 for key, value in raw.items()},
        "epoch": 2,
        "global_step": 12,
        "config": {"model": "vit_nano4", "model_args": {"embed_dim": 32, "depth": 2}, "image_size": 16},
        "spec": spec,
    }
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    torch.save(content, tmp_path / "run" / "checkpoints" / "best.ckpt")
    return tmp_path / "run"


@pytest.mark.parametrize("words, use_ema", [([], True), (["--use_ema", "true"], True), (["--use_ema", "false"], False)])
def test_round_trip(run, capsys, words, use_ema):
    assert export.main([str(run), *words]) == 0 and "model.safetensors" in capsys.readouterr().out
    file = run / "model.safetensors"
    network, spec = models.load(file)
    source, expected = models.load(run, use_ema)
    assert not network.training and spec == expected and torch.equal(logits(network), logits(source))
    other = models.create("vit_nano4", 3, 16, embed_dim=32, depth=2).eval()
    assert f"{len(other.state_dict())} of {len(other.state_dict())} tensors" in pretrained.initialise(
        other, str(file), name="vit_nano4"
    )
    assert torch.equal(logits(other), logits(source))
    with pytest.raises(ValueError, match="only"):
        models.load(file, not use_ema)
    with safe_open(file, "pt") as content:
        metadata = {key: json.loads(value) for key, value in content.metadata().items() if key != "format"}
    assert metadata["model"] == "vit_nano4" and metadata["model_args"] == {"embed_dim": 32, "depth": 2}
    assert (
        metadata["classes"] == ["b", "a", "c"] and metadata["mean"] == [0.4, 0.5, 0.6] and metadata["crop_pct"] == 0.9
    )
    assert (
        metadata["source_sha256"] == sha256_of(run / "checkpoints" / "best.ckpt")
        and metadata["vitlab"]["use_ema"] is use_ema
    )
    assert pretrained.read_about(file)["spec"]["class_names"] == ["b", "a", "c"]


@pytest.mark.parametrize(
    "words, line",
    [
        (["nowhere"], "no weights at nowhere"),
        (["{run}", "--out", "a.pth"], "must end in .safetensors"),
        (["http://host/run"], "from files only"),
    ],
)
def test_mistakes_exit_2_in_a_line(run, capsys, words, line):
    assert export.main([word.format(run=run) for word in words]) == 2
    said = capsys.readouterr().err
    assert line in said and len(said.splitlines()) == 1


def test_weights_that_do_not_fit_their_model_are_not_exported(run):
    file = run / "checkpoints" / "best.ckpt"
    content = torch.load(file, weights_only=True)
    del content["ema_state_dict"]
    content["state_dict"].pop("model.head.bias")
    torch.save(content, file)
    with pytest.raises(RuntimeError, match="head.bias"):
        export.export(run)
    assert export.main([str(run)]) == 2
    assert not (run / "model.safetensors").exists()


def test_an_exported_run_scores_as_the_run(pics, launch):
    line = (
        "--data_dir pics --image_size 16 --model vit_nano4 --model_args.embed_dim 32 --model_args.depth 2 --recipe "
        "none --global_batch_size 8 "
        "--workers 0 --logger csv --accelerator cpu"
    )
    assert launch(f"{line} --epochs 1 --name one").code == 0
    export.export(pics / "runs" / "one", pics / "one.safetensors")
    ended = launch(f"{line} --eval_only --init one.safetensors --name scored")
    assert (
        ended.code == 0
        and result_of(pics / "runs" / "scored")["test/loss"] == result_of(pics / "runs" / "one")["test/loss"]
    ), ended.out
