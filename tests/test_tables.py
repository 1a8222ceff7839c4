"""Tables of competitions: what they mean, how they are divided, and what a run makes of them."""
import numpy as np
import pytest
from table_files import ids, table, write_comp


@pytest.fixture
def comp(tmp_path):
    """comp(train, test, sample, pictures) writes a competition's folder and returns it (`write_comp`)."""
    return lambda *tables, **words: write_comp(tmp_path, *tables, **words)


def test_regression(comp):
    score = np.arange(40) + 0.5
    root = comp({"Id": ids(40), "Blur": [0, 1] * 20, "Score": score}, {"Id": ids(5, "t"), "Blur": 1}, {"Id": ids(5, "t"), "Score": 3.5})
    data = table(root)
    assert data.task == "regression" and data.spec["target_names"] == ["Score"] and data.spec["num_outputs"] == 1
    assert data.sizes == {"train": 36, "val": 4, "test": 0} and data.metric_name == "rmse"
    train = data.splits["train"]
    assert train.targets.dtype == np.float32 and train.targets.shape == (36, 1)
    assert data.target_range == [[train.targets.min(), train.targets.max()]]
    assert dict(zip(train.ids, train.targets[:, 0])).items() <= dict(zip(ids(40), score)).items()
    assert train.names.tolist() == [f"train/{name}.jpg".encode() for name in train.ids]
    assert data.splits["predict"].ids.tolist() == ids(5, "t") and data.splits["predict"].targets.shape == (5, 1)
    assert data.resolved() == {"target": "Score", "task": "regression", "image": "{split}/{Id}.jpg", "group": None, "metric": "rmse"}
    assert data.spec["table"]["id_column"] == "Id" and any("fractions" in line for line in data.notes())
    again = table(root, **data.resolved() | {"target_range": [0, 100]})
    assert again.target_range == [[0.0, 100.0]] and again.splits["val"].ids.tolist() == data.splits["val"].ids.tolist()


def test_classification_of_texts(comp):
    train = {"image_id": [f"{name}.jpg" for name in ids(20)], "label": ["rust", "scab"] * 10}
    data = table(comp(train, sample={"image_id": ["t0.jpg", "t1.jpg"], "label": ["rust", "rust"]}, pictures="{split}_images/{image_id}"))
    assert data.task == "classification" and data.spec["class_names"] == ["rust", "scab"]
    assert data.spec["table"]["image"] == "{split}_images/{image_id}"
    assert data.splits["train"].targets.dtype == np.int64 and np.bincount(data.splits["val"].targets).tolist() == [1, 1]
    labels = dict(zip(train["image_id"], train["label"]))
    for split in ("train", "val"):
        assert [labels[name] for name in data.splits[split].ids] == [data.class_names[index] for index in data.splits[split].targets]
    assert data.splits["predict"].ids.tolist() == ["t0.jpg", "t1.jpg"]
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 16, 16) and batch["target"].dtype.is_floating_point is False


def test_multilabel_of_joined_texts_and_of_columns(comp):
    joined = ["scab", "rust", "scab rust", "healthy", "scab complex", "complex", "rust complex"] * 6
    data = table(comp({"image": ids(42), "labels": joined}, pictures="train_images/{image}.jpg"))
    assert data.task == "multilabel" and data.spec["class_names"] == ["complex", "healthy", "rust", "scab"] and data.spec["table"]["separator"] == " "
    row = data.splits["train"].ids.tolist().index("a002")
    assert data.splits["train"].targets[row].tolist() == [0, 0, 1, 1] and data.splits["train"].targets.dtype == np.float32
    assert np.allclose(data.splits["val"].targets.sum(0), 42 * 0.1 * np.array([3, 1, 3, 3]) / 7, atol=2)


def test_multilabel_of_columns(comp):
    rng = np.random.RandomState(0)
    train = {"uid": ids(40), "cat": rng.randint(0, 2, 40), "dog": rng.randint(0, 2, 40), "bird": rng.randint(0, 2, 40)}
    data = table(comp(train, sample={"uid": ids(3, "t"), "cat": 0.5, "dog": 0.5, "bird": 0.5}, pictures="{split}/{uid}.png"))
    assert data.task == "multilabel" and data.spec["class_names"] == ["cat", "dog", "bird"]
    assert data.splits["train"].targets[0].tolist() == [train[name][data.rows["train"][0]] for name in ("cat", "dog", "bird")]
