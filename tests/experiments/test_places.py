"""A run means the same from any folder: paths in config.yaml, other spellings of a place, a data folder that has
moved."""

import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from table_files import ids, write_comp
from verb import TINY

from experiments import predict, run, submit


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """work/ with a finished run of ../comp, started there."""
    root, before = tmp_path_factory.mktemp("world"), os.getcwd()
    label = {"Id": ids(20), "label": ["a", "b"] * 10}
    write_comp(root / "comp", label, {"Id": ids(4, "t")}, {"Id": ids(4, "t"), "label": "a"})
    (root / "work").mkdir()
    (root / "work" / "groups.csv").write_text(
        "Id,group\n" + "".join(f"{name},{n // 2}\n" for n, name in enumerate(ids(20)))
    )
    (root / "work" / "mine.py").write_text(
        "def share(target, prediction):\n    return float((prediction.argmax(1) == target).mean())\n"
    )
    os.chdir(root / "work")
    try:
        assert (
            run.main(
                [
                    *LINE,
                    "--data_dir",
                    "../comp",
                    "--group",
                    "groups.csv",
                    "--metric",
                    "mine.py:share",
                    "--runs_dir",
                    "../runs",
                ]
            )
            == 0
        )
    finally:
        os.chdir(before)
        os.environ.pop("VITLAB_DECISION", None)
    return root


LINE = [*TINY, "--val_fraction", "0.3"]
FROM_ABOVE = [*LINE, "--data_dir", "comp", "--group", "work/groups.csv", "--metric", "work/mine.py:share"]


@pytest.fixture(autouse=True)
def at_root(request, monkeypatch):
    monkeypatch.delenv("VITLAB_DECISION", raising=False)
    if "world" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("world"))
    yield
    os.environ.pop("VITLAB_DECISION", None)


def the_run(world: Path) -> Path:
    (folder,) = [
        each for each in (world / "runs").iterdir() if (each / "result.json").exists() and "predict" not in each.name
    ]
    return folder


def test_another_spelling_of_the_same_places_is_the_same_run(world, capsys):
    config = yaml.safe_load((the_run(world) / "config.yaml").read_text())
    assert {key: config[key] for key in ("data_dir", "group", "metric")} == {
        "data_dir": str(world / "comp"),
        "group": str(world / "work" / "groups.csv"),
        "metric": f"{world / 'work' / 'mine.py'}:share",
    }
    assert run.main(FROM_ABOVE) == 0 and "already finished" in capsys.readouterr().out
    (world / "link").symlink_to("comp")
    assert run.main([*FROM_ABOVE, "--data_dir", "link"]) == 0 and "already finished" in capsys.readouterr().out


def test_a_config_that_kept_relative_paths_is_the_same_run_too(world, capsys):
    file = the_run(world) / "config.yaml"
    text = file.read_text()
    assert f"data_dir: {world / 'comp'}" in text
    file.write_text(text.replace(f"{world}/", ""))  # as of a run that was started here
    assert run.main(FROM_ABOVE) == 0 and "already finished" in capsys.readouterr().out
    file.write_text(text.replace("bad_rows: error\n", ""))  # a knob that it did not know
    assert run.main(FROM_ABOVE) == 0 and "already finished" in capsys.readouterr().out
    file.write_text(text)


def test_predictions_and_submissions_from_another_folder_find_the_data(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert predict.main([str(the_run(world)), "--accelerator", "cpu", "--workers", "0", "--name", "p"]) == 0
    assert submit.main(["runs/p", "--as", "label"]) == 0
    write_comp(tmp_path / "other", {"Id": ids(2), "label": ["a", "b"]}, {"Id": ids(3, "u")})
    line = [str(the_run(world)), "--accelerator", "cpu", "--workers", "0", "--name", "p"]
    assert predict.main([*line, "--data_dir", "other"]) == 2
    assert (
        "runs/p holds other predictions (data_dir " in (said := capsys.readouterr().err)
        and "--name another, or --out FILE" in said
    )
    assert predict.main(line) == 0


def test_another_data_folder_or_recipe_under_the_same_name_is_refused_with_a_name(world, capsys):
    write_comp(world / "second", {"Id": ids(20), "label": ["a", "b"] * 10})
    assert run.main([*FROM_ABOVE, "--data_dir", "second"]) == 2  # the same ids and labels, and another folder
    name = the_run(world).name
    said = capsys.readouterr().err
    assert (
        f"data_dir {world / 'comp'} -> {world / 'second'}" in said
        and f"--name {name}-second, or --overwrite it" in said
    )
    assert run.main([*FROM_ABOVE, "--recipe", "demo", "--name", name]) == 2
    said = capsys.readouterr().err
    assert f"{name} is a run with other values (recipe none -> demo, " in said and f"--name {name}-demo, or" in said


def test_a_data_folder_that_has_moved_is_taken_where_it_holds_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_comp(tmp_path / "comp", {"Id": ids(20), "label": ["a", "b"] * 10})
    line = [*LINE, "--name", "one", "--save_every_steps", "1"]

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr("experiments.reporting.result.result", stop)
        run.main([*line, "--data_dir", "comp"])
    os.environ.pop("VITLAB_DECISION", None)
    assert (tmp_path / "runs/one/checkpoints/last.ckpt").is_file() and not (tmp_path / "runs/one/result.json").exists()
    (tmp_path / "comp").rename(tmp_path / "moved")
    labels = np.array(["a", "b"] * 10)
    write_comp(tmp_path / "strange", {"Id": ids(20), "label": labels[::-1]})
    assert (
        run.main([*line, "--data_dir", "strange"]) == 2
        and "the files or their classes (fingerprint" in capsys.readouterr().err
    )
    os.environ.pop("VITLAB_DECISION", None)
    assert run.main([*line, "--data_dir", "moved"]) == 0
    assert f"data folder {tmp_path / 'comp'} of runs/one is gone, and {tmp_path / 'moved'} is taken" in (
        said := capsys.readouterr().out
    )
    assert (
        "resumed from" in said
        and f"data_dir: {tmp_path / 'moved'}\n" in (tmp_path / "runs/one/config.yaml").read_text()
    )
