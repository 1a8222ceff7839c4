"""predict.py against a plain script of timm, Pillow and torch; ids, averages, processes, bad pictures, devices, and
what it may import."""

import csv
import json
import math
import multiprocessing
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import FORKS, free_port, write_damaged, write_pictures
from PIL import Image
from timm.data import create_transform

import models
from experiments import export, predict, submit
from experiments.prediction import inference
from experiments.prediction.inference import How, Source
from experiments.prediction.rows import rows_of_folder
from models import pretrained

ROOT = Path(__file__).parents[2]
SPEC = {
    "task": "classification",
    "num_outputs": 3,
    "class_names": ["b", "a", "c"],
    "target_names": None,
    "target_range": None,
    "encoding": None,
    "image_size": [16, 16],
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.2, 0.3],
    "interpolation": "bicubic",
    "crop_pct": 0.8,
    "crop_mode": "center",
    "id_column": "Id",
    "table": {"id_column": "Id", "image": "{split}/{Id}.jpg"},
}
TIMM = {
    "model": "timm/vit_tiny_patch16_224",
    "model_args": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
}
NANO = {"model": "vit_nano4", "model_args": {"embed_dim": 32, "depth": 2}}


def write_run(folder, seed=0, config=None, finished=True, scale=20.0, **spec):
    """A run directory with weights, large enough that pictures are told apart."""
    config, spec = {"image_size": 16, **NANO, **(config or {})}, {**SPEC, **spec}
    torch.manual_seed(seed)
    network = models.create(
        config["model"],
        spec["num_outputs"],
        tuple(spec["image_size"]),
        **{key: value for key, value in config["model_args"].items() if key != "pretrained"},
    )
    network.head.weight.data.normal_().mul_(scale / 32)
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(
        {
            "state_dict": {f"model.{key}": value for key, value in network.state_dict().items()},
            "config": config,
            "spec": spec,
        },
        folder / "checkpoints" / "best.ckpt",
    )
    (folder / "result.json").write_text(json.dumps({"finished": finished}))
    return network.eval(), spec


@pytest.fixture
def comp(tmp_path, monkeypatch):
    """A competition's folder: nine pictures of any shape, listed in another order than they sort."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(3)
    (tmp_path / "comp" / "test").mkdir(parents=True)
    names = [f"{n:03d}" for n in rng.permutation(9)]
    for name in names:
        pixels = rng.integers(0, 255, (5, 5, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize(tuple(rng.integers(20, 60, 2)), 2).save(
            tmp_path / "comp" / "test" / f"{name}.jpg", quality=95
        )
    (tmp_path / "comp" / "test.csv").write_text("Id,Eyes\n" + "".join(f"{name},1\n" for name in names))
    return tmp_path


def answers(path="out.csv"):
    """{id: values} by the csv module alone."""
    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    return header, {row[0]: np.array(row[1:], np.float64) for row in rows}


def predicted(*words, code=0):
    assert (
        predict.main([*map(str, words), *([] if "--out" in words else ["--out", "out.csv"]), "--workers", "0"]) == code
    )
    return answers()[1] if code == 0 else None


def plain(network, spec, path, crops=None, flip=False):
    """What a script without vitlab does with one picture: timm's transform, normalised floats, softmax."""
    words = dict(
        interpolation=spec["interpolation"],
        mean=spec["mean"],
        std=spec["std"],
        crop_pct=spec["crop_pct"],
        crop_mode=spec["crop_mode"],
    )
    transform = create_transform((3, *spec["image_size"]), **words)
    picture = Image.open(path).convert("RGB")
    images = [transform(picture)]
    if crops:
        resized = transform.transforms[0](picture)
        (width, height), (h, w) = resized.size, spec["image_size"]
        corners = [(0, 0), (width - w, 0), (0, height - h), (width - w, height - h)]
        images += [
            transform.transforms[3](transform.transforms[2](resized.crop((x, y, x + w, y + h)))) for x, y in corners
        ]
    if flip:
        images += [image[:, :, list(range(image.shape[2]))[::-1]] for image in images]
    with torch.no_grad():
        return network(torch.stack(images)).softmax(1).double().mean(0).numpy()


@pytest.mark.parametrize(
    "crop_mode, size", [("center", [16, 16]), ("squash", [16, 16]), ("border", [16, 16]), ("center", [16, 24])]
)
def test_the_same_as_a_plain_script(comp, crop_mode, size):
    network, spec = write_run(comp / "run", config=TIMM, crop_mode=crop_mode, image_size=size)
    by_hand = timm.create_model("vit_tiny_patch16_224", img_size=size, num_classes=3, **TIMM["model_args"])
    by_hand.load_state_dict(network.state_dict())
    found = predicted("run", "--data_dir", "comp", "--batch_size", 4)
    header, _ = answers()
    assert header == ["Id", "prediction_b", "prediction_a", "prediction_c"]
    assert [*found] == pd.read_csv("comp/test.csv", dtype=str)["Id"].tolist()
    for name, values in found.items():
        np.testing.assert_allclose(values, plain(by_hand.eval(), spec, f"comp/test/{name}.jpg"), atol=2e-6)
    assert np.std([*found.values()], 0).max() > 1e-3  # pictures are told apart


@pytest.mark.parametrize("tta, words", [("hflip", {"flip": True}), ("multicrop", {"crops": True})])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_views_are_averaged_as_probabilities(comp, tta, words, crop_mode):
    network, spec = write_run(comp / "run", crop_mode=crop_mode)
    found = predicted("run", "--data_dir", "comp", "--tta", tta)
    expected = {name: plain(network, spec, f"comp/test/{name}.jpg", **words) for name in found}
    without = {name: plain(network, spec, f"comp/test/{name}.jpg") for name in found}
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], atol=2e-6)
    assert max(abs(expected[name] - without[name]).max() for name in found) > 1e-3


@pytest.mark.parametrize("change", [{"crop_mode": "border"}, {"crop_pct": 1.2}])
def test_crops_of_a_picture_that_is_shown_whole_are_refused(comp, capsys, change):
    write_run(comp / "run", **change)
    predicted("run", "--data_dir", "comp", "--tta", "multicrop", code=2)
    assert "--tta hflip" in capsys.readouterr().err


@pytest.mark.parametrize(
    "task, encoding, outputs",
    [
        ("multilabel", None, 3),
        ("regression", "sigmoid", 2),
        ("regression", "linear", 2),
        ("regression", "ordinal", 8),
        ("regression", "bins", 10),
    ],
)
def test_values_in_their_own_units(comp, task, encoding, outputs):
    names = (
        {"class_names": ["x", "y", "z"]}
        if task == "multilabel"
        else {"class_names": None, "target_names": ["t", "u"], "target_range": [[1, 100], [-5, 5]]}
    )
    network, _ = write_run(comp / "run", task=task, encoding=encoding, num_outputs=outputs, **names)
    logits = {}
    network.register_forward_hook(lambda module, given, out: logits.setdefault("last", out))
    found = predicted("run", "--data_dir", "comp")
    header, _ = answers()
    assert header == [
        "Id",
        *(f"prediction_{name}" for name in (["x", "y", "z"] if task == "multilabel" else ["t", "u"])),
    ]
    for name, values in found.items():
        logits.clear()
        plain(network, SPEC, f"comp/test/{name}.jpg")
        each = logits["last"][0].tolist()
        sigmoid = [1 / (1 + math.exp(-value)) for value in each]
        if task == "multilabel":
            expected = sigmoid
        else:
            parts = {"sigmoid": sigmoid, "linear": each, "ordinal": [sum(sigmoid[:4]) / 4, sum(sigmoid[4:]) / 4]}.get(
                encoding
            )
            if encoding == "bins":
                shares = [[math.exp(value) for value in each[:5]], [math.exp(value) for value in each[5:]]]
                parts = [sum(share * place / 4 for place, share in enumerate(part)) / sum(part) for part in shares]
            expected = [1 + 99 * parts[0], -5 + 10 * parts[1]]
        np.testing.assert_allclose(values, expected, rtol=2e-5, atol=2e-5)


def test_one_target_is_called_prediction(comp):
    write_run(
        comp / "run",
        task="regression",
        encoding="sigmoid",
        num_outputs=1,
        class_names=None,
        target_names=["Pawpularity"],
        target_range=[[1, 100]],
    )
    found = predicted("run", "--data_dir", "comp")
    assert answers()[0] == ["Id", "prediction"] and all(1 <= value <= 100 for (value,) in found.values())


def test_runs_count_the_same_and_folds_share_their_runs_part(comp, capsys):
    alone = {}
    for place, (name, words) in enumerate(
        {
            "cv/fold0": {},
            "cv/fold1": {"config": {"folds": 5}},
            "cv/fold10": {},
            "other": {"class_names": ["c", "b", "a"], "image_size": [24, 24], "finished": False},
        }.items()
    ):
        write_run(comp / name, seed=place, **words)
        alone[name] = predicted(name, "--data_dir", "comp")
    capsys.readouterr()
    export.export("other", "other.safetensors")
    folds = {key: sum(alone[f"cv/fold{n}"][key] for n in (0, 1, 10)) / 3 for key in alone["other"]}
    both = predicted("cv", "other.safetensors", "--data_dir", "comp")
    swapped = {
        key: values[[1, 2, 0]] for key, values in alone["other"].items()
    }  # its classes are c, b, a: the first's order is b, a, c
    for key in both:
        np.testing.assert_allclose(both[key], (folds[key] + swapped[key]) / 2, atol=1e-6)
    predicted("cv", "other", "--data_dir", "comp")
    assert "other has not finished" in capsys.readouterr().err
    write_run(comp / "few" / "fold1", config={"folds": 5})
    write_run(comp / "few" / "fold0", config={"folds": 5})
    predicted("few", "--data_dir", "comp")
    assert "few: 2 of 5 folds are there" in capsys.readouterr().err
    (comp / "few" / "fold2").mkdir()
    predicted("few", "--data_dir", "comp", code=2)
    assert "fold2 is not a run with weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"class_names": ["b", "a", "d"]},
            ["1 outputs are only in the first (c)", "1 outputs are only in the second (d)"],
        ),
        ({"task": "multilabel"}, ["task classification and multilabel"]),
        (
            {
                "task": "regression",
                "class_names": None,
                "target_names": ["t"],
                "target_range": [[0, 1]],
                "encoding": "sigmoid",
                "num_outputs": 1,
            },
            ["task classification and regression", "(t)"],
        ),
    ],
)
def test_networks_of_different_things_are_not_averaged(comp, capsys, change, words):
    write_run(comp / "one")
    write_run(comp / "two", **change)
    predicted("one", "two", "--data_dir", "comp", code=2)
    said = capsys.readouterr().err
    assert all(word in said for word in [*words, "one/checkpoints", "two/checkpoints"])


def test_the_table_decides_what_is_predicted(comp, capsys):
    write_run(comp / "run", config={"data_dir": "comp"})
    all_rows = predicted("run")  # test.csv of the folder it was trained on
    assert len(all_rows) == 9
    rows = pd.read_csv("comp/test.csv", dtype=str).sort_values("Id", ascending=False)[:4]
    rows.to_csv("hidden.csv", index=False, sep=";")
    some = predicted("run", "--csv", "hidden.csv", "--data_dir", "comp")
    assert [*some] == [*rows["Id"]] and all(np.allclose(some[key], all_rows[key], atol=1e-6) for key in some)
    rows.rename(columns={"Id": "name"}).to_csv("comp/named.csv", index=False)
    renamed = predicted("run", "--csv", "comp/named.csv", "--id_column", "name", "--image", "test/{name}")
    assert [*renamed] == [*some] and answers()[0][0] == "name"
    predicted("run", "--csv", "comp/named.csv", code=2)
    assert "no column 'Id'" in capsys.readouterr().err
    write_run(comp / "untabled", id_column=None, table=None)
    assert np.allclose(predicted("untabled", "--data_dir", "comp")["004"], all_rows["004"], atol=1e-6)
    (comp / "comp" / "test.csv").unlink()
    predicted("run", code=2)
    assert (
        "there is no test.csv or sample_submission.csv in comp, the folder the run was trained on"
        in capsys.readouterr().err
    )
    export.export("run", "run.safetensors")  # does not know where it was trained
    predicted("run.safetensors", code=2)
    assert "--data_dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    "table, words",
    [
        ("Id,Eyes\n", ["has a header and no row"]),
        ("Id,Eyes\n001,1\n001,2\n,3\n", ["ids more than once in rows 2 and 3", "no id in row 4"]),
        ("Id,Eyes\n001,1\n../../test/002,1\n", ["1 of 2 pictures are outside of the data folder", "row 3"]),
        ("Id,Eyes\n001,1\nnowhere,1\n", ["1 of 2 pictures are missing", "row 3", "nowhere", "--bad_images fill"]),
        ("Id,Eyes\n/etc/passwd,1\n", ["1 of 1 pictures are missing"]),
    ],
)
def test_broken_tables_are_told(comp, capsys, table, words):
    write_run(comp / "run")
    (comp / "comp" / "test.csv").write_text(table)
    predicted("run", "--data_dir", "comp", code=2)
    said = capsys.readouterr().err
    assert all(word in said for word in words) and "Traceback" not in said


def test_bad_pictures_stop_or_are_filled(comp, capsys):
    write_run(comp / "run")
    good = predicted("run", "--data_dir", "comp")
    (comp / "comp/test/003.jpg").write_bytes((comp / "comp/test/003.jpg").read_bytes()[:300])
    write_damaged(comp / "comp/test/005.jpg")
    (comp / "comp/test/007.jpg").unlink()
    predicted("run", "--data_dir", "comp", code=2)
    assert "007.jpg" in capsys.readouterr().err
    found = predicted("run", "--data_dir", "comp", "--bad_images", "fill", "--batch_size", 2)
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 3 and all(
        f"predict.py: Id {name}: " in said and f"test/{name}" in said for name in ("003", "005", "007")
    )
    rest = np.mean([good[name] for name in good if name not in ("003", "005", "007")], 0)
    for name, values in found.items():
        np.testing.assert_allclose(values, rest if name in ("003", "005", "007") else good[name], atol=1e-6)
    assert abs(sum(found["003"]) - 1) < 1e-6
    Image.new("RGB", (20, 20)).save("comp/test/007.jpg")
    predicted("run", "--data_dir", "comp", code=2)
    assert "1 of 9 pictures cannot be read" in (said := capsys.readouterr().err) and "test/003.jpg" in said
    Image.new("RGB", (20, 20)).save("comp/test/003.jpg")
    predicted("run", "--data_dir", "comp", code=2)
    assert "cannot read picture comp/test/005.jpg" in (said := capsys.readouterr().err) and "--bad_images fill" in said
    for file in (comp / "comp" / "test").iterdir():
        file.write_text("")
    predicted("run", "--data_dir", "comp", "--bad_images", "fill", code=2)
    assert "9 of 9 pictures cannot be read" in capsys.readouterr().err


def test_a_folder_without_a_table(comp, capsys):
    write_run(comp / "run")
    write_pictures(comp / "pictures", {"in/deeper": 2, "other": 1, ".hidden": 1})
    Image.new("RGB", (9, 9)).save("pictures/a b,c.png")
    (comp / "pictures" / "notes.txt").write_text("")
    found = predicted("run", "--folder", "pictures")
    assert answers()[0][0] == "id" and [*found] == ["a b,c.png", "in/deeper/0.jpg", "in/deeper/1.jpg", "other/0.jpg"]
    with pytest.raises(ValueError, match="no picture"):
        rows_of_folder(str(comp / "run"))
    with pytest.raises(FileNotFoundError):
        rows_of_folder("nowhere")
    (comp / "pictures" / "out.jpg").symlink_to(comp / "comp" / "test" / "001.jpg")
    predicted("run", "--folder", "pictures", code=2)
    assert "link that leaves the folder" in capsys.readouterr().err


def test_it_leaves_a_run_directory(comp, capsys):
    write_run(comp / "runs" / "cats")
    words = ["runs/cats", "--data_dir", "comp", "--workers", "0"]
    assert predict.main(words) == 0 and "9 predictions of 1 network, cpu fp32" in capsys.readouterr().out
    assert (
        predict.main([*words, "--tta", "hflip"])
        == predict.main([*words, "--csv", "comp/test.csv", "--name", "own"])
        == 0
    )
    assert sorted(folder.name for folder in (comp / "runs").iterdir()) == [
        "cats",
        "cats-predict",
        "cats-predict-hflip",
        "own",
    ]
    assert sorted(file.name for file in (comp / "runs" / "cats-predict").iterdir()) == [
        "config.yaml",
        "predictions.csv",
    ]
    about = json.loads((comp / "runs" / "cats-predict-hflip" / "config.yaml").read_text())
    assert (
        about["spec"] == SPEC
        and about["tta"] == "hflip"
        and about["rows"] == 9
        and about["runs"] == [str(comp / "runs" / "cats")]
    )
    import yaml

    assert yaml.safe_load((comp / "runs" / "cats-predict-hflip" / "config.yaml").read_text()) == about
    assert predict.main(words) == 0  # again
    write_run(comp / "runs" / "cv" / "fold1")
    assert (
        predict.main(["runs/cv/fold1/checkpoints/best.ckpt", *words]) == 0
        and (comp / "runs" / "cv-fold1+1-predict" / "predictions.csv").is_file()
    )
    capsys.readouterr()
    assert predict.main([*words, "--name", "cats"]) == 2 and "not of predict.py" in capsys.readouterr().err


def test_averaged_and_raw_weights(comp):
    network, spec = write_run(comp / "run")
    file = comp / "run" / "checkpoints" / "best.ckpt"
    content = torch.load(file, weights_only=True)
    content["ema_state_dict"] = {key: value * 0.5 for key, value in content["state_dict"].items()}
    torch.save(content, file)
    raw, averaged, left_out = (
        predicted("run", "--data_dir", "comp", *words) for words in (["--use_ema", "false"], ["--use_ema", "true"], [])
    )
    np.testing.assert_allclose(raw["004"], plain(network, spec, "comp/test/004.jpg"), atol=2e-6)
    assert np.array_equal(averaged["004"], left_out["004"]) and not np.allclose(averaged["004"], raw["004"], atol=1e-3)


# processes


def _rank(argv, folder, place, log):
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    os.chdir(folder)
    os.environ.update(place)
    multiprocessing.set_start_method("fork", force=True)
    sys.exit(predict.main(argv))


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_of_torchrun_predict_each_row_once(comp, ranks):
    write_run(comp / "run")
    alone = predicted("run", "--data_dir", "comp", "--tta", "hflip")
    whole, port = (comp / "out.csv").read_bytes(), free_port()
    children = []
    for rank in range(ranks):
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        words = [
            "run",
            "--data_dir",
            "comp",
            "--tta",
            "hflip",
            "--out",
            "by.csv",
            "--batch_size",
            "2",
            "--workers",
            str(ranks % 2),
        ]
        children.append(FORKS.Process(target=_rank, args=(words, str(comp), place, str(comp / f"{rank}.log"))))
        children[-1].start()
    for child in children:
        child.join(100)
    assert [child.exitcode for child in children] == [0] * ranks, (comp / "0.log").read_text()
    header, found = answers("by.csv")
    assert [*found] == [*alone] and header == answers()[0] and whole
    assert max(abs(found[key] - alone[key]).max() for key in alone) < 1e-6
    assert not [*comp.glob(".*")]


def test_it_starts_its_own_processes(comp, capfd, monkeypatch):
    monkeypatch.setattr(predict, "START", "fork")  # quicker; the slow test below starts them as a person does
    write_run(comp / "run")
    alone = predicted("run", "--data_dir", "comp")
    both = predicted("run", "--data_dir", "comp", "--devices", 2)
    assert [*both] == [*alone] and max(abs(both[key] - alone[key]).max() for key in alone) < 1e-6
    write_damaged(comp / "comp/test/003.jpg")
    capfd.readouterr()
    words = ["run", "--data_dir", "comp", "--devices", "2", "--workers", "0", "--out", "none.csv"]
    with pytest.raises(SystemExit) as stopped:
        predict.main(words)
    assert (
        stopped.value.code == 2
        and "cannot read picture comp/test/003.jpg" in capfd.readouterr().err
        and not (comp / "none.csv").exists()
    )
    monkeypatch.setattr(predict, "_work", lambda job, rank, *place: os.kill(os.getpid(), 9) if rank else time.sleep(60))
    assert predict.main(words) == 1 and "ended by signal 9" in capfd.readouterr().err


def _starter(folder):
    os.chdir(folder)
    predict.START = "fork"
    predict._work = lambda job, rank, *place: ((folder / f"{rank}.pid").write_text(str(os.getpid())), time.sleep(100))
    predict.main(["run", "--data_dir", "comp", "--devices", "2"])


def test_its_processes_end_with_it(comp):
    write_run(comp / "run")
    starter = FORKS.Process(target=_starter, args=(comp,))
    starter.start()
    deadline = time.monotonic() + 60
    while (
        not all((file := comp / f"{rank}.pid").exists() and file.read_text() for rank in (0, 1))
        and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    starter.kill()
    while (
        any(Path(f"/proc/{(comp / f'{rank}.pid').read_text()}").exists() for rank in (0, 1))
        and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    assert time.monotonic() < deadline


@pytest.mark.slow
def test_it_starts_its_own_processes_from_a_shell(comp):
    write_run(comp / "run")
    alone = predicted("run", "--data_dir", "comp")
    words = [
        sys.executable,
        ROOT / "experiments" / "predict.py",
        "run",
        "--data_dir",
        "comp",
        "--devices",
        "2",
        "--out",
        "by.csv",
    ]
    ended = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ended.returncode == 0, ended.stderr
    both = answers("by.csv")[1]
    assert [*both] == [*alone] and max(abs(both[key] - alone[key]).max() for key in alone) < 1e-6


@pytest.mark.parametrize("rows", [[[0, 2], [1]], [[0, 1], [1, 3]], [[0, 1, 2], [2, 3]], [[0, 1, 2, 4], [3]]])
def test_incomplete_shards_are_refused(tmp_path, rows):
    for number, index in enumerate(rows):
        np.savez(
            tmp_path / f"{number}.npz",
            index=np.array(index),
            values=np.ones((len(index), 2)),
            bad=np.zeros(0, int),
            words=np.zeros(0, "U1"),
            precision="cpu",
        )
    with pytest.raises(RuntimeError, match="of 4 rows"):
        predict.merge([tmp_path / "0.npz", tmp_path / "1.npz"], 4)


# devices


def _cuda(monkeypatch, capability, built, count=2, works=True):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place=None: "Tesla")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    real = torch.ones

    def ones(*size, device=None, **words):
        if device and "cuda" in str(device) and not works:
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")
        return real(*size)

    monkeypatch.setattr(torch, "ones", ones)


CU128 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.mark.parametrize(
    "capability, built, works, usable",
    [
        ((6, 0), CU128, False, False),
        ((7, 5), CU128, True, True),
        ((8, 9), CU128, True, True),
        ((9, 0), ["sm_90a"], True, True),
        ((12, 1), CU128, True, True),
        ((11, 0), CU128, True, False),
        ((11, 0), ["sm_90", "compute_90"], True, True),
        ((7, 0), ["sm_60"], True, False),
        ((7, 5), CU128, False, False),
        ((9, 0), ["gfx942"], True, True),
        ((6, 0), ["sm_70", "compute_90"], True, False),
    ],
)
def test_a_gpu_that_pytorch_is_not_built_for_gives_way_to_the_cpu(monkeypatch, capability, built, works, usable):
    _cuda(monkeypatch, capability, built, works=works)
    count, notes = inference.usable_gpus("auto")
    assert count == (2 if usable else 0) and (notes == []) == usable
    if not usable:
        assert "predicting on CPU: Tesla" in notes[0] and "T4 x2" in notes[0] and len(notes[0].splitlines()) == 1
        with pytest.raises(ValueError, match="--accelerator gpu"):
            inference.usable_gpus("gpu")
    assert inference.usable_gpus("cpu") == (0, [])


@pytest.mark.parametrize(
    "capability, asked, got",
    [
        ((7, 5), "auto", "fp16"),
        ((7, 5), "bf16", "fp16"),
        ((7, 5), "fp32", "fp32"),
        ((8, 0), "auto", "bf16"),
        ((9, 0), "fp16", "fp16"),
        ((6, 0), "auto", "fp32"),
        (None, "auto", "fp32"),
        (None, "bf16", "bf16"),
    ],
)
def test_precision_is_what_the_device_can_do(monkeypatch, capability, asked, got):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place=None: capability)
    kind, name = inference.autocast_type(asked, torch.device("cuda" if capability else "cpu"))
    assert name == got and kind == {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[got]


@pytest.mark.parametrize("precision, near", [("bf16", 0.1), ("fp16", 0.02)])
def test_sixteen_bits_are_near_and_say_so(comp, capsys, precision, near):
    write_run(comp / "run", scale=5)
    exact, rough = (
        predicted("run", "--data_dir", "comp"),
        predicted("run", "--data_dir", "comp", "--precision", precision),
    )
    assert f"cpu {precision}" in capsys.readouterr().out
    worst = max(abs(exact[key] - rough[key]).max() for key in exact)
    assert 0 < worst < near


def test_what_overflows_in_fp16_is_predicted_again_and_what_is_nan_fails(comp, capsys):
    write_run(comp / "large", scale=1e7)
    exact = predicted("large", "--data_dir", "comp")
    assert all(
        np.allclose(predicted("large", "--data_dir", "comp", "--precision", "fp16")[key], exact[key], atol=1e-6)
        for key in exact
    )
    assert "no finite answer in fp16" in capsys.readouterr().err
    write_run(comp / "huge", scale=3e39)
    predicted("huge", "--data_dir", "comp", "--batch_size", 4, code=1)
    said = capsys.readouterr().err
    assert " of 9 pictures (rows " in said and " get NaN or infinity from huge/checkpoints/best.ckpt" in said
    write_run(comp / "nan", scale=math.inf)
    predicted("nan", "--data_dir", "comp", code=2)
    assert "nan/checkpoints/best.ckpt: 1 of " in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, line",
    [
        (["nowhere"], "no weights at nowhere"),
        (["http://host/run"], "from files only"),
        (["bare.pth"], "is not a vitlab checkpoint"),
        (["run", "--devices", "2"], "torchrun has started 2 processes"),
        (["run", "--csv", "no.csv"], "no.csv: there is no such file"),
        (["run", "--data_dir", "no"], "--data_dir no: there is no such folder"),
        (["run", "--folder", "comp"], "leave --csv and --data_dir out"),
        (["run", "--out", "run"], "--out run: is a folder"),
        (["run", "--name", "../x"], "--name ../x: letters"),
        (["run", "--tta", "flip"], "predict.py: --tta: invalid choice flip: one of none, hflip, multicrop"),
        (["run", "--device", "2"], "unknown flag --device; did you mean --devices"),
        (["run", "--workers", "-1"], "--workers: -1 is not a number from 0 on"),
        ([], "missing: RUN"),
    ],
)
def test_mistakes_exit_2_in_a_line(comp, capsys, monkeypatch, words, line):
    write_run(comp / "run")
    torch.save({"weight": torch.zeros(1)}, "bare.pth")
    if "--devices" in words:
        monkeypatch.setenv("WORLD_SIZE", "2")
    try:
        code = predict.main([*(["--data_dir", "comp"] if "--data_dir" not in words else []), *words])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    said = capsys.readouterr().err
    assert line in said and len(said.splitlines()) == 1


# in a notebook without internet

GUARD = """
    import socket, sys
    REFUSED = {"lightning", "pytorch_lightning", "lightning_fabric", "wandb", "sklearn", "jsonargparse", "torchmetrics",
               "matplotlib", "scipy"}
    from importlib.machinery import PathFinder
    found = PathFinder.find_spec
    PathFinder.find_spec = lambda name, *words: None if name.split(".")[0] in REFUSED else found(name, *words)
    def refuse(*words, **more):
        raise AssertionError("the network was asked for")
    class Refused(socket.socket):
        def __init__(self, family=socket.AF_INET, *words, **more):
            refuse() if family != socket.AF_UNIX else super().__init__(family, *words, **more)  # which workers use
    socket.socket, socket.create_connection, socket.getaddrinfo = Refused, refuse, refuse
    import importlib.util
    assert importlib.util.find_spec("pandas") and not importlib.util.find_spec("lightning")
    from experiments import predict, submit
    assert predict.main("run --data_dir comp --tta multicrop --workers 1 --name p".split()) == 0
    assert submit.main("runs/p --sample sample.csv".split()) == 0
    rooms = ("models", "datamodules", "lightning_modules", "experiments")
    ours = {name: module.__file__ for name, module in sys.modules.items() if name.split(".")[0] in rooms}
    assert not [name for name, file in ours.items() if "import yaml" in open(file).read()]  # which timm brings
    print("LOADED", *sorted(ours))
"""


@pytest.mark.slow
def test_it_needs_no_training_package_and_no_network(comp):
    write_run(comp / "run", config={**TIMM, "model_args": {**TIMM["model_args"], "pretrained": True}})
    ids = pd.read_csv("comp/test.csv", dtype=str)["Id"]
    (comp / "sample.csv").write_text("Id,a,b,c\n" + "".join(f"{name},0,0,0\n" for name in ids))
    (comp / "guard.py").write_text(textwrap.dedent(GUARD))
    hidden = {"HF_HUB_OFFLINE": "0", "HOME": str(comp), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "guard.py"],
        cwd=comp,
        capture_output=True,
        text=True,
        env={**os.environ, **hidden},
        timeout=250,
    )
    assert ended.returncode == 0, ended.stderr
    loaded = ended.stdout.split("LOADED")[1].split()
    assert (
        "lightning_modules.objectives.targets" in loaded
        and "datamodules.base" not in loaded
        and "experiments.config" not in loaded
    )
    assert (comp / "submission.csv").read_text().startswith("Id,a,b,c\n")


def test_it_says_what_the_run_said(pics, launch, monkeypatch):
    """The evaluation inside training and predict.py give the same numbers, picture by picture."""
    line = (
        "--data_dir pics --image_size 16 --model vit_nano4 --model_args.embed_dim 32 --model_args.depth 2 --recipe "
        "none --global_batch_size 8 "
        "--workers 0 --logger csv --accelerator cpu --crop_pct 0.8"
    )
    assert launch(f"{line} --epochs 2 --name one --lr 5e-3").code == 0
    monkeypatch.chdir(pics)
    found = predicted("runs/one", "--folder", "pics/test")
    theirs = pd.read_csv("runs/one/predictions.csv")
    assert len(theirs) == 13 and {f"test/{name}" for name in found} == set(theirs["id"])
    for row in theirs.itertuples(index=False):
        np.testing.assert_allclose(found[row.id.removeprefix("test/")], row[2:], atol=1e-6)


def test_it_says_what_a_table_run_said(tmp_path, launch, monkeypatch, capsys):
    """A regression trained on a table, and its own predictions of test.csv; submit.py takes both directories."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 11)):
        write_pictures(tmp_path / "comp" / split, {"": count})
        rows = rng.permutation(count)
        text = "".join(f"{row},{rng.uniform(1, 100):.2f}\n" if split == "train" else f"{row}\n" for row in rows)
        (tmp_path / "comp" / f"{split}.csv").write_text(("Id,Score\n" if split == "train" else "Id\n") + text)
    (tmp_path / "comp" / "sample_submission.csv").write_text(
        "Id,Score\n" + "".join(f"{row},50.5\n" for row in range(11))
    )
    ended = launch(
        "--data_dir comp --image_size 16 --model vit_nano4 --model_args.embed_dim 32 --model_args.depth 2 --recipe "
        "none --lr 5e-3 "
        "--global_batch_size 8 --workers 0 --logger csv --accelerator cpu --epochs 2 --name one"
    )
    assert ended.code == 0, ended.out
    monkeypatch.chdir(tmp_path)
    assert predict.main(["runs/one", "--workers", "0"]) == 0
    header, ours = answers("runs/one-predict/predictions.csv")
    theirs = answers("runs/one/predictions.csv")
    assert header == theirs[0] == ["Id", "prediction"] and [*ours] == [*theirs[1]] and len(ours) == 11
    assert max(abs(ours[key] - theirs[1][key]).max() for key in ours) < 1e-4
    assert submit.main(["runs/one-predict"]) == submit.main(["runs/one", "--out", "other.csv"]) == 0
    assert (answers("submission.csv")[0], [*answers("other.csv")[1]]) == (
        ["Id", "Score"],
        [str(row) for row in range(11)],
    )


def test_the_source_of_a_mean_is_plain_data():
    """It is sent to other processes."""
    assert Source("f", {}, 1.0, [0]).weight == 1 and How().tta == "none" and pretrained.BEST == "best.ckpt"
