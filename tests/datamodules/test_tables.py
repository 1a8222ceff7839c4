"""Tables of competitions: what they mean, how they are divided, and what a run makes of them."""

import os
import shutil
import time

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import result_of
from table_files import PAWPULARITY, ids, table, write_comp, write_picture


@pytest.fixture
def comp(tmp_path):
    """comp(train, test, sample, pictures) writes a competition's folder and returns it (`write_comp`)."""
    return lambda *tables, **words: write_comp(tmp_path, *tables, **words)


def test_regression(comp):
    score = np.arange(40) + 0.5
    root = comp(
        {"Id": ids(40), "Blur": [0, 1] * 20, "Score": score},
        {"Id": ids(5, "t"), "Blur": 1},
        {"Id": ids(5, "t"), "Score": 3.5},
    )
    data = table(root)
    assert data.task == "regression" and data.spec["target_names"] == ["Score"] and data.spec["num_outputs"] == 1
    assert data.sizes == {"train": 36, "val": 4, "test": 0} and data.metric_name == "rmse"
    train = data.splits["train"]
    assert train.targets.dtype == np.float64 and train.targets.shape == (36, 1)
    assert data.target_range == [[train.targets.min(), train.targets.max()]]
    assert dict(zip(train.ids, train.targets[:, 0])).items() <= dict(zip(ids(40), score)).items()
    assert train.names.tolist() == [f"train/{name}.jpg".encode() for name in train.ids]
    assert data.splits["predict"].ids.tolist() == ids(5, "t") and data.splits["predict"].targets.shape == (5, 1)
    assert data.resolved() == {
        "target": "Score",
        "task": "regression",
        "image": "{split}/{Id}.jpg",
        "group": None,
        "metric": "rmse",
    }
    assert data.spec["table"]["id_column"] == "Id" and any("fractions" in line for line in data.notes())
    again = table(root, **data.resolved() | {"target_range": [0, 100]})
    assert again.target_range == [[0.0, 100.0]] and again.splits["val"].ids.tolist() == data.splits["val"].ids.tolist()


def test_classification_of_texts(comp):
    train = {"image_id": [f"{name}.jpg" for name in ids(20)], "label": ["rust", "scab"] * 10}
    data = table(
        comp(
            train,
            sample={"image_id": ["t0.jpg", "t1.jpg"], "label": ["rust", "rust"]},
            pictures="{split}_images/{image_id}",
        )
    )
    assert data.task == "classification" and data.spec["class_names"] == ["rust", "scab"]
    assert data.spec["table"]["image"] == "{split}_images/{image_id}"
    assert data.splits["train"].targets.dtype == np.int64 and np.bincount(data.splits["val"].targets).tolist() == [1, 1]
    labels = dict(zip(train["image_id"], train["label"]))
    for split in ("train", "val"):
        assert [labels[name] for name in data.splits[split].ids] == [
            data.class_names[index] for index in data.splits[split].targets
        ]
    assert data.splits["predict"].ids.tolist() == ["t0.jpg", "t1.jpg"]
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 16, 16) and batch["target"].dtype.is_floating_point is False


def test_multilabel_of_joined_texts_and_of_columns(comp):
    joined = ["scab", "rust", "scab rust", "healthy", "scab complex", "complex", "rust complex"] * 6
    data = table(comp({"image": ids(42), "labels": joined}, pictures="train_images/{image}.jpg"))
    assert (
        data.task == "multilabel"
        and data.spec["class_names"] == ["complex", "healthy", "rust", "scab"]
        and data.spec["table"]["separator"] == " "
    )
    row = data.splits["train"].ids.tolist().index("a002")
    assert (
        data.splits["train"].targets[row].tolist() == [0, 0, 1, 1] and data.splits["train"].targets.dtype == np.float32
    )
    assert np.allclose(data.splits["val"].targets.sum(0), 42 * 0.1 * np.array([3, 1, 3, 3]) / 7, atol=2)


def test_multilabel_of_columns(comp):
    rng = np.random.RandomState(0)
    train = {"uid": ids(40), "cat": rng.randint(0, 2, 40), "dog": rng.randint(0, 2, 40), "bird": rng.randint(0, 2, 40)}
    data = table(
        comp(train, sample={"uid": ids(3, "t"), "cat": 0.5, "dog": 0.5, "bird": 0.5}, pictures="{split}/{uid}.png")
    )
    assert data.task == "multilabel" and data.spec["class_names"] == ["cat", "dog", "bird"]
    assert data.splits["train"].targets[0].tolist() == [
        train[name][data.rows["train"][0]] for name in ("cat", "dog", "bird")
    ]


def test_folds_are_of_all_rows_and_groups_stay_together(comp):
    train = {"Id": ids(60), "patient_id": [f"p{row // 3}" for row in range(60)], "label": ["a", "b", "c"] * 20}
    root = comp(train)
    seen, folds = [], None
    for fold in range(5):
        data = table(root, folds=5, fold=fold)
        assert data.table_scheme["group"] == "patient_id" and (
            folds is None or np.array_equal(folds, data.fold_numbers)
        )
        folds = data.fold_numbers
        assert np.array_equal(data.rows["val"], np.flatnonzero(folds == fold))
        assert data.splits["val"].ids.tolist() == [ids(60)[row] for row in data.rows["val"]]
        patients = [{train["patient_id"][row] for row in data.rows[split]} for split in ("train", "val")]
        assert not patients[0] & patients[1]
        seen += data.rows["val"].tolist()
    assert sorted(seen) == list(range(60))
    (root / "train" / "a007.jpg").unlink()
    data = table(root, folds=5, fold=0, bad_images="skip")
    assert np.array_equal(data.fold_numbers, folds) and sorted([*data.rows["train"], *data.rows["val"]]) == [
        *range(7),
        *range(8, 60),
    ]


def test_val_fraction_keeps_groups_together_and_shares(comp):
    root = comp({"Id": ids(60), "patient_id": [f"p{row // 3}" for row in range(60)], "score": np.arange(60) / 7})
    data = table(root, val_fraction=0.25)
    patients = [set(data.rows[split] // 3) for split in ("train", "val")]
    assert not patients[0] & patients[1] and 12 <= data.sizes["val"] <= 18
    assert table(root, val_fraction=0).sizes == {"train": 60, "val": 0, "test": 0}
    assert table(root, val_fraction=0.25, split_seed=1).rows["val"].tolist() != data.rows["val"].tolist()
    alone = table(root, val_fraction=0.25, group="none")
    assert (
        alone.sizes["val"] == 15
        and 0.8 < alone.splits["val"].targets.mean() / alone.splits["train"].targets.mean() < 1.25
    )


def test_rows_of_one_picture_stay_together(comp):
    root = comp(
        {"row_id": range(40), "file": [f"{row // 2}.jpg" for row in range(40)], "label": ["a", "a", "b", "b"] * 10},
        pictures="train/{file}",
    )
    data = table(root, image="train/{file}", val_fraction=0.2)
    assert not {*data.splits["train"].names} & {*data.splits["val"].names} and data.sizes["val"] == 8


def test_a_group_file_and_a_fold_column(comp):
    root = comp({"Id": ids(20), "label": ["a", "b"] * 10, "kfold": [1, 2] * 10})
    (root / "twins.csv").write_text(
        "Id,group\n" + "".join(f"{name},{place // 4}\n" for place, name in enumerate(ids(20)))
    )
    data = table(root, group="twins.csv", folds=5, fold=1)
    assert len({row // 4 for row in data.rows["val"]}) == 1 and data.sizes["val"] == 4
    data = table(root, fold_column="kfold", folds=2, fold=1)
    assert data.rows["val"].tolist() == list(range(1, 20, 2))


def test_the_range_is_of_the_rows_trained_on(comp):
    root = comp({"Id": ids(20), "score": [*np.arange(19) / 2, 1000.0]})
    ranges = [table(root, folds=4, fold=fold).target_range for fold in range(4)]
    assert sum(high < 1000 for [[_, high]] in ranges) == 1
    assert table(root, target_range=[0, 1000], folds=4, fold=1).target_range == [[0.0, 1000.0]]


def test_skipped_pictures_are_listed_and_the_rest_is_used(comp):
    root = comp({"Id": ids(20), "label": ["a", "b"] * 10}, {"Id": ids(4, "t")})
    (root / "train" / "a003.jpg").write_bytes(b"")
    (root / "train" / "a004.jpg").unlink()
    (root / "test" / "t001.jpg").write_text("<html>")
    data = table(root, image="{split}/{Id}.jpg", bad_images="skip")
    assert data.skipped[["split", "id", "file"]].to_numpy().tolist() == [
        ["train", "a003", "train/a003.jpg"],
        ["train", "a004", "train/a004.jpg"],
        ["test", "t001", "test/t001.jpg"],
    ]
    assert data.skipped["reason"].tolist() == [
        "is broken: the file is empty",
        "is missing",
        "is broken: it is not a picture Pillow knows",
    ]
    assert data.sizes["train"] + data.sizes["val"] == 18 and data.splits["predict"].ids.tolist() == [
        "t000",
        "t002",
        "t003",
    ]
    assert any(
        "skipped 2 pictures of train and 1 picture of test" in line and "predict.py RUN --bad_images fill" in line
        for line in data.notes()
    )


def test_a_labelled_test_table_is_scored(comp):
    root = comp({"Id": ids(20), "label": ["a", "b"] * 10}, {"Id": ids(4, "t"), "label": ["b", "b", "a", "b"]})
    data = table(root)
    assert data.splits["test"].targets.tolist() == [1, 1, 0, 1] and "predict" not in data.splits
    (root / "train.csv").unlink()
    alone = table(root, eval_only=True, class_names=["b", "a"])
    assert alone.sizes == {"train": 0, "val": 0, "test": 4} and alone.splits["test"].targets.tolist() == [0, 0, 1, 0]
    with pytest.raises(ValueError, match="labels that the checkpoint does not have in row 4: 'a'"):
        table(root, eval_only=True, class_names=["b", "c"])


@pytest.mark.parametrize(
    "labels, names",
    [([10, 9, 2, 1] * 5, ["1", "2", "9", "10"]), (["b10", "b9", "a", "B"] * 5, ["B", "a", "b10", "b9"])],
)
def test_classes_are_in_a_stable_order(comp, labels, names):
    train = {"Id": ids(20), "label": labels}
    assert table(comp(train), val_fraction=0.2).spec["class_names"] == names
    other = comp({name: values[::-1] for name, values in train.items()})
    assert table(other, val_fraction=0.2, class_names=names[::-1]).spec["class_names"] == names[::-1]


def test_the_spec_lives_in_a_checkpoint(comp, tmp_path):
    data = table(comp({"Id": ids(20), "label": ["a b", "b", "a", "c", "c b"] * 4}))
    torch.save({"spec": data.spec}, tmp_path / "spec.ckpt")
    assert torch.load(tmp_path / "spec.ckpt", weights_only=True)["spec"] == data.spec
    assert data.spec["table"]["class_names"] == ["a", "b", "c"] and data.spec["table"]["separator"] == " "


def test_pawpularity(comp):
    train = {"Id": ids(40), "Subject Focus": 0, "Group": 1, "Pawpularity": np.arange(40) + 3}
    data = table(comp(train, {"Id": ids(3, "t"), "Group": 0}, {"Id": ids(3, "t"), "Pawpularity": 50.5}), "pawpularity")
    assert (
        data.task == "regression"
        and data.target_range == [[0.0, 100.0]]
        and data.metric_name == "rmse"
        and data.table_scheme["group"] is None
    )
    assert table(data.data_dir, "pawpularity", target_range=[1, 100]).target_range == [[1.0, 100.0]]


def test_classify_leaves(comp):
    train = {"image": [f"images/{n}.jpg" for n in range(20)], "label": ["maclura_pomifera", "ulmus_rubra"] * 10}
    data = table(comp(train, {"image": ["images/20.jpg"]}, pictures="{image}"), "classify_leaves")
    assert data.spec["class_names"] == ["maclura_pomifera", "ulmus_rubra"] and data.splits[
        "predict"
    ].names.tolist() == [b"images/20.jpg"]


@pytest.mark.skipif(not PAWPULARITY.is_dir(), reason=f"the competition's tables are not here ({PAWPULARITY})")
def test_the_real_tables_of_pawpularity(tmp_path):
    for name in ("train", "test", "sample_submission"):
        shutil.copy(PAWPULARITY / f"{name}.csv", tmp_path)
    write_picture(tmp_path / "one.jpg")
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for row in pd.read_csv(tmp_path / f"{split}.csv")["Id"]:
            os.link(tmp_path / "one.jpg", tmp_path / split / f"{row}.jpg")
    data = table(tmp_path, folds=5, fold=0)
    assert data.resolved() == {
        "target": "Pawpularity",
        "task": "regression",
        "image": "{split}/{Id}.jpg",
        "group": None,
        "metric": "rmse",
    }
    assert data.sizes["train"] + data.sizes["val"] == 9912 and len(data.splits["predict"]) == 8
    score = data.all_targets[:, 0].astype(np.float64)
    assert np.sqrt(np.mean((score - score.mean()) ** 2)) == pytest.approx(20.591, abs=5e-4)
    means = [score[data.fold_numbers == fold].mean() for fold in range(5)]
    assert np.ptp(means) < 0.2  # 0.2 is a fifth of what chance would do
    start = time.process_time()
    assert table(tmp_path, "pawpularity", folds=5).fold_numbers.tolist() == data.fold_numbers.tolist()
    assert time.process_time() - start < 10


TINY = (
    "--model vit_nano4 --model_args.embed_dim 32 --model_args.depth 1 --image_size 16 --epochs 1 --global_batch_size "
    "4 --workers 0 --logger csv "
    "--micro_batch_size 4"
)


def test_a_run_says_what_it_was_told_and_keeps_it(comp, launch, tmp_path):
    root = write_comp(
        tmp_path / "comp",
        {"Id": ids(20), "breed": ["pug", "boxer"] * 10, "owner": ["x", "y", "z", "w"] * 5},
        {"Id": ids(4, "t"), "owner": "x"},
    )
    (root / "train" / "a003.jpg").write_bytes(b"")
    told = launch(f"--data_dir comp {TINY} --name one")
    assert (
        told.code == 2
        and "run.py: --data_dir comp: a problem" in told.out
        and "row 5: train/a003.jpg is broken: the file is empty" in told.out
    )
    assert "Traceback" not in told.out and not (tmp_path / "runs").exists()
    ended = launch(f"--data_dir comp {TINY} --name one --bad_images skip")
    assert ended.code == 0, ended.out
    assert "table targets breed (the only one that is left in train.csv and not in test.csv)" in ended.out
    assert "skipped 1 picture of train" in ended.out
    config = yaml.safe_load((tmp_path / "runs/one/config.yaml").read_text())
    assert {key: config[key] for key in ("data", "target", "task", "image", "group", "metric", "loss")} == {
        "data": "csv",
        "target": "breed",
        "task": "classification",
        "image": "{split}/{Id}.jpg",
        "group": None,
        "metric": "acc1",
        "loss": "cross_entropy",
    }
    assert result_of(tmp_path / "runs/one")["skipped_images"] == 1
    assert (
        tmp_path / "runs/one/skipped.csv"
    ).read_text() == "split,id,file,reason\ntrain,a003,train/a003.jpg,is broken: the file is empty\n"
    spec = torch.load(tmp_path / "runs/one/checkpoints/last.ckpt", weights_only=True)["spec"]
    assert spec["class_names"] == ["boxer", "pug"] and spec["table"]["image"] == "{split}/{Id}.jpg"
    again = launch("--config runs/one/config.yaml --name one")
    assert again.code == 0 and "already finished" in again.out
    owners = launch(
        f"--data_dir comp {TINY} --target owner --task classification --bad_images skip --dry_run --val_fraction 0.3"
    )
    assert (
        owners.code == 0
        and "table targets owner (given; --target changes it)" in owners.out
        and "4 classes" in owners.out
    ), owners.out


def test_a_recipe_of_a_competition_finds_its_columns(comp, launch, tmp_path):
    write_comp(tmp_path / "comp", {"Id": ids(40), "Blur": 0, "Pawpularity": np.arange(40) + 1})
    ended = launch(f"--recipe pawpularity_swin_base --init null {TINY} --data_dir comp --dry_run")
    assert (
        ended.code == 0 and "recipe pawpularity_swin_base" in ended.out and "pawpularity, train 36, val 4" in ended.out
    ), ended.out
