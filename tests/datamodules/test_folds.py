"""Folds: scikit-learn's own where it has them; balance, groups and messages where it has not."""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

from datamodules.tables import folds

PAWPULARITY = next(
    (
        folder / "shared/data/pawpularity/train.csv"
        for folder in Path(__file__).parents[2:4]
        if (folder / "shared/data/pawpularity/train.csv").is_file()
    ),
    Path("shared/data/pawpularity/train.csv"),
)


def by(splitter, targets, groups=None):
    fold = np.full(len(targets), -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, (_, held_out) in enumerate(splitter.split(np.zeros(len(targets)), targets, groups)):
            fold[held_out] = number
    return fold


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.mark.parametrize("k, seed", [(2, 0), (5, 3), (10, 1)])
def test_classes_and_values_are_held_out_as_scikit_learn_does(rng, k, seed):
    kind, value = rng.integers(0, 4, 200), rng.exponential(10, 200).round(1)
    group = rng.integers(0, 40, 200)
    shuffled = {"shuffle": True, "random_state": seed}
    binned = pd.qcut(value, min(round(2 * 200 ** (1 / 3)), 200 // k), labels=False, duplicates="drop")
    for task, targets, labels in (
        ("classification", kind, kind),
        ("regression", value.astype(np.float32)[:, None], binned),
    ):
        assert (folds.assign(targets, task, k, seed) == by(StratifiedKFold(k, **shuffled), labels)).all()
        assert (
            folds.assign(targets, task, k, seed, group) == by(StratifiedGroupKFold(k, **shuffled), labels, group)
        ).all()
        names = np.array([f"patient {number:02}" for number in group])
        assert (folds.assign(targets, task, k, seed, names) == folds.assign(targets, task, k, seed, group)).all()
        assert (folds.assign(targets, task, k, seed, stratified=False) == by(KFold(k, **shuffled), labels)).all()
        assert (
            folds.assign(targets, task, k, seed, group, stratified=False)
            == by(GroupKFold(k, **shuffled), labels, group)
        ).all()


@pytest.mark.skipif(not PAWPULARITY.is_file(), reason=f"the competition's table is not here ({PAWPULARITY})")
def test_pawpularity_is_split_as_people_do_and_its_constant_predictor_scores_20_59():
    value = pd.read_csv(PAWPULARITY)["Pawpularity"]
    fold = folds.assign(value.to_numpy(np.float32)[:, None], "regression", 5, 42)
    binned = pd.qcut(value, 20, labels=False, duplicates="drop")
    assert len(fold) == 9912 and (fold == by(StratifiedKFold(5, shuffle=True, random_state=42), binned)).all()
    means = value.groupby(fold).transform(lambda part: value[~value.index.isin(part.index)].mean())
    assert value.std(ddof=0) == pytest.approx(20.591, abs=5e-4)
    assert np.sqrt(((value - means) ** 2).mean()) == pytest.approx(
        20.59, abs=0.005
    )  # out of fold: each fold by the others' mean
    assert value.groupby(fold).mean().std() < 0.1


def spread(labels, fold):
    """Mean over labels of the standard deviation of their share in each fold, relative to their share."""
    share = np.stack([labels[fold == number].mean(0) for number in np.unique(fold)])
    return (share.std(0) / labels.mean(0)).mean()


def test_labels_are_spread_more_evenly_than_by_chance(rng):
    labels = rng.random((600, 12)) < rng.uniform(0.02, 0.3, 12)
    labels[:, 1] |= labels[:, 0]  # some come together
    fold = folds.assign(labels.astype(np.float32), "multilabel", 5, 0)
    chance = np.mean([spread(labels, by(KFold(5, shuffle=True, random_state=seed), labels)) for seed in range(20)])
    assert spread(labels, fold) < chance / 5
    assert np.ptp(np.bincount(fold)) <= 12
    counts = np.stack([labels[fold == number].sum(0) for number in range(5)])
    rarest = labels.sum(0).argmin()
    assert np.ptp(counts[:, rarest]) <= 1  # the first to be dealt out
    assert (fold == folds.assign(labels, "multilabel", 5, 0)).all() and (
        fold != folds.assign(labels, "multilabel", 5, 1)
    ).any()


def test_rows_without_a_label_fill_the_folds():
    fold = folds.assign(np.eye(30, 3), "multilabel", 3, 0)
    assert (np.bincount(fold) == 10).all()


def test_groups_stay_whole_for_labels_and_for_several_targets(rng):
    labels, group = rng.random((400, 6)) < 0.2, rng.integers(0, 90, 400)
    for targets, task in ((labels, "multilabel"), (rng.normal(size=(400, 2)), "regression")):
        fold = folds.assign(targets, task, 4, 0, group)
        assert all(len(set(fold[group == number])) == 1 for number in set(group))
        assert np.bincount(fold).min() > 80
    chance = np.mean(
        [spread(labels, by(GroupKFold(4, shuffle=True, random_state=seed), labels, group)) for seed in range(20)]
    )
    assert (
        np.mean([spread(labels, folds.assign(labels, "multilabel", 4, seed, group)) for seed in range(5)])
        < 0.75 * chance
    )


def test_several_targets_are_each_spread(rng):
    values = rng.normal(size=(500, 2)) ** 3
    ours, chance = (
        [
            np.std([(values[fold == number] > np.quantile(values, 0.9, axis=0)).mean(0) for number in range(5)], axis=0)
            for fold in (folds.assign(values, "regression", 5, seed, stratified=stratified) for seed in range(10))
        ]
        for stratified in (True, False)
    )
    assert (np.mean(ours, 0) < 0.6 * np.mean(chance, 0)).all()


def test_groups_unite_through_common_members():
    patient = np.array(["a", "b", "c", "b", "d", "", ""])
    alike = np.array([0, 1, 0, 2, 3, 4, 5])
    assert folds.union(patient, alike).tolist() == [0, 1, 0, 1, 2, 3, 4]
    assert folds.union(patient, np.array([9, 9, 8, 7, 7, 6, 5])).tolist() == [0, 0, 1, 0, 0, 2, 3]
    assert folds.union(patient).tolist() == [0, 1, 2, 1, 3, 4, 5]


def test_an_empty_group_is_a_row_of_its_own():
    fold = folds.assign(
        np.arange(12) % 2, "classification", 3, 0, np.array(["", "", "x", "x", "", "", "", "", "", "", "", ""])
    )
    assert fold[2] == fold[3] and np.bincount(fold).min() >= 3


@pytest.mark.parametrize(
    "targets, task, k, groups, words",
    [
        ([0, 1, 0], "classification", 5, None, "--folds 5: the table has 3 rows"),
        ([0, 0, 1, 1, 2], "classification", 3, None, "no class has 3 rows (the largest, 'cat', has 2)"),
        ([0, 0, 1, 1, 0, 1], "classification", 3, ["a", "a", "b", "b", "a", "b"], "there are 2 groups"),
        ([0, 0, 1, 1], "classification", 2, [5, 5, 5, 5], "a single group"),
        ([1.0, 2.0, float("nan"), 3.0], "regression", 2, None, "row 2"),
    ],
)
def test_what_cannot_be_folded_is_said(targets, task, k, groups, words):
    with pytest.raises(ValueError) as error:
        folds.assign(
            np.array(targets),
            task,
            k,
            0,
            None if groups is None else np.array(groups),
            class_names=["cat", "dog", "eel"],
        )
    assert words in str(error.value)


def test_rare_classes_are_allowed_and_named():
    targets = np.array([0] * 20 + [1] * 2 + [2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fold = folds.assign(targets, "classification", 4, 0)
    assert fold[20] != fold[21]
    never, line = folds.notes(fold, targets, "classification", ["cat", "dog", "eel"])
    assert "2 of 3 classes" in line and "eel (1), dog (2)" in line and f"fold {fold[22]}: eel (1 row)" in never
    assert folds.notes(fold, np.arange(23) / 3, "regression", []) == []
    assert folds.notes(fold[:20], targets[:20], "classification", ["cat"]) == []


def test_the_file_is_written_once_and_read_for_its_own_table_only(tmp_path, rng):
    ids, targets, group = [f"0{number}" for number in range(20)], rng.integers(0, 2, 20), np.arange(20) // 2
    fold = folds.assign(targets, "classification", 4, 0, group)
    names = {
        folds.file_name("csv", ids, targets, "classification", 4, 0),
        folds.file_name("csv", ids, targets, "classification", 4, 0, group),
        folds.file_name("csv", ids, 1 - targets, "classification", 4, 0),
        folds.file_name("csv", ids[::-1], targets, "classification", 4, 0),
        folds.file_name("csv", ids, targets, "regression", 4, 0),
    }
    assert len(names) == 5 and all(name.startswith("csv-") and name.endswith("-k4-s0.csv") for name in names)
    path = tmp_path / "folds" / "one.csv"
    folds.write(path, ids, fold, "Id")
    assert (folds.read(path, ids, 4, group) == fold).all()
    table = pd.read_csv(path, dtype=str)
    assert (
        [*table] == ["Id", "fold"]
        and table["Id"].tolist() == ids
        and [file.name for file in path.parent.iterdir()] == ["one.csv"]
    )
    folds.write(path, ids, (fold + 1) % 4, "Id")
    assert (folds.read(path, ids, 4) == fold).all()
    for change, words in (
        (lambda text: text.replace("Id,fold", "Id,f"), "no file of folds"),
        (lambda text: text.replace("03,", "x3,"), "line 5"),
        (lambda text: text[:-6], "19 ids for 20"),
        (lambda text: text.replace(f"00,{fold[0]}", "00,7"), "fold '7'"),
        (lambda text: text.replace(f"00,{fold[0]}", f"00,{(fold[0] + 1) % 4}"), "rest of its group"),
    ):
        other = tmp_path / "other.csv"
        other.write_text(change(path.read_text()))
        with pytest.raises(ValueError) as error:
            folds.read(other, ids, 4, group)
        assert words in str(error.value) and str(other) in str(error.value)
