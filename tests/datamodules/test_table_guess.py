"""What the tables of real competitions say of themselves (their columns and folders, made-up rows), and what has to be
asked."""

import numpy as np
import pandas as pd
import pytest
from table_files import ids, write_comp

from datamodules.tables.images import Folder, paths
from datamodules.tables.scheme import decide, read_tables
from datamodules.tables.table import read_table

RNG = np.random.RandomState(0)
NOTHING = dict.fromkeys(("target", "task", "image", "group", "metric", "id_column", "fold_column", "label_separator"))
N = 24
T = ids(4, "t")


def cycle(*values, count=N):
    return [values[place % len(values)] for place in range(count)]


def jpg(names):
    return [f"{name}.jpg" for name in names]


def bits(count=N):
    return RNG.randint(0, 2, count)


SIIM = {"sex": "male", "age_approx": "45.0", "anatom_site_general_challenge": "torso"}
PATIENTS = cycle(*ids(8, "IP_"))
# name: (train.csv, test.csv, sample_submission.csv, where pictures are, id, targets, task, template, group, metric)
REAL = {
    "petfinder-pawpularity-score": (
        {"Id": ids(120), "Subject Focus": bits(120), "Group": bits(120), "Pawpularity": np.arange(120) % 100 + 1},
        {"Id": T, "Group": 1},
        {"Id": T, "Pawpularity": 67.75},
        "{split}/{Id}.jpg",
        "Id",
        ["Pawpularity"],
        "regression",
        "{split}/{Id}.jpg",
        None,
        "rmse",
    ),
    "cassava-leaf-disease-classification": (
        {"image_id": jpg(ids(N)), "label": cycle(0, 1, 2, 3, 4)},
        None,
        {"image_id": jpg(T), "label": 4},
        "{split}_images/{image_id}",
        "image_id",
        ["label"],
        "classification",
        "{split}_images/{image_id}",
        None,
        "acc1",
    ),
    "plant-pathology-2020-fgvc7": (
        {
            "image_id": ids(N, "Train_"),
            **{
                name: [int(row % 4 == place) for row in range(N)]
                for place, name in enumerate(("healthy", "multiple_diseases", "rust", "scab"))
            },
        },
        {"image_id": ids(4, "Test_")},
        {"image_id": ids(4, "Test_"), "healthy": 0.25, "multiple_diseases": 0.25, "rust": 0.25, "scab": 0.25},
        "images/{image_id}.jpg",
        "image_id",
        ["healthy", "multiple_diseases", "rust", "scab"],
        "classification",
        "images/{image_id}.jpg",
        None,
        "log_loss",
    ),
    "plant-pathology-2021-fgvc8": (
        {
            "image": jpg(ids(N)),
            "labels": cycle(
                "scab", "healthy", "rust", "scab frog_eye_leaf_spot", "frog_eye_leaf_spot", "rust complex", "complex"
            ),
        },
        None,
        {"image": jpg(T), "labels": "healthy"},
        "{split}_images/{image}",
        "image",
        ["labels"],
        "multilabel",
        "{split}_images/{image}",
        None,
        "f1",
    ),
    "dog-breed-identification": (
        {"id": ids(N), "breed": cycle("pug", "golden_retriever", "boxer")},
        None,
        {"id": T, "boxer": 0.3, "golden_retriever": 0.3, "pug": 0.4},
        "{split}/{id}.jpg",
        "id",
        ["breed"],
        "classification",
        "{split}/{id}.jpg",
        None,
        "log_loss",
    ),
    "siim-isic-melanoma-classification": (
        {
            "image_name": ids(N, "ISIC_"),
            "patient_id": PATIENTS,
            **SIIM,
            "diagnosis": "unknown",
            "benign_malignant": "benign",
            "target": cycle(0, 0, 1),
        },
        {"image_name": T, "patient_id": "IP_9", **SIIM},
        {"image_name": T, "target": 0},
        "jpeg/{split}/{image_name}.jpg",
        "image_name",
        ["target"],
        "classification",
        "jpeg/{split}/{image_name}.jpg",
        "patient_id",
        "acc1",
    ),
    "aptos2019-blindness-detection": (
        {"id_code": ids(N), "diagnosis": cycle(0, 1, 2, 3, 4)},
        {"id_code": T},
        {"id_code": T, "diagnosis": 0},
        "{split}_images/{id_code}.png",
        "id_code",
        ["diagnosis"],
        "classification",
        "{split}_images/{id_code}.png",
        None,
        "acc1",
    ),
    "ranzcr-clip-catheter-line-classification": (
        {
            "StudyInstanceUID": ids(N, "1.2.826."),
            "ETT - Abnormal": bits(),
            "CVC - Normal": bits(),
            "Swan Ganz": bits(),
            "PatientID": PATIENTS,
        },
        None,
        {"StudyInstanceUID": ids(4, "1.3.1."), "ETT - Abnormal": 0, "CVC - Normal": 0, "Swan Ganz": 0},
        "{split}/{StudyInstanceUID}.jpg",
        "StudyInstanceUID",
        ["ETT - Abnormal", "CVC - Normal", "Swan Ganz"],
        "multilabel",
        "{split}/{StudyInstanceUID}.jpg",
        "PatientID",
        "auroc",
    ),
    "humpback-whale-identification": (
        {"Image": jpg(ids(N)), "Id": cycle("w_1", "w_2", "new_whale")},
        None,
        {"Image": jpg(T), "Id": "new_whale w_1 w_2"},
        "{split}/{Image}",
        "Image",
        ["Id"],
        "classification",
        "{split}/{Image}",
        None,
        "acc1",
    ),
    "planet-understanding-the-amazon-from-space": (
        {
            "image_name": ids(N, "train_"),
            "tags": cycle(
                "clear primary",
                "cloudy",
                "haze primary",
                "clear primary water",
                "water",
                "haze primary water",
                "clear",
                "haze water",
            ),
        },
        None,
        {"image_name": ids(4, "test_"), "tags": "primary clear"},
        "{split}-jpg/{image_name}.jpg",
        "image_name",
        ["tags"],
        "multilabel",
        "{split}-jpg/{image_name}.jpg",
        None,
        "f1",
    ),
    "histopathologic-cancer-detection": (
        {"id": ids(N), "label": cycle(0, 1)},
        None,
        {"id": T, "label": 0.5},
        "{split}/{id}.tif",
        "id",
        ["label"],
        "classification",
        "{split}/{id}.tif",
        None,
        "auroc",
    ),
    "classify-leaves": (
        {
            "image": [f"images/{n}.jpg" for n in range(N)],
            "label": cycle("maclura_pomifera", "abies_concolor", "ulmus rubra"),
        },
        {"image": [f"images/{n}.jpg" for n in range(N, N + 4)]},
        {"image": [f"images/{n}.jpg" for n in range(N, N + 4)], "label": "abies_concolor"},
        "{image}",
        "image",
        ["label"],
        "classification",
        "{image}",
        None,
        "acc1",
    ),
    "an age in months from an x-ray, boneage": (
        {"id": range(1000, 1120), "boneage": np.arange(120) * 1.5, "male": bits(120)},
        {"id": range(3), "male": 0},
        None,
        "boneage-{split}/{id}.png",
        "id",
        ["boneage"],
        "regression",
        "boneage-{split}/{id}.png",
        None,
        "rmse",
    ),
    "two quantities": (
        {"file_name": jpg(ids(N)), "x": RNG.rand(N), "y": RNG.rand(N) - 5},
        {"file_name": jpg(T)},
        {"file_name": jpg(T), "x": 0.5, "y": 0.5},
        "{split}/{file_name}",
        "file_name",
        ["x", "y"],
        "regression",
        "{split}/{file_name}",
        None,
        "rmse",
    ),
    "ids that are numbers with zeros in front": (
        {"id": [f"{n:03}" for n in range(N)], "kind": cycle("a", "b")},
        {"id": ["901", "902"]},
        None,
        "pics/{split}/{id}.jpg",
        "id",
        ["kind"],
        "classification",
        "pics/{split}/{id}.jpg",
        None,
        "acc1",
    ),
    "several columns in the path": (
        {"study": cycle(*range(6)), "slice": np.arange(N) // 6, "row_id": range(N), "label": cycle("low", "high")},
        {"study": 7, "slice": range(4), "row_id": range(90, 94)},
        {"row_id": range(90, 94), "label": "low"},
        "{split}_images/{study}/{slice}.png",
        "row_id",
        ["label"],
        "classification",
        "{split}_images/{study}/{slice}.png",
        "study",
        "acc1",
    ),
}


def guess(root, **given):
    return decide(read_tables(str(root), {}), Folder(str(root)), {**NOTHING, **given})


@pytest.mark.parametrize("name", REAL)
def test_the_folder_says_it(tmp_path, name):
    train, test, sample, pictures, *wanted = REAL[name]
    scheme, lines = guess(write_comp(tmp_path, train, test, sample, pictures))
    assert [scheme[part] for part in ("id_column", "targets", "task", "image", "group", "metric")] == wanted
    assert len(lines) == 6 and all(line.startswith("table ") and line.endswith(")") for line in lines)


def test_pictures_of_classes_in_folders_and_a_flat_test_folder(tmp_path):
    """paddy-disease-classification: train_images/<label>/<image_id>, test_images/<image_id>."""
    train = {"image_id": jpg(ids(N)), "label": cycle("blast", "normal"), "variety": "ADT45", "age": cycle(45, 50, 60)}
    write_comp(tmp_path, train, pictures="train_images/{label}/{image_id}")
    write_comp(tmp_path, {"image_id": jpg(T)}, pictures="test_images/{image_id}")
    pd.DataFrame(train).to_csv(tmp_path / "train.csv", index=False)
    pd.DataFrame({"image_id": jpg(T), "label": ""}).to_csv(tmp_path / "sample_submission.csv", index=False)
    scheme, _ = guess(tmp_path)
    assert scheme["image"] == "train_images/{label}/{image_id},test_images/{image_id}" and scheme["targets"] == [
        "label"
    ]


def test_names_of_two_words_are_no_joined_labels(tmp_path):
    kinds = [f"{size} {colour}" for size in ("big", "small", "tiny") for colour in ("red", "blue", "green")]
    scheme, _ = guess(write_comp(tmp_path, {"Id": ids(27), "kind": kinds * 3}))
    assert scheme["task"] == "classification" and scheme["separator"] is None


def test_one_folder_for_train_and_test(tmp_path):
    write_comp(tmp_path, {"Id": ids(N), "label": cycle("a", "b")}, {"Id": T}, pictures="train/{Id}.jpg")
    assert guess(tmp_path)[0]["image"] == "train/{Id}.jpg"


def test_what_is_given_wins(tmp_path):
    train, test, sample, pictures, *_ = REAL["siim-isic-melanoma-classification"]
    write_comp(tmp_path, train, test, sample, pictures)
    scheme, lines = guess(
        tmp_path,
        target="sex,target",
        task="multilabel",
        group="none",
        image="jpeg/{split}/{image_name}",
        id_column="patient_id",
    )
    assert scheme["targets"] == ["sex", "target"] and scheme["group"] is None and scheme["id_column"] == "patient_id"
    assert scheme["metric"] == "auroc" and sum("(given; --" in line for line in lines) == 5


def test_a_fold_column_is_told_and_not_taken(tmp_path):
    write_comp(tmp_path, {"Id": ids(N), "label": cycle("a", "b"), "kfold": cycle(0, 1, 2)})
    scheme, lines = guess(tmp_path)
    assert (
        scheme["targets"] == ["label"]
        and scheme["fold_column"] is None
        and "--data_args.fold_column kfold" in lines[-1]
    )


@pytest.mark.parametrize(
    "train, test, sample, said",
    [
        (
            {"Id": ids(60), "years": np.arange(60) + 18},
            None,
            None,
            r"years \(60 different whole numbers, 18 to 77\) .*--task classification or --task",
        ),
        (
            {"Id": ids(N), "size": 1.5, "colour": cycle("red", "blue")},
            None,
            None,
            r"target cannot be told: --target names it.*size or colour",
        ),
        (
            {"image": jpg(ids(N)), "species": cycle("a", "b"), "individual_id": cycle(*ids(8))},
            None,
            {"image": jpg(T), "predictions": "x"},
            r"target cannot be told: .*it may be species",
        ),
        (
            {"a": cycle(1, 2), "b": cycle(3, 4, 5)},
            None,
            None,
            r"ids cannot be told: --data_args.id_column names it; it may be a or b",
        ),
        (
            {"Id": ids(N), "label": cycle("a", "b")},
            {"name": T},
            None,
            r"ids cannot be told: .*train.csv and test.csv have no column in common",
        ),
        (
            {"Id": ids(N), "a": cycle("x", "y"), "b": cycle(1, 2)},
            {"Id": T},
            {"Id": T, "a": "x", "b": 1},
            r"neither all numbers nor all 0 and 1: --task",
        ),
    ],
)
def test_what_cannot_be_told_is_asked_for(tmp_path, train, test, sample, said):
    column = next(iter(train))
    write_comp(tmp_path, train, pictures=f"train/{{{column}}}" + ".png" * (not str(train[column][0]).endswith("jpg")))
    with pytest.raises(ValueError, match=said):
        guess(write_comp(tmp_path, train, test, sample, pictures=None))


def test_pictures_that_are_not_there_are_asked_for(tmp_path):
    write_comp(tmp_path, {"Id": ids(N), "label": cycle("a", "b")}, pictures=None)
    with pytest.raises(
        ValueError,
        match=r"--image says it, as \{split\}/\{Id\}.jpg. Looked for the values of Id, as 'a000'.*no folder with pic",
    ):
        guess(tmp_path)


def test_tables_are_read_as_text(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        "\ufeffid ; label;Score\r\n001;NA;1e5\r\n\r\n9223372036854775808; x, y ;\r\n".encode()
    )
    frame = read_table(tmp_path / "a.csv")
    assert frame.to_dict("list") == {
        "id": ["001", "9223372036854775808"],
        "label": ["NA", "x, y"],
        "Score": ["1e5", ""],
    }
    theirs = pd.read_csv(
        tmp_path / "a.csv", sep=";", dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False
    )
    assert frame.to_numpy().tolist() == [[cell.strip() for cell in row] for row in theirs.to_numpy()]


def test_templates():
    frame = pd.DataFrame({"Id": ["abc", "xyz"], "Subject Focus": ["1", "2"]})
    assert paths("{split}/{Id[0]}/{Id[0:2]}/{Id}-{Subject Focus}.jpg", frame, "test") == [
        "test/a/ab/abc-1.jpg",
        "test/x/xy/xyz-2.jpg",
    ]
    assert paths("train/{Id},other/{Id}", frame, "train") == ["train/abc", "train/xyz"]
    assert paths("train/{Id},other/{Id}", frame, "test") == ["other/abc", "other/xyz"]
