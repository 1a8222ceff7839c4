"""report.html: there before the first step, true to the files beside it, harmless, small, and without a trace in the
training."""

import base64
import io
import json
import re
import shutil
from functools import partial
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import result_of, weights_of, write_pictures
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_score, recall_score
from torchmetrics.functional.classification import multiclass_calibration_error, multilabel_average_precision

from experiments.config import Config, plain
from experiments.reporting import drawing, run_page
from experiments.reporting import scored as scored_page
from lightning_modules.callbacks.first_images import FirstImages
from lightning_modules.loggers.csv_logger import read_history

TINY = (
    "--data_dir pics --image_size 16 --model vit_nano4 --model_args.embed_dim 32 --model_args.depth 2 "
    "--model_args.drop_path 0.2 "
    "--recipe none --global_batch_size 8 --lr 2e-3 --workers 0 --logger csv --micro_batch_size 4"
)
MIXED = "--mixup 0.5 --random_erasing 0.5 --ema_decay 0.8 --data_args.mean [0.2,0.3,0.4] --data_args.std [0.3,0.2,0.1]"
SAFE = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "header",
    "section",
    "h1",
    "h2",
    "h3",
    "p",
    "b",
    "br",
    "small",
    "code",
    "span",
    "div",
    "dl",
    "dt",
    "dd",
    "data",
    "figure",
    "figcaption",
    "img",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "details",
    "summary",
    "svg",
    "text",
    "path",
    "circle",
    "rect",
}
VOID = {"meta", "img", "br"}


class Node:
    def __init__(self, tag, attributes, above):
        self.tag, self.attributes, self.above, self.inside = tag, attributes, above, []

    def walk(self):
        yield self
        for each in self.inside:
            yield from each.walk() if isinstance(each, Node) else ()

    def all(self, tag, kind=None):
        return [
            node
            for node in self.walk()
            if node.tag == tag and (kind is None or kind in node.attributes.get("class", "").split())
        ]

    def text(self):
        return "".join(each.text() if isinstance(each, Node) else each for each in self.inside).strip()

    def values(self):
        return [float(node.attributes["value"]) for node in self.all("data")]


def curves(node):
    """The number of points of each curve."""
    lines = [path.attributes for path in node.all("path")]
    return [line["d"].count("L") + 1 for line in lines if line["stroke-width"] == "1.7"]


class Page(HTMLParser):
    """The page as a tree; raises for a tag that is not closed where it should be."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text("ascii")
        self.place = self.root = Node("", {}, None)
        self.feed(self.source)
        assert self.place is self.root
        self.ids = {node.attributes["id"]: node for node in self.root.walk() if "id" in node.attributes}
        self.facts = {node.all("dt")[0].text(): node.all("dd")[0] for node in self.ids["facts"].all("div")}
        self.state = self.ids["state"].text()

    def handle_starttag(self, tag, attributes):
        node = Node(tag, dict(attributes), self.place)
        self.place.inside.append(node)
        self.place = node if tag not in VOID else self.place

    def handle_startendtag(self, tag, attributes):
        self.place.inside.append(Node(tag, dict(attributes), self.place))

    def handle_endtag(self, tag):
        assert self.place.tag == tag, f"<{self.place.tag}> closed by </{tag}>"
        self.place = self.place.above

    def handle_data(self, data):
        self.place.inside.append(data)

    def table(self, kind):
        """Rows of a table: (its name, its cells)."""
        return [
            (row.all("th")[0].text(), row.all("td"))
            for row in self.root.all("table", kind)[0].all("tbody")[0].all("tr")
        ]

    def pictures(self, identity):
        sources = [node.attributes["src"].split(",") for node in self.ids[identity].all("img")]
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))) for _, content in sources]

    def harmless(self):
        nodes = [node for node in self.root.walk() if node.tag]
        assert {node.tag for node in nodes} <= SAFE
        for node in nodes:
            assert not [
                name
                for name in node.attributes
                if name.startswith("on") or name in ("href", "xlink:href", "action", "srcdoc")
            ]
            assert node.attributes.get("src", "data:image/").startswith("data:image/")
        assert not re.search(r"https?:|@import|url\(", self.source)


def keep_batches(file):
    """Each rank writes down the pictures and targets of its first passes."""
    from lightning.pytorch.strategies import Strategy

    original, kept = Strategy.training_step, []

    def training_step(self, batch, *rest):
        if len(kept) < 2:
            kept.append({key: np.array(batch[key]) for key in ("image", "target", "index")})
            np.savez(
                f"{file}-{self.global_rank}.npz",
                **{key: np.concatenate([each[key] for each in kept]) for key in kept[0]},
            )
        return original(self, batch, *rest)

    Strategy.training_step = training_step


def without_page():
    from lightning.pytorch.callbacks import Callback

    from experiments.running import training

    run_page.write = lambda *arguments: None
    training.FirstImagesCallback = lambda *arguments: Callback()


def broken_page():
    def make(*arguments, **words):
        raise OSError(28, "No space left on device")

    run_page.make = make


def news_every_epoch():
    from experiments.running import training

    training.FirstImagesCallback = partial(training.FirstImagesCallback, every_seconds=0)


def failing_step(step):
    from lightning.pytorch.strategies import Strategy

    original = Strategy.training_step

    def training_step(self, *arguments):
        if self.lightning_module.global_step >= step:
            raise ArithmeticError("broken on purpose")
        return original(self, *arguments)

    Strategy.training_step = training_step


def test_the_pictures_are_there_before_the_first_step_and_stay_over_a_resume(pics, launch):
    line, folder = f"{TINY} {MIXED} --epochs 3 --save_every_steps 3 --name one", pics / "runs" / "one"
    assert launch(line, kill_at_step=1, before=partial(keep_batches, "batch")).code == -9
    page = Page(folder / "report.html")
    page.harmless()
    assert (
        page.state == "training"
        and not read_history(folder / "metrics.csv")
        and "curves" not in page.ids
        and "worst" not in page.ids
    )
    assert page.facts["model"].text() == "vit_nano4" and not {"steps", "GMACs"} & page.facts.keys()
    with np.load(pics / "batch-0.npz") as batch:
        shown = page.pictures("seen")
        truth = batch["image"] * np.float32([0.3, 0.2, 0.1])[:, None, None] + np.float32([0.2, 0.3, 0.4])[:, None, None]
        assert len(shown) == len(truth) == 8  # both passes of the first step
        assert np.array_equal(shown, (truth * 255).round().clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1))
        for caption, target in zip(page.ids["seen"].all("figcaption"), batch["target"]):
            told = [value for value in caption.values() or [1.0]]
            assert told == pytest.approx(sorted(target, reverse=True)[: len(told)]) and caption.text().startswith(
                ("dark", "grey", "light")
            )
            assert {["dark", "grey", "light"][k] for k in np.flatnonzero(target > 0.05)} == set(
                re.findall("dark|grey|light", caption.text())
            )

    assert (
        launch(line, kill_at_step=5, before=news_every_epoch).code == -9
    )  # from scratch again, and behind a checkpoint
    page = Page(folder / "report.html")
    assert page.state == "training" and len(page.table("history")) == 1 and np.array_equal(page.pictures("seen"), shown)
    assert launch(line, before=partial(keep_batches, "other")).code == 0
    after = Page(folder / "report.html")
    assert after.state == "finished" and np.array_equal(after.pictures("seen"), shown)
    assert not np.array_equal(np.load(pics / "other-0.npz")["image"], np.load(pics / "batch-0.npz")["image"])
    assert not list(folder.rglob("*.partial"))


def test_numbers_are_those_of_the_files(pics, launch):
    folder = pics / "runs" / "one"
    shutil.rmtree(pics / "pics" / "test")
    write_pictures(
        pics / "pics" / "test", {"dark": 6, "light": 5, "grey": 4}
    )  # light and grey are each other's brightness
    assert launch(f"{TINY} {MIXED} --epochs 3 --log_every_steps 2 --name one").code == 0
    page, result, rows = Page(folder / "report.html"), result_of(folder), read_history(folder / "metrics.csv")
    page.harmless()
    assert page.facts[f"best {result['metric']}"].values() == [result["best"], result["best_epoch"] + 1, 3]
    for key in ("val/acc1", "val/loss", "val_ema/loss", "test/acc1", "test/loss"):
        assert page.facts[key].values() == [result[key]]
    for name, key in {
        "parameters": "params",
        "GMACs": "gmacs",
        "images/s": "images_per_sec",
        "time of training": "train_seconds",
        "steps": "steps",
        "epochs": "epochs",
        "seed": "seed",
        "processes": "world_size",
    }.items():
        assert page.facts[name].values() == [result[key]], name
    assert page.facts["commit"].text() == str(result["commit"] or "-")

    epochs = [row for row in rows if "val/loss" in row]
    head = [cell.text() for cell in page.root.all("table", "history")[0].all("thead")[0].all("th")]
    assert head == ["epoch", "step", "val/acc1", "val_ema/acc1", "val/loss", "train/loss", "lr"]
    for row, (first, cells) in zip(epochs, page.table("history"), strict=True):
        assert [int(first) - 1, *(cell.values()[0] for cell in cells)] == [
            row[key] for key in head
        ]  # people count from 1
    assert "from 0 in metrics.csv" in page.ids["curves"].text()
    assert curves(page.ids["curves"]) == [6, 3, 3, 6, 3, 3, 6]  # train, val, ema of two, and the rate
    last = [epochs[-1]["val_ema/acc1"], epochs[-1]["val_ema/loss"], rows[-1]["lr"]]
    assert [node.values()[-1] for node in page.ids["curves"].all("figure")] == last
    assert page.ids["time"].values()[0] == np.median([row["perf/images_per_sec"] for row in rows])

    table = pd.read_csv(folder / "predictions.csv")
    names = ["dark", "grey", "light"]
    said, target = (
        table[[f"prediction_{name}" for name in names]].to_numpy(),
        table["target"].map(names.index).to_numpy(),
    )
    heads = [cell.text() for cell in page.root.all("table", "matrix")[0].all("thead")[0].all("th")]
    assert heads[1:] == names == [name for name, _ in page.table("matrix")]  # short: they stand on both axes
    assert [[int(cell.text() or 0) for cell in cells] for _, cells in page.table("matrix")] == confusion_matrix(
        target, said.argmax(1)
    ).tolist()
    error = multiclass_calibration_error(torch.tensor(said), torch.tensor(target), 3, n_bins=15, norm="l1")
    assert page.ids["ece"].values() == [pytest.approx(float(error), rel=1e-5)]
    wrong = table[said.argmax(1) != target]
    wrong = wrong.assign(true=said[np.arange(len(said)), target][wrong.index]).sort_values("true", kind="stable")
    shown = [node.attributes["title"] for node in page.ids["worst"].all("img")]
    assert shown == list(wrong["id"]) and shown and shown[0].startswith("test/")
    assert [node.values()[0] for node in page.ids["worst"].all("figcaption")] == pytest.approx(
        list(wrong["true"]), rel=1e-6
    )
    assert np.array_equal(
        page.pictures("worst"), [np.asarray(Image.open(pics / "pics" / name).convert("RGB")) for name in shown]
    )
    differing = {name: yaml.safe_load(cells[0].text()) for name, cells in page.table("config")}
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    assert (
        differing == {key: value for key, value in stored.items() if value != plain(Config())[key]}
        and "mixup" in differing
    )


def test_two_ranks_write_one_page(pics, launch):
    ended = launch(
        f"{TINY} --epochs 2 --devices 2 --accelerator cpu --name two", ranks=2, before=partial(keep_batches, "batch")
    )
    assert ended.code == 0, ended.out
    page = Page(pics / "runs" / "two" / "report.html")
    assert page.state == "finished" and page.facts["processes"].values() == [2]
    first = np.load(pics / "batch-0.npz")["index"]
    names = [node.attributes["title"] for node in page.ids["seen"].all("img")]
    assert len(names) == 4 and len(first) == 8  # what rank 0 has of the first step: 4 of 8 pictures
    assert not list((pics / "runs").rglob("*.partial"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_are_the_same_with_and_without(pics, launch, ranks):
    line = f"{TINY} {MIXED} --epochs 2 --devices {ranks} --accelerator cpu"
    assert launch(f"{line} --name with", ranks=ranks).code == 0
    assert launch(f"{line} --name without", ranks=ranks, before=without_page).code == 0
    runs = pics / "runs"
    assert (runs / "with" / "report.html").is_file() and not (runs / "without" / "report.html").exists()
    for file in ("last.ckpt", "best.ckpt"):
        first, second = (weights_of(runs / name / "checkpoints" / file) for name in ("with", "without"))
        assert all(torch.equal(first[key], second[key]) for key in first) and first.keys() == second.keys()
    assert (runs / "with" / "predictions.csv").read_bytes() == (runs / "without" / "predictions.csv").read_bytes()


def test_a_page_that_fails_is_a_warning_and_a_missing_one_is_written_later(pics, launch):
    line, folder = f"{TINY} --epochs 1 --name one", pics / "runs" / "one"
    ended = launch(line, before=broken_page)
    assert ended.code == 0 and result_of(folder)["finished"] and not (folder / "report.html").exists()
    assert ended.out.count("report.html could not be made: OSError") >= 2 and "Traceback" not in ended.out, ended.out
    again = launch(line)
    assert again.code == 0 and "already finished" in again.out
    page = Page(folder / "report.html")
    assert page.state == "finished" and "worst" in page.ids and "seen" not in page.ids
    page.harmless()
    before = (folder / "report.html").stat().st_mtime_ns
    assert launch(line).code == 0 and (folder / "report.html").stat().st_mtime_ns == before


def test_a_run_that_fails_says_so_and_an_evaluation_has_no_curves(pics, launch):
    ended = launch(f"{TINY} --epochs 3 --log_every_steps 2 --name one", before=partial(failing_step, 7))
    assert ended.code == 1 and "broken on purpose" in ended.out
    page = Page(pics / "runs" / "one" / "report.html")
    assert (
        page.state == "failed"
        and "worst" not in page.ids
        and page.facts["steps"].text() == "6"
        and len(page.table("history")) == 1
    )
    assert launch(f"{TINY} --epochs 3 --log_every_steps 2 --name one").code == 0
    assert launch("--eval_only --init runs/one --logger csv --name scored").code == 0
    page = Page(pics / "runs" / "scored" / "report.html")
    assert page.state == "finished" and "worst" in page.ids and "seen" not in page.ids and "time" not in page.ids
    assert page.facts["best test/acc1"].values() == [result_of(pics / "runs" / "scored")["test/acc1"]]


def test_names_are_only_words(tmp_path, launch):
    names = ["<script>alert(1)", '"><img src=x onerror=alert(2)>', "a & b <!-- end of seen -->"]
    for part, order in (("train", names), ("test", [*names][::-1])):  # the other way round: there will be errors
        write_pictures(tmp_path / "pics" / part, dict.fromkeys(order, 9))
    ended = launch(f"{TINY} --epochs 1 --name one")
    assert ended.code == 0, ended.out
    page = Page(tmp_path / "runs" / "one" / "report.html")
    page.harmless()
    captions = {node.inside[0].strip() for node in page.ids["seen"].all("figcaption")}
    assert captions <= {*names} and len(captions) > 1
    assert {name.rstrip("0123456789 ") for name, _ in page.table("matrix")} == {
        name if len(name) <= 20 else name[:17] + "..." for name in names
    }
    heads = [cell.text() for cell in page.root.all("table", "matrix")[0].all("thead")[0].all("th")]
    assert (
        heads[1:] == ["1", "2", "3"] == [name.split()[-1] for name, _ in page.table("matrix")]
    )  # the numbers that the rows carry


# From here on without training: a folder as a run leaves it.


def spec_of(task, names, **more):
    classes = task != "regression"
    return {
        "task": task,
        "class_names": names if classes else None,
        "target_names": None if classes else names,
        "id_column": "Id",
        **more,
    }


def folder_of(path, table, name="predictions.csv", rows=None, **result):
    path.mkdir(exist_ok=True)
    (path / "config.yaml").write_text(yaml.safe_dump(plain(Config(model="vit_nano4", data="csv"))))
    (path / "result.json").write_text(json.dumps({"model": "vit_nano4", "finished": True, **result}))
    if table is not None:
        table.to_csv(path / name, index=False)
    if rows is not None:
        pd.DataFrame(rows).to_csv(path / "metrics.csv", index=False)
    return path


@pytest.mark.parametrize("classes, rows", [(2, 50), (10, 3000), (37, 400)])
def test_calibration_and_confusion_are_those_of_torchmetrics_and_sklearn(classes, rows):
    rng = np.random.default_rng(classes)
    said = rng.dirichlet(np.full(classes, 0.3), rows)
    target = np.where(rng.random(rows) < 0.5, said.argmax(1), rng.integers(classes, size=rows))
    counts, confidence, right, error = scored_page.calibration(said.max(1), said.argmax(1) == target)
    truth = multiclass_calibration_error(torch.tensor(said), torch.tensor(target), classes, n_bins=15, norm="l1")
    assert error == pytest.approx(float(truth), rel=1e-5) and counts.sum() == rows
    whole = confusion_matrix(target, said.argmax(1), labels=range(classes))
    pairs = scored_page.confused(target, said.argmax(1), classes).tolist()
    assert all(whole[a, b] == count for a, b, count in pairs) and sum(
        count for *_, count in pairs
    ) == whole.sum() - np.trace(whole)
    assert [count for *_, count in pairs] == sorted((count for *_, count in pairs), reverse=True)
    table = scored_page.by_class(target, said.argmax(1), classes)
    for column, score in ((1, recall_score), (3, precision_score)):
        truth = score(target, said.argmax(1), labels=range(classes), average=None, zero_division=np.nan)
        assert np.allclose(table[:, column], truth, equal_nan=True)


def test_a_certain_answer_falls_into_the_last_bin():
    counts, confidence, right, error = scored_page.calibration(
        np.array([1.0, 1.0, 0.0]), np.array([True, False, False])
    )
    assert counts[-1] == 2 and counts[0] == 1 and error == pytest.approx(2 / 3 * 0.5)


def test_residuals_by_tenths_are_those_of_pandas():
    rng = np.random.default_rng(0)
    target, residual = rng.normal(size=1000), rng.normal(size=1000)
    groups = pd.Series(residual).groupby(pd.qcut(target, 10, labels=False))
    tenths = scored_page.deciles(target, residual)
    assert [each["count"] for each in tenths] == list(groups.count()) and np.allclose(
        [each["mean"] for each in tenths], groups.mean()
    )
    assert np.allclose([each["q90"] for each in tenths], groups.quantile(0.9))
    assert len(scored_page.deciles(target[:4], residual[:4])) == 4


@pytest.mark.parametrize("name", ["predictions.csv", "oof.csv"])
def test_regression(tmp_path, name):
    rng = np.random.default_rng(1)
    target = rng.uniform(1, 100, 200).round(2)
    table = pd.DataFrame(
        {
            "Id": [f"{k:03}" for k in range(200)],
            "fold": 0,
            "target": target,
            "prediction": target + rng.normal(0, 5, 200),
        }
    )
    folder = folder_of(tmp_path / "run", table, name, metric="val/rmse", best=5.0)
    if name == "oof.csv":  # beside predictions for rows whose targets nobody here knows
        table[["Id", "prediction"]].to_csv(folder / "predictions.csv", index=False)
    run_page.make(folder, spec_of("regression", ["Paw<b>"]), "finished")
    page = Page(folder / "report.html")
    page.harmless()
    error = table["prediction"] - target
    assert page.ids["regression"].all("p")[1].values() == pytest.approx([(error**2).mean() ** 0.5, error.abs().mean()])
    worst = error.abs().sort_values(ascending=False, kind="stable").index[:32]
    shown = [cells[0].values() for _, cells in page.table("unseen")]
    assert np.allclose(shown, table.loc[worst, ["target", "prediction"]])
    means = error.groupby(pd.qcut(target, 10, labels=False)).mean()
    assert [cells[2].values()[0] for _, cells in page.table("deciles")] == pytest.approx(list(means))
    assert max(path.attributes["d"].count("M") for path in page.ids["regression"].all("path")) == 200
    clouds = [drawing.scatter("", target[:count], target[:count]).svg() for count in (100, 101)]
    assert ['stroke-width="5"' in cloud for cloud in clouds] == [True, False]  # few points are larger


def test_several_targets_of_a_regression(tmp_path):
    rng = np.random.default_rng(2)
    table = pd.DataFrame(
        {"Id": range(60)}
        | {f"{kind}_{name}": rng.normal(size=60) for kind in ("target", "prediction") for name in "ab"}
    )
    folder = folder_of(tmp_path / "run", table, "oof.csv")
    run_page.make(folder, spec_of("regression", ["a", "b"]), "finished")
    page = Page(folder / "report.html")
    squares = [((table[f"prediction_{name}"] - table[f"target_{name}"]) ** 2).mean() ** 0.5 for name in "ab"]
    told = [node.values()[0] for node in page.ids["regression"].all("p") if "Root mean" in node.text()]
    assert told == pytest.approx(squares) and len(page.ids["regression"].all("svg")) == 4


def test_multilabel(tmp_path):
    rng = np.random.default_rng(3)
    names, said = ["Action", "Eyes", "Blur", "Never"], rng.random((300, 4))
    there = (rng.random((300, 4)) < said) & [True, True, True, False]
    table = pd.DataFrame(
        {"Id": range(300)}
        | {f"target_{name}": there[:, k].astype(int) for k, name in enumerate(names)}
        | {f"prediction_{name}": said[:, k] for k, name in enumerate(names)}
    )
    folder = folder_of(tmp_path / "run", table)
    run_page.make(folder, spec_of("multilabel", names), "finished")
    page = Page(folder / "report.html")
    page.harmless()
    truth = multilabel_average_precision(torch.tensor(said), torch.tensor(there).long(), 4, average=None)[:3].tolist()
    told = {name: cells[0].values()[0] for name, cells in page.table("labels")}
    assert told == pytest.approx(dict(zip(names, truth)), rel=1e-5) and page.ids["map"].values() == [
        pytest.approx(np.mean(truth), rel=1e-5)
    ]
    counts = {name: [int(cell.values()[0]) for cell in cells[1:]] for name, cells in page.table("labels")}
    assert counts["Eyes"] == [there[:, 1].sum(), (said[:, 1] > 0.5).sum()]
    entropy = torch.nn.functional.binary_cross_entropy(
        torch.tensor(said), torch.tensor(there).double(), reduction="none"
    )
    order = entropy.mean(1).argsort(descending=True)
    captions = [cells[0] for _, cells in page.table("unseen")]
    first = [name for k, name in enumerate(names) if (said[order[0], k] > 0.5) != there[order[0], k]]
    assert sum(name in captions[0].text() for name in first) >= min(2, len(first)) > 0 and len(captions) == 32


def test_pictures_are_kept_unless_the_run_begins_anew(tmp_path):
    folder, spec = folder_of(tmp_path / "run", None), spec_of("classification", ["a", "b"])

    def after(value, step):
        seen = (
            None
            if value is None
            else FirstImages(
                np.full((2, 8, 8, 3), value, np.uint8), np.array([[1.0, 0.0], [0.25, 0.75]]), np.arange(2), step
            )
        )
        run_page.make(folder, spec, "training", seen=seen)
        page = Page(folder / "report.html")
        return (
            page.pictures("seen")[0][0, 0, 0],
            page.ids["seen"].all("p")[0].text(),
            [each.text() for each in page.ids["seen"].all("figcaption")],
        )

    value, words, captions = after(1, 9)  # --resume of another run's state
    assert value == 1 and "after 9 steps" in words and captions == ["a", "b 75.00 %a 25.00 %"]
    assert after(2, 12)[0] == after(None, 12)[0] == 1
    assert after(3, 0)[0] == 3
    (folder / "report.html").write_text("half a page, cut off by a full disk somewhere in its head")
    assert after(4, 12)[0] == 4


def test_folds(tmp_path):
    folder = folder_of(
        tmp_path / "run",
        None,
        metric="oof/rmse",
        fold_scores=[17.5, None, 18.25],
        overall=17.875,
        ci_low=17.1,
        ci_high=18.6,
    )
    run_page.make(folder, spec_of("regression", ["Pawpularity"]), "finished")
    page = Page(folder / "report.html")
    rows = {name: cells[0] for name, cells in page.table("folds")}
    assert (
        rows["fold 0"].values() == [17.5]
        and rows["fold 1"].text() == "not trained"
        and rows["fold 2"].values() == [18.25]
    )
    assert page.ids["overall"].values() == [17.875] == page.facts["best oof/rmse"].values()
    assert rows["its 95 % interval"].values() == [17.1, 18.6] and len(page.ids["folds"].all("circle")) == 2


def test_ids_and_classes_that_look_like_numbers_or_nothing(tmp_path):
    table = pd.DataFrame(
        {
            "Id": ["007", "08", "NA", "9"],
            "target": ["NA", "1", "NA", "1"],
            "prediction_1": [0.9, 0.8, np.nan, 0.6],
            "prediction_NA": [0.1, 0.2, 0.5, 0.4],
        }
    )
    folder = folder_of(tmp_path / "run", table)
    run_page.make(folder, spec_of("classification", ["1", "NA"]), "finished")
    page = Page(folder / "report.html")
    assert [(name, "NA" in cells[0].text()) for name, cells in page.table("unseen")] == [("007", True)]
    assert "1 rows of predictions.csv have no prediction" in page.source


def test_without_an_error_it_says_so(tmp_path):
    folder = folder_of(
        tmp_path / "run",
        pd.DataFrame({"Id": [1, 2], "target": ["a", "b"], "prediction_a": [0.9, 0.2], "prediction_b": [0.1, 0.8]}),
    )
    run_page.make(folder, spec_of("classification", ["a", "b"]), "finished")
    page = Page(folder / "report.html")
    assert (
        "All 2 rows" in page.ids["worst"].text()
        and "confusion" not in page.ids
        and page.ids["ece"].values() == [pytest.approx(0.15)]
    )


def test_a_thousand_classes_a_long_history_and_large_pictures_stay_small(tmp_path):
    rng = np.random.default_rng(4)
    names = [f"class number {k} with a name that does not end, and goes on, and on" for k in range(1000)]
    told = rng.integers(1000, size=(5000, 2))
    table = pd.DataFrame(
        {
            "Id": range(5000),
            "target": [names[k] for k in told[:, 0]],
            "prediction": [names[k] for k in told[:, 1]],
            "probability": rng.random(5000),
        }
    )
    steps = np.arange(20_000)
    rows = {
        "epoch": steps // 100,
        "step": steps,
        "train/loss": 1 / (1 + steps),
        "val/acc1": np.where(steps % 100 == 99, steps / 20_000, np.nan),
        **{f"optim/{k}": rng.random(20_000) for k in range(30)},
        "lr": 1e-3,
        "perf/images_per_sec": 1e3,
    }
    folder = folder_of(tmp_path / "run", table, rows=rows, metric="val/acc1", best=0.5)
    seen = FirstImages(
        rng.integers(256, size=(32, 512, 512, 3), dtype=np.uint8), rng.integers(1000, size=32), np.arange(32), 0
    )
    run_page.make(folder, spec_of("classification", names), "finished", seen=seen)
    page = Page(folder / "report.html")
    assert len(page.source) < 1_500_000
    assert len(page.table("pairs")) == len(page.table("classes")) == 20 and not page.root.all("table", "matrix")
    assert len(page.ids["others"].all("svg")) == 16 and 200 < max(curves(page.root)) <= 300
    assert len(page.table("history")) == 40 and page.table("history")[-1][0] == "200"
    wrong = table[table["target"] != table["prediction"]].sort_values("probability", ascending=False)["probability"][
        :32
    ]
    assert [cells[0].values()[-1] for _, cells in page.table("unseen")] == pytest.approx(list(wrong), rel=1e-6)
    assert len(page.ids["seen"].all("img")) == 32


def test_where_a_steps_time_goes_once_it_is_measured(tmp_path):
    rows = [
        {
            "epoch": 0,
            "step": k,
            "train/loss": 1.0,
            "perf/images_per_sec": 100 + k,
            "perf/data_wait_share": 0.25,
            "perf/step_seconds": 0.5 + k,
            "perf/tflops_per_device": 7.0 * k,
            "perf/mfu": 0.1 * k,
        }
        for k in (1, 2, 3)
    ]
    folder = folder_of(tmp_path / "run", None, rows=rows)
    run_page.make(folder, spec_of("classification", ["a", "b"]), "training")
    page = Page(folder / "report.html")
    assert (
        page.ids["time"].values()[:5] == [102, 2.5, 14, 0.2, 0.25]
        and len(page.ids["time"].all("svg")) == 3
        and page.root.all("div", "split")
    )
    assert len(page.ids["others"].all("svg")) == 2


@pytest.mark.parametrize(
    "values", [[0.0, 1.0], [3e-7, 4e-7], [5.0, 5.0], [0.0, 0.0], [-1e9, 1e9], [0.9931, 0.9947], [1e6, 1e6 + 1]]
)
@pytest.mark.parametrize("percent", [False, True])
def test_ticks_are_round_few_and_inside(values, percent):
    low, high = drawing.span(values)
    places, words = zip(*drawing.ticks(low, high, percent))
    assert 2 <= len(places) <= 7 and low <= places[0] + 1e-12 * abs(low) and places[-1] <= high + 1e-12 * abs(high)
    assert len({*words}) == len(words) and max(map(len, words)) <= 15
    read = [float(word.rstrip(" %kM")) * (1e-2 if percent else {"k": 1e3, "M": 1e6}.get(word[-1], 1)) for word in words]
    assert read == pytest.approx(places, rel=1e-9, abs=1e-12)


def test_what_is_not_finite_is_left_out_of_curves():
    points = [(1, 2.0), (2, float("nan")), (3, float("inf")), (4, 1.0)]
    drawn = drawing.curves("loss", {"train/loss": ("train", points)}).svg()
    assert drawn.count("<circle") == 2 and "nan" not in drawn and "inf" not in drawn
    assert drawing.curves("loss", {"train/loss": ("train", [(1, float("nan"))])}) is None
