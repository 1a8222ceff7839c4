"""Columns of a table as inputs beside the picture and as targets beside the target: learned, kept, predicted, resumed,
refused."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import result_of, weights_of
from small_networks import NAMES, SIZE, make
from small_runs import rows_of
from table_files import ids, table, write_comp

import models
from experiments import predict
from lightning_modules.objectives.aux_targets import Aux
from lightning_modules.optimization.optimizers import optimizer
from models.pretrained import columns_of, head_keys, initialise

LINE = (
    "--data_dir comp --target Score --task regression --image_size 16 --model vit_nano4 --model_args.embed_dim 32 "
    "--model_args.depth 1 "
    "--recipe none --accelerator cpu --global_batch_size 8 --workers 0 --logger csv --val_fraction 0.25 --lr 5e-3"
)
INPUTS, AUX = "--data_args.input_columns Eyes,Size", "--data_args.aux_targets Near,Eyes"


def frame(count, prefix, seed):
    """Score follows from Eyes and Size; the pictures are noise."""
    rng = np.random.default_rng(seed)
    eyes, size = rng.integers(0, 2, count), rng.normal(500, 100, count).round(2)
    return {
        "Id": ids(count, prefix),
        "Eyes": eyes,
        "Size": size,
        "Near": rng.integers(0, 2, count),
        "Score": (40 * eyes + 0.1 * (size - 500) + 30).round(3),
    }


@pytest.fixture
def comp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    test = frame(9, "t", 2)
    del test["Score"], test["Near"]
    return write_comp(tmp_path / "comp", frame(64, "a", 1), test, {"Id": test["Id"], "Score": 0})


@pytest.fixture
def train(comp, launch):
    """train("--epochs 2", "one") -> run directory."""

    def run(words, name="one", ranks=1, code=0, **how):
        ended = launch(
            f"{LINE} --micro_batch_size {8 // ranks} --devices {ranks} --name {name} {words}", ranks=ranks, **how
        )
        assert ended.code == code, ended.out
        return comp.parent / "runs" / name

    return run


def test_what_only_columns_tell_is_learned_with_them_and_predicted_the_same_by_all(train, comp):
    run, blind = train(f"--epochs 12 {INPUTS}"), train("--epochs 2", "blind")
    constant = pd.read_csv(run / "oof.csv")["target"].std(ddof=0)
    assert result_of(run)["val/rmse"] < 0.5 * constant and result_of(blind)["val/rmse"] > 0.8 * constant
    network, spec = models.load(run)
    trained = pd.read_csv(comp / "train.csv").set_index("Id").drop(pd.read_csv(run / "oof.csv")["Id"])[["Eyes", "Size"]]
    assert (
        spec["columns"]["names"] == ["Eyes", "Size"]
        and columns_of(spec) == 2
        and "columns" not in models.load(blind)[1]
    )
    np.testing.assert_allclose(spec["columns"]["mean"], trained.mean(), rtol=1e-6)
    np.testing.assert_allclose(spec["columns"]["std"], trained.std(ddof=0), rtol=1e-6)
    with pytest.raises(ValueError, match="takes 2 columns of a table"):
        network(torch.zeros(1, 3, 16, 16))
    theirs = pd.read_csv(run / "predictions.csv")
    shuffled = pd.read_csv(comp / "test.csv").iloc[::-1][["Size", "Id", "Eyes"]]
    shuffled.to_csv(comp / "again.csv", index=False)
    for words, expected in (([run], theirs), ([run, "--csv", "comp/again.csv"], theirs.iloc[::-1])):
        assert predict.main([*map(str, words), "--out", "out.csv", "--workers", "0"]) == 0
        ours = pd.read_csv("out.csv")
        assert ours["Id"].tolist() == expected["Id"].tolist()
        np.testing.assert_allclose(ours["prediction"], expected["prediction"], rtol=1e-5)
    assert (
        predict.main([str(run), str(blind), "--out", "both.csv", "--tta", "hflip", "--workers", "0"]) == 0
    )  # one with columns, one without
    again = train(f"--eval_only --init runs/one {INPUTS}", "two", ranks=2)
    one, other = (pd.read_csv(folder / "oof.csv") for folder in (run, again))
    np.testing.assert_allclose(other["prediction"], one["prediction"], rtol=1e-5)
    assert result_of(again)["val/rmse"] == pytest.approx(result_of(run)["val/rmse"], rel=1e-5)


def test_a_checkpoints_mean_and_std_are_kept(train, comp, launch):
    run = train(f"--epochs 1 {INPUTS}")
    answers, other = pd.read_csv(run / "oof.csv"), pd.read_csv(comp / "train.csv")
    other.loc[~other["Id"].isin(answers["Id"]), "Size"] *= 3  # of the rows trained on alone
    other.to_csv(comp / "train.csv", index=False)
    again = train(f"--eval_only --init runs/one {INPUTS}", "again")
    np.testing.assert_allclose(pd.read_csv(again / "oof.csv")["prediction"], answers["prediction"], rtol=1e-5)
    for words in ("", "--data_args.input_columns Size,Eyes"):
        ended = launch(f"{LINE} --eval_only --init runs/one {words} --name no")
        assert ended.code == 2 and "the checkpoint takes Eyes,Size" in ended.out, ended.out


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_with_both_is_the_undisturbed_run(train, launch, ranks):
    words = f"--epochs 2 {INPUTS} {AUX} --model_args.drop_path 0.1 --ema_decay 0.5 --save_every_steps 2"
    whole = train(words, "whole", ranks)
    train(words, "killed", ranks, code=-9, kill_at_step=7)
    killed = train(words, "killed", ranks)
    for name in ("last.ckpt", "best.ckpt"):
        one, other = (torch.load(run / "checkpoints" / name, weights_only=True) for run in (whole, killed))
        assert one["state_dict"].keys() == other["state_dict"].keys() > {"aux.head.weight", "model.column_mlp.0.weight"}
        assert all(torch.equal(value, other["state_dict"][key]) for key, value in one["state_dict"].items())
        assert one["state_dict"]["aux.head.weight"].abs().max() > 0 and not [
            key for key in one["ema_state_dict"] if "aux" in key
        ]
        assert str(one["optimizer_states"]) == str(other["optimizer_states"])
    assert (whole / "predictions.csv").read_bytes() == (killed / "predictions.csv").read_bytes()
    assert [row["train/aux_loss"] for row in rows_of(whole)] == [row["train/aux_loss"] for row in rows_of(killed)]


def test_aux_targets_are_of_the_training_alone(train, comp):
    run = train(f"--epochs 2 {AUX} --data_args.aux_weight 0.5 --average_checkpoints last-2")
    network, spec = models.load(run)
    assert not [key for key in network.state_dict() if "aux" in key] and "columns" not in spec
    assert list(pd.read_csv(run / "oof.csv").columns) == ["Id", "fold", "target", "prediction"]
    assert 0.5 < float(rows_of(run)[-1]["train/aux_loss"]) < 0.9
    assert weights_of(run / "checkpoints" / "last.ckpt")["aux.head.weight"].shape == (2, 32)
    next_run = train("--epochs 1 --init runs/one", "next")  # its weights alone
    assert "aux.head.weight" not in weights_of(next_run / "checkpoints" / "last.ckpt")


def test_the_loss_of_aux_targets():
    torch.manual_seed(0)
    model = models.create("vit_nano4", 3, 16, embed_dim=32, depth=1, columns=2)
    aux, image, columns = Aux(model, 2, 0.1), torch.randn(4, 3, 16, 16), torch.randn(4, 2)
    with aux.watching(model) as seen:
        model(image, columns)
    pooled, target = model.forward_head(model.forward_features(image), pre_logits=True), torch.rand(4, 2)
    assert len(seen) == 1 and torch.equal(seen[0], pooled) and not model.head._forward_pre_hooks
    torch.nn.init.normal_(aux.head.weight)
    p = (pooled @ aux.head.weight.T).sigmoid()
    torch.testing.assert_close(aux(pooled, target), -(target * p.log() + (1 - target) * (1 - p).log()).mean())
    with pytest.raises(ValueError, match="classifier of type Identity"):
        Aux(models.create("timm/resnet18", 0), 2, 0.1)


@pytest.mark.parametrize("head", [{}, {"head_hidden": 16}])
@pytest.mark.parametrize("name", NAMES)
def test_a_network_with_columns(name, head):
    plain, model = make(name, **head).eval(), make(name, columns=3, **head).eval()
    x, columns = torch.randn(2, 3, *[SIZE.get(name, 64)] * 2), torch.randn(2, 3)
    first, before = (network.get_classifier().fc1 if head else network.get_classifier() for network in (model, plain))
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert first.in_features == pooled.shape[1] + 32
    assert torch.equal(first.weight[:, :-32], before.weight)
    with torch.no_grad():
        first.weight[:, -32:] = 0
        torch.testing.assert_close(model(x, columns), plain(x))
        first.weight[:, -32:] = 1
    assert not torch.allclose(model(x, columns), plain(x)) and not torch.allclose(
        model(x, columns), model(x, columns + 1)
    )
    assert head_keys(model) >= {"column_mlp.0.weight", "column_mlp.0.bias"}
    groups = optimizer(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5).param_groups
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert {scales[id(parameter)] for parameter in model.column_mlp.parameters()} == {1.0}
    model.reset_classifier(7)
    assert model(x, columns).shape == (2, 7)


def test_pretrained_weights_without_columns(tmp_path):
    plain, model = make("vit_s16", 9), make("vit_s16", columns=2)
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    assert "a fresh one of 5 starts" in initialise(model, str(tmp_path / "plain.pth"), name="vit_s16", reset_head=True)
    assert torch.equal(model.blocks[0].attn.qkv.weight, plain.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize(
    "words, says",
    [
        ("--data_args.input_columns Eyes,Sise", "no column 'Sise'; did you mean 'Size'?"),
        ("--data_args.input_columns Eyes,Eyes", "each once"),
        ("--data_args.input_columns Eyes,Score", "Score is a target"),
        ("--data_args.aux_targets Id", "Id is the id"),
        ("--data_args.input_columns Near", "test.csv: has no column 'Near'"),
        (f"{INPUTS} --mixup 0.2", "--mixup 0 --cutmix 0"),
        (f"{AUX} --cutmix 1", "aux_targets does not go with mixed"),
        (f"{AUX} --data_args.aux_weight 0", "must be above 0"),
        (f"{INPUTS} --teacher vit_nano4", "input_columns does not go with --teacher"),
        (f"{AUX} --teacher vit_nano4", "aux_targets does not go with"),
        ("--data_args.input_columns Bad", "column Bad: no numbers in row 5: 'x'"),
        ("--data_args.aux_targets Bad", "column Bad: no numbers in row 5: 'x'"),
        (f"{INPUTS} --model deit_ti16_distilled --model_args {{}}", "type tuple"),
    ],
)
def test_mistakes_end_with_a_line(comp, launch, words, says):
    content = pd.read_csv(comp / "train.csv")
    content["Bad"] = ["x" if row == 3 else "true" for row in range(len(content))]
    content.to_csv(comp / "train.csv", index=False)
    test = pd.read_csv(comp / "test.csv")
    test["Bad"] = 1
    test.to_csv(comp / "test.csv", index=False)
    ended = launch(f"{LINE} --epochs 1 {words}")
    assert ended.code == 2 and says in ended.out and "Traceback" not in ended.out, ended.out


def test_what_predict_and_a_student_cannot_use(train, comp, capsys, launch):
    run = train(f"--epochs 1 {INPUTS}")
    assert (
        predict.main([str(run), "--folder", "comp/test"]) == 2
        and "columns beside the picture (Eyes, Size)" in capsys.readouterr().err
    )
    test = pd.read_csv(comp / "test.csv").astype({"Eyes": object})
    test.loc[2, "Eyes"] = "often"
    test.drop(columns="Size").to_csv(comp / "bad.csv", index=False)
    assert predict.main([str(run), "--csv", "comp/bad.csv", "--workers", "0"]) == 2
    said = capsys.readouterr().err
    assert "has no column 'Size'" in said and "column Eyes: no numbers in row 4: 'often'" in said
    ended = launch(f"{LINE} --epochs 1 --teacher runs/one --name student")
    assert ended.code == 2 and "a teacher sees pictures only" in ended.out, ended.out
    ended = launch(f"{LINE} --epochs 1 {INPUTS} --name planned --dry_run")
    assert ended.code == 0 and f"{result_of(run)['params']:,} parameters" in ended.out, ended.out


def test_values_of_samples_and_what_a_resume_compares(comp):
    plain, data = (
        table(comp, target="Score"),
        table(comp, target="Score", input_columns=["Eyes", "Size"], aux_targets="Size", epochs=1),
    )
    assert (
        "columns" not in plain.spec
        and plain.fingerprint != data.fingerprint
        and data.splits["val"].more.keys() == {"columns"}
    )
    more, raw = data.splits["train"].more, pd.read_csv(comp / "train.csv").iloc[data.rows["train"]]["Size"].to_numpy()
    np.testing.assert_allclose(more["columns"].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(more["aux"][:, 0], (raw - raw.min()) / (raw.max() - raw.min()), atol=1e-5)
    batch = next(iter(data.train_dataloader()))
    assert (
        torch.equal(batch["columns"], torch.from_numpy(more["columns"])[batch["index"]])
        and batch["columns"].dtype == torch.float32
    )
    assert {*next(iter(plain.train_dataloader()))} == {"image", "target", "index"}
