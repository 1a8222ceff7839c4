"""What a tracker is told of the best weights: the numbers are scikit-learn's, the rows always the same ones, and it
costs no run."""

import io
import json
import re
import shutil
import time

import numpy as np
import pandas as pd
import pytest
from conftest import result_of, write_pictures
from PIL import Image
from sklearn import metrics as sk
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb_stub import WandbStub

from experiments.comparison import wandb_records
from experiments.reporting import drawing, figures, media_tables
from experiments.reporting import media as run_media_log
from experiments.reporting.scored import Scored, confusion, worst_confused
from lightning_modules.callbacks.prediction_table import fixed_rows
from lightning_modules.loggers.csv_logger import read_history

TINY = (
    "--data_dir pics --image_size 16 --model vit_nano4 --model_args.embed_dim 32 --model_args.depth 2 --recipe none "
    "--global_batch_size 8 "
    "--lr 2e-3 --workers 0 --epochs 3"
)
NASTY = ["$x^{$", "a\nb\x00c", "\udcff\ud800", "<script>alert(1)</script>", "%s {} \\", "", "x" * 500, "猫"]


def classes(count, rows, seed=0, names=None):
    rng = np.random.default_rng(seed)
    said = rng.dirichlet(np.full(count, 0.3), rows).astype(np.float32)
    target = np.where(rng.random(rows) < 0.5, said.argmax(1), rng.integers(count, size=rows))
    target[target == 1], said[:, 2] = 0, 0  # one class is never there, one never said
    return Scored(
        "predictions.csv",
        "classification",
        names or [f"class {k}" for k in range(count)],
        np.array([f"val/{k}.jpg" for k in range(rows)]),
        target,
        said,
        said.argmax(1),
        said.max(1),
    )


def labels(count, rows, seed=0, names=None):
    rng = np.random.default_rng(seed)
    said = rng.random((rows, count), np.float32).round(2)  # with ties
    there = (rng.random((rows, count)) < said) & (np.arange(count) != 1)
    return Scored(
        "oof.csv",
        "multilabel",
        names or [f"label {k}" for k in range(count)],
        np.arange(rows).astype(str),
        there.astype(float),
        said,
    )


def values(names, rows, seed=0):
    rng = np.random.default_rng(seed)
    target = rng.normal(50, 20, (rows, len(names)))
    return Scored(
        "oof.csv",
        "regression",
        names,
        np.arange(rows).astype(str),
        target,
        target * 0.5 + 25 + rng.normal(0, 5, target.shape),
    )


def same(column, truth):
    assert np.allclose(np.array(column, float), np.array(truth, float), rtol=1e-6, equal_nan=True)  # None is NaN


# Tables


@pytest.mark.parametrize("count, rows", [(3, 40), (10, 3000), (37, 400)])
def test_classes_are_those_of_scikit_learn(count, rows):
    scored = classes(count, rows, seed=count)
    table = media_tables.per_class(scored)
    frame = pd.DataFrame(table.rows, columns=table.columns)
    assert [*frame] == ["class", "rows", "recall", "precision", "f1", "most often taken for", "times"] and list(
        frame["class"]
    ) == scored.names
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        scored.target, scored.likeliest, labels=range(count), zero_division=np.nan
    )
    assert list(frame["rows"]) == list(support)
    for column, truth in (("recall", recall), ("precision", precision), ("f1", f1)):
        same(frame[column], truth)
    matrix = sk.confusion_matrix(scored.target, scored.likeliest, labels=range(count))
    np.fill_diagonal(matrix, 0)
    assert list(frame["times"]) == list(matrix.max(1))
    assert [row[5] for row in table.rows] == [scored.names[row.argmax()] if row.any() else None for row in matrix]


def test_labels_are_those_of_scikit_learn():
    scored = labels(6, 500)
    frame = pd.DataFrame((table := media_tables.per_class(scored)).rows, columns=table.columns)
    there, said = scored.target.astype(int), (scored.prediction > 0.5).astype(int)
    precision, recall, f1, support = sk.precision_recall_fscore_support(there, said, zero_division=np.nan)
    assert list(frame["rows"]) == list(support) and support[1] == 0
    for column, truth in (("recall", recall), ("precision", precision), ("f1", f1)):
        same(frame[column], truth)
    average = sk.average_precision_score(there[:, support > 0], scored.prediction[:, support > 0], average=None)
    same(frame["average precision"][support > 0], average)
    assert frame["average precision"].isna()[1]


def test_targets_are_those_of_scikit_learn_and_pandas():
    scored = values(["a", "b"], 500)
    frame = pd.DataFrame((table := media_tables.per_class(scored)).rows, columns=table.columns).set_index("target")
    for t, name in enumerate("ab"):
        true, said = scored.target[:, t], scored.prediction[:, t]
        truth = [
            500,
            sk.root_mean_squared_error(true, said),
            sk.mean_absolute_error(true, said),
            sk.r2_score(true, said),
            (said - true).mean(),
        ]
        same(frame.loc[name][:5], truth)
        same(frame.loc[name][5:], pd.Series(said - true).groupby(pd.qcut(true, 10, labels=False)).mean())
    few = media_tables.per_class(
        Scored("oof.csv", "regression", ["a"], np.array(["1", "2"]), np.array([[3.0], [3.0]]), np.array([[4.0], [5.0]]))
    )
    assert few.rows[0][4] is None and few.rows[0][6:] == [1.0, 2.0, *[None] * 8]


@pytest.mark.parametrize("count, most", [(4, 30), (60, 30), (200, 30), (60, 7)])
def test_the_worst_confused_are_a_part_of_the_whole_matrix(count, most):
    scored = classes(count, 4000, seed=1)
    picked = worst_confused(scored.target, scored.likeliest, count, most)
    assert len(picked) <= most and (np.diff(picked) > 0).all() and len(picked) >= min(count, most - 1)
    whole = sk.confusion_matrix(scored.target, scored.likeliest, labels=range(count))
    counts = confusion(scored.target, scored.likeliest, count, picked)
    assert np.array_equal(counts[:, :-1], whole[np.ix_(picked, picked)]) and np.array_equal(
        counts.sum(1), whole[picked].sum(1)
    )
    np.fill_diagonal(whole, 0)
    assert set(np.unravel_index(whole.argmax(), whole.shape)) <= {*picked}


def test_a_thousand_classes_and_fifty_thousand_rows_are_quick():
    rng = np.random.default_rng(0)
    target, likeliest = rng.integers(1000, size=50_000), rng.integers(1000, size=50_000)
    scored = Scored(
        "predictions.csv",
        "classification",
        [f"class {k}" for k in range(1000)],
        np.array([f"val/{k}.jpg" for k in range(50_000)]),
        target,
        None,
        likeliest,
        rng.random(50_000).astype(np.float32),
    )
    start = time.process_time()
    assert len(media_tables.per_class(scored).rows) == 1000
    assert len(media_tables.examples(scored, {}, lambda ids: [None] * len(ids)).rows) == 32
    assert min(figures.confused(scored).pixels().shape[:2]) > 500
    assert time.process_time() - start < 6
    many = classes(12_000, 300)
    table = media_tables.per_class(many)
    assert (
        len(table.rows) == 10_000 and sum(row[1] for row in table.rows) == 300
    )  # those that are not there are left out first


# The fixed rows


def test_the_rows_shown_are_those_of_their_ids_alone():
    ids, rng = [f"val/{k // 10}/{k}.jpg" for k in range(1000)], np.random.default_rng(0)
    first = [ids[row] for row in fixed_rows(ids)]
    order = rng.permutation(1000)
    assert len(first) == 32 and [ids[order[row]] for row in fixed_rows([ids[k] for k in order])] == first
    assert len({each.split("/")[1] for each in first}) > 20 and first[:8] == [ids[row] for row in fixed_rows(ids, 8)]
    assert len(fixed_rows(ids[:5])) == 5 and len(fixed_rows(["\udcff", "b"])) == 2
    assert fixed_rows(["a", "b", "c", "d", "e"]) == [4, 2, 0, 1, 3]  # for ever: the runs of a year ago are compared too


def opener(ids):
    made = [Image.fromarray(np.full((300, 600, 4), 40 + k, np.uint8), "RGBA") for k in range(len(ids))]
    return [None, *made[1:]]


def test_examples_tell_what_was_said():
    scored = classes(12, 200)
    table = media_tables.examples(scored, {}, opener)
    assert (
        len(table.rows) == 32
        and table.rows[0][0] is None
        and all(row[0].size == (224, 112) and row[0].mode == "RGB" for row in table.rows[1:])
    )
    for row, place in zip(table.rows, fixed_rows(scored.ids)):
        cells, said = dict(zip(table.columns, row)), scored.prediction[place]
        best = sorted(range(12), key=lambda k: (-said[k], k))[:5]
        assert cells["id"] == scored.ids[place] and cells["right"] == (scored.likeliest[place] == scored.target[place])
        assert cells["target"] == scored.names[scored.target[place]] and cells["prediction"] == scored.names[best[0]]
        assert cells["probability of target"] == pytest.approx(said[scored.target[place]]) and cells[
            "probability"
        ] == pytest.approx(said[best[0]])
        assert cells["top 5"] == ", ".join(f"{scored.names[k]} {100 * said[k]:.1f} %" for k in best)


def test_of_many_classes_the_probabilities_come_from_beside_the_table():
    whole = classes(150, 200)
    scored = Scored(
        whole.file, whole.task, whole.names, whole.ids, whole.target, None, whole.likeliest, whole.confidence
    )
    shown = {whole.ids[row]: whole.prediction[row] for row in fixed_rows(whole.ids)}
    assert (
        media_tables.examples(scored, shown, opener).rows[1][1:] == media_tables.examples(whole, {}, opener).rows[1][1:]
    )
    lone = media_tables.examples(scored, {}, opener)
    for row in lone.rows:
        cells = dict(zip(lone.columns, row))
        assert (cells["probability of target"] is None) == (not cells["right"]) and "," not in cells["top 5"]


def test_examples_of_labels_and_values():
    scored = labels(7, 50)
    table = media_tables.examples(scored, {}, opener)
    cells, place = dict(zip(table.columns, table.rows[3])), fixed_rows(scored.ids)[3]
    assert cells["target"] == ", ".join(np.array(scored.names)[scored.target[place] > 0])
    assert cells["right"] == (cells["target"] == cells["prediction"])
    probabilities = np.where(scored.target[place] > 0, scored.prediction[place], 1 - scored.prediction[place])
    assert cells["mean probability of target"] == pytest.approx(probabilities.mean())
    for names, columns in (
        (["a"], ["target", "prediction", "error"]),
        (["a", "b"], ["target a", "prediction a", "error a", "target b", "prediction b", "error b"]),
    ):
        scored = values(names, 50)
        table = media_tables.examples(scored, {}, opener)
        assert table.columns == ["picture", "id", *columns]
        place = fixed_rows(scored.ids)[3]
        same(
            table.rows[3][2:5],
            [
                scored.target[place, 0],
                scored.prediction[place, 0],
                scored.prediction[place, 0] - scored.target[place, 0],
            ],
        )


def test_names_are_only_text(recwarn):
    for scored in (classes(8, 300, names=NASTY), labels(8, 300, names=NASTY), values(NASTY[:4], 50)):
        table = media_tables.per_class(scored)
        json.dumps(table.rows, allow_nan=False)
        "\n".join(str(row[0]) for row in table.rows).encode()
        assert len(table.rows[0][0]) <= 100 and figures.confused(scored).pixels().ndim == 3
        assert figures.sheet(media_tables.examples(scored, {}, opener, 16)).pixels().shape[1] > 1000
    assert media_tables.words("a\nb\x00c") == "a?b?c" and media_tables.words("abcdefghij", 10) == "abcdefghij"
    assert [media_tables.words("animals_birds_" + end, 12) for end in ("owl", "jay")] == [
        "anima..._owl",
        "anima..._jay",
    ]  # told apart
    assert not [each for each in recwarn if "Glyph" in str(each.message)]


def test_figures_of_little():
    right = classes(40, 1)
    right = Scored(right.file, right.task, right.names, right.ids, np.array([5]), None, np.array([5]), np.array([1.0]))
    for scored in (right, classes(3, 5), labels(2, 1), values(["a"], 1)):
        picture = figures.confused(scored).pixels()
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and picture.std() > 0


def test_a_long_name_is_not_cut_by_the_edge():
    pixels = figures.confused(values(["W" * 60], 9000)).pixels()
    assert (pixels[:, :4] == 255).all() and (pixels[:, -4:] == 255).all() and pixels.std() > 0


def test_the_matrix_is_coloured_by_the_share_of_the_row():
    target, likeliest = np.repeat([0, 0, 1], [60, 30, 10]), np.repeat([0, 1, 1], [60, 30, 10])
    scored = Scored(
        "p", "classification", ["often", "rare"], np.arange(100).astype(str), target, None, likeliest, np.ones(100)
    )
    drawn = figures.confused(scored)
    cells = [mark.opacity for mark in drawn.marks if isinstance(mark, drawing.Box) and mark.colour == "raw"]
    assert np.allclose(cells, [2 / 3, 1 / 3, 0, 1])
    told = [mark.words for mark in drawn.marks if isinstance(mark, drawing.Text)]
    assert sorted(each for each in told if each.isdigit()) == ["10", "30", "60"] and "70.00 % of 100" in drawn.title
    assert told.count("often") == told.count("rare") == 2  # a row and a column
    assert (drawn.pixels() == [31, 95, 191]).all(-1).sum() > 100  # the last cell is as dark as can be


# Runs


def media(folder):
    """{key: (x, value)} of the media rows of a run directory's .wandb file, and its history's last x."""
    (file,) = (folder / "wandb").glob("*run-*/*.wandb")
    rows = wandb_records.read(file)["rows"]
    found = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("best/"):
                name, _, part = key.partition(".")
                found.setdefault(name, (row["trainer/global_step"], {}))[1][part] = value
    return found, file.parent / "files"


def table_of(files, found, key):
    return json.loads((files / found[key][1]["path"]).read_text())


def staged(tmp_path):
    """Pictures of tables, which W&B keeps until they are uploaded."""
    found = []
    for file in (tmp_path / "wandb-data").rglob("staging/*"):
        content = file.read_bytes()
        found += [Image.open(io.BytesIO(content))] if content[:3] == b"\xff\xd8\xff" else []
    return found


def boards(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def accuracy(folder):
    table = pd.read_csv(folder / "predictions.csv")
    names = sorted(set(table["target"]))
    return table, float(
        (
            table[[f"prediction_{name}" for name in names]].to_numpy().argmax(1) == table["target"].map(names.index)
        ).mean()
    )


def test_a_run_without_test_pictures_leaves_the_rows_of_val_and_tells_wandb(pics, launch):
    shutil.rmtree(pics / "pics" / "test")
    write_pictures(pics / "pics" / "val", {"dark": 21, "grey": 16, "light": 9}, seed=5)
    folder = pics / "runs" / "one"
    ended = launch(f"{TINY} --ema_decay 0.5 --name one --logger_args.attention true")
    assert ended.code == 0 and "could not be made" not in ended.out, ended.out
    result, history = result_of(folder), read_history(folder / "metrics.csv")
    best = next(row for row in history if row["epoch"] == result["best_epoch"] and "val/loss" in row)
    assert all(
        result[key] == best[key] for key in ("val/acc1", "val/loss", "val_ema/acc1", "val_ema/loss")
    )  # as trained, not scored again
    table, right = accuracy(folder)
    assert (
        len(table) == 46
        and table["id"].str.startswith("val/").all()
        and np.float32(right) == np.float32(result["val_ema/acc1"]) == np.float32(result["best"])
    )
    page = (folder / "report.html").read_text()
    assert "of predictions.csv (val)" in page and 'id="ece"' in page

    found, files = media(folder)
    assert {*found} == {"best/per_class", "best/confusion", "best/predictions", "best/attention"}
    assert {x for x, _ in found.values()} == {history[-1]["step"]}
    told = table_of(files, found, "best/per_class")
    truth = sk.classification_report(
        table["target"],
        table[["prediction_dark", "prediction_grey", "prediction_light"]].idxmax(axis=1).str[11:],
        output_dict=True,
        zero_division=np.nan,
    )
    for row in told["data"]:
        assert row[1:5] == pytest.approx(
            [truth[row[0]][key] for key in ("support", "recall", "precision", "f1-score")], nan_ok=True
        )
    shown = table_of(files, found, "best/predictions")
    assert [row[1] for row in shown["data"]] == [table["id"][row] for row in fixed_rows(list(table["id"]))] and len(
        shown["data"]
    ) == 32
    pictures = staged(pics)
    assert len(pictures) >= 25 and all(
        picture.format == "JPEG" and picture.size == (16, 16) for picture in pictures
    )  # equal ones lie there once
    assert Image.open(files / found["best/confusion"][1]["filenames"][0]).width > 300
    assert np.array_equal(
        np.asarray(Image.open(files / found["best/attention"][1]["filenames"][0]).convert("RGB")),
        np.asarray(Image.open(folder / "attention.png").convert("RGB")),
    )


@pytest.mark.slow
def test_the_server_receives_it_and_two_ranks_another_network_and_seed_show_the_same_rows(pics, launch):
    line = f"{TINY} --epochs 1 --accelerator cpu"
    with WandbStub() as server:
        ended = launch(f"{line} --name one", env=server.env)
        assert ended.code == 0 and "could not be made" not in ended.out, ended.out
        ((name, run),) = server.runs.items()
        rows = {key: row[key] for row in server.history(name) for key in row if key.startswith("best/")}
        assert not server.unknown, server.unknown
    assert {*rows} == {"best/per_class", "best/confusion", "best/predictions"} and run["exitcode"] == 0
    assert json.loads(run["files"][rows["best/per_class"]["path"]])["columns"][0] == "class"
    assert Image.open(io.BytesIO(run["files"][rows["best/confusion"]["filenames"][0]])).width > 300

    ended = launch(f"{line} --model_args.depth 1 --seed 3 --devices 2 --name two", ranks=2)
    assert ended.code == 0, ended.out
    assert launch("--eval_only --init runs/one --name again").code == 0
    tables = []
    for name in ("one", "two", "again"):
        found, files = media(pics / "runs" / name)
        rows = table_of(files, found, "best/predictions")["data"]
        tables.append([(row[1], row[3]) for row in rows])
        assert (
            all(re.match("test/", row[1]) for row in rows)
            and len(rows) == 13
            and {x for x, _ in found.values()} == {read_history(pics / "runs" / name / "metrics.csv")[-1]["step"]}
        )
    assert tables[0] == tables[1] == tables[2] and "best/attention" not in found
    assert "of predictions.csv (test)" in (pics / "runs" / "one" / "report.html").read_text()
    table, right = accuracy(pics / "runs" / "one")
    assert table["id"].str.startswith("test/").all() and np.float32(right) == np.float32(
        result_of(pics / "runs" / "one")["test/acc1"]
    )


def test_of_more_classes_than_the_table_has_columns_the_five_likeliest_are_told(tmp_path, launch):
    for part, count in (("train", 1), ("val", 2)):
        write_pictures(
            tmp_path / "pics" / part,
            dict.fromkeys(["$x^{", "<b>\U0001f408", *(f"c{k:03}" for k in range(99))], count),
            side=8,
        )
    ended = launch(f"{TINY} --epochs 1 --global_batch_size 101 --name one")
    assert ended.code == 0 and "could not be made" not in ended.out, ended.out
    found, files = media(tmp_path / "runs" / "one")
    table = table_of(files, found, "best/predictions")
    assert len(table["data"]) == 32 and {"$x^{", "<b>\U0001f408"} <= {
        row[0] for row in table_of(files, found, "best/per_class")["data"]
    }
    for row in table["data"]:
        cells = dict(zip(table["columns"], row))
        shares = [float(each.split()[1]) for each in cells["top 5"].split(", ")]
        assert (
            len(shares) == 5
            and shares == sorted(shares, reverse=True)
            and cells["top 5"].startswith(cells["prediction"])
        )
        assert 0 < cells["probability of target"] <= cells["probability"] and shares[0] == pytest.approx(
            100 * cells["probability"], abs=0.051
        )
    matrix = np.asarray(Image.open(files / found["best/confusion"][1]["filenames"][0]))
    assert matrix.shape[0] > 1000  # 30 of the 101


def broken_media():
    def fail(*arguments):
        raise MemoryError("no room")

    media_tables.per_class = figures.confused = fail


def test_what_fails_is_a_warning_and_the_rest_is_told(pics, launch):
    ended = launch(f"{TINY} --epochs 1 --logger tensorboard --name one", before=broken_media)
    assert ended.code == 0 and result_of(pics / "runs" / "one")["finished"] and "Traceback" not in ended.out
    assert "best/per_class could not be made: MemoryError" in ended.out and "best/confusion could not" in ended.out
    assert {*boards(pics / "runs" / "one" / "tensorboard").Tags()["images"]} == {"best/predictions"}


def test_a_regression_from_a_table(tmp_path, launch):
    rng = np.random.default_rng(0)
    (tmp_path / "comp" / "train").mkdir(parents=True)
    brightness = rng.integers(0, 200, 30)
    for k, value in enumerate(brightness):
        Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(tmp_path / "comp" / "train" / f"p{k}.jpg")
    pd.DataFrame({"Id": [f"p{k}" for k in range(30)], "Score": brightness / 2 + 0.5}).to_csv(
        tmp_path / "comp" / "train.csv", index=False
    )
    ended = launch(
        f"{TINY.replace('--data_dir pics', '--data_dir comp')} --task regression --target Score --epochs 1 "
        f"--val_fraction 0.4 --name one"
    )
    assert ended.code == 0 and "could not be made" not in ended.out, ended.out
    found, files = media(tmp_path / "runs" / "one")
    told, oof = table_of(files, found, "best/per_class"), pd.read_csv(tmp_path / "runs" / "one" / "oof.csv")
    assert told["data"][0][:3] == [
        "Score",
        len(oof),
        pytest.approx(sk.root_mean_squared_error(oof["target"], oof["prediction"])),
    ]
    assert told["data"][0][2] == pytest.approx(result_of(tmp_path / "runs" / "one")["val/rmse"], rel=1e-6)
    shown = table_of(files, found, "best/predictions")
    assert shown["columns"] == ["picture", "id", "target", "prediction", "error"] and len(shown["data"]) == len(oof)
    assert not (tmp_path / "runs" / "one" / "predictions.csv").exists()


def test_tensorboard_has_the_pictures(tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger

    logger, scored = TensorBoardLogger(tmp_path), classes(5, 60)
    drawn = figures.confused(scored).pixels()
    run_media_log.log_picture([logger], "best/confusion", drawn, 17)
    table = media_tables.examples(scored, {}, opener)
    run_media_log.log_picture([logger], "best/predictions", figures.sheet(table).pixels(), 17)
    run_media_log.log_table([logger], "best/per_class", table, 17)
    logger.finalize("success")
    events = boards(logger.log_dir)
    assert {*events.Tags()["images"]} == {"best/confusion", "best/predictions"}
    (event,) = events.Images("best/confusion")
    assert event.step == 17 and np.array_equal(
        np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB")), drawn
    )
