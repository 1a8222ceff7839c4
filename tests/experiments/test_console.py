"""The console command of an installed copy, what it records of itself, and packages of other people that hide ours."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from experiments import __main__ as console
from experiments.cli.errors import invocation
from experiments.running import run_directory

ROOT = Path(__file__).parents[2]
OLD = ROOT / "tests" / "fixtures" / "old_run"
ROOMS = ("models", "datamodules", "lightning_modules", "experiments")
PACKAGES = [sysconfig.get_path("purelib"), *(path for path in sys.path if path.endswith("site-packages"))]
NOT_OF_PREDICT = "lightning pytorch_lightning torchmetrics wandb jsonargparse sklearn scipy matplotlib jinja2".split()


def test_every_script_is_a_verb(capsys):
    assert 'vitlab = "experiments.__main__:main"' in (ROOT / "pyproject.toml").read_text()
    assert {"run", "predict", "submit", "compare", "prepare", "sweep", "benchmark", "visualize", "export"} <= {
        *console.verbs()
    }
    assert console.main([]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n{verb}" in listed for verb in console.verbs())
    assert console.main(["run", "--help"]) == 0
    assert "--global_batch_size" in capsys.readouterr().out


def test_a_wrong_verb_is_bad_usage(capsys):
    assert console.main(["rum", "--model", "vit_b16"]) == 2
    assert "no verb 'rum'; did you mean run?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "typed, says",
    [
        ("experiments/run.py", "python experiments/predict.py"),
        ("/x/bin/vitlab", "vitlab predict"),
        ("../lab/experiments/run.py", "python ../lab/experiments/predict.py"),
    ],
)
def test_next_lines_name_what_can_be_called(monkeypatch, typed, says):
    monkeypatch.setattr(sys, "argv", [typed])
    assert invocation("predict") == says


@pytest.mark.parametrize(
    "name, module",
    [("models", "lightning_modules"), ("models", "experiments.config"), ("datamodules", "experiments.config")],
)
@pytest.mark.parametrize("init", [True, False])
def test_a_folder_that_hides_a_package_is_named(tmp_path, name, module, init):
    (tmp_path / name).mkdir()
    if init:
        (tmp_path / name / "__init__.py").write_text("")
    program = f"import sys; sys.path.append({str(ROOT)!r}); import {module}"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    last = (done.stderr.splitlines() or [""])[-1]
    if init or done.returncode:  # a folder without __init__.py hides an editable install only
        assert (
            last.startswith("ImportError")
            and f"{tmp_path / name} is imported as {name!r}" in last
            and "start Python from another folder" in last
        )


def test_the_commit_is_not_that_of_a_repository_around_an_installed_copy(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    subprocess.run(
        [
            "git",
            "-C",
            str(tmp_path),
            "-c",
            "user.email=a@b",
            "-c",
            "user.name=a",
            "commit",
            "-q",
            "--allow-empty",
            "-m",
            "x",
        ],
        check=True,
    )
    (tmp_path / "site-packages" / "experiments").mkdir(parents=True)
    monkeypatch.setattr(
        run_directory, "__file__", str(tmp_path / "site-packages" / "experiments" / "running" / "run_directory.py")
    )
    monkeypatch.setattr(run_directory, "_metadata", {"direct_url.json": None}.get)
    assert run_directory.commit() is None
    monkeypatch.setattr(
        run_directory,
        "_metadata",
        {"direct_url.json": '{"url": "u", "vcs_info": {"vcs": "git", "commit_id": "0123456789abcdef"}}'}.get,
    )
    assert run_directory.commit() == "0123456789ab"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what git keeps of the rooms, elsewhere."""
    copy = tmp_path_factory.mktemp("checkout")
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy / file)
    return copy


def without_install(*line, path=(), cwd=None):
    """A Python that has our dependencies but no installed copy of ours: -S reads no .pth file."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, path), *PACKAGES])}
    done = subprocess.run(
        [sys.executable, "-S", *map(str, line)], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_verb_starts_from_a_checkout_that_is_not_installed(checkout, tmp_path):
    program = f"""
import runpy, sys
sys.argv, before = ["", "--help"], [*sys.path]
for verb in {[*console.verbs()]}:
    sys.path[:] = before
    for module in [name for name in sys.modules if name.split(".")[0] in {ROOMS}]:
        del sys.modules[module]
    try:
        runpy.run_path(f"{checkout}/experiments/{{verb}}.py", run_name="__main__")
    except SystemExit as end:
        print(verb, end.code, sys.modules["experiments"].__file__)
"""
    lines = without_install("-c", program, cwd=tmp_path).splitlines()
    for verb in console.verbs():
        assert f"{verb} 0 {checkout / 'experiments' / '__init__.py'}" in lines


def test_the_wheel_is_whole_and_predicts_with_few_packages(checkout, tmp_path):
    pytest.importorskip("setuptools", "70.1", reason="setuptools builds the wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), str(checkout)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("vitlab-*.whl")
    files = {str(file.relative_to(ROOT)) for room in ROOMS for file in (ROOT / room).rglob("*") if file.is_file()}
    wanted = {file for file in files if "__pycache__" not in file and not file.endswith(".md")}
    assert not wanted - {*zipfile.ZipFile(wheel).namelist()}

    target = tmp_path / "target"
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], check=True)
    assert "--global_batch_size" in without_install(target / "experiments" / "run.py", "--help", cwd=tmp_path)
    missing = tmp_path / "missing"
    missing.mkdir()
    for name in NOT_OF_PREDICT:
        (missing / f"{name}.py").write_text(f"raise ImportError('{name} is not installed')")
    words = [OLD / "finished", "--folder", OLD / "images", "--out", "out.csv", "--accelerator", "cpu"]
    without_install(target / "experiments" / "predict.py", *words, path=[missing], cwd=tmp_path)
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 17
    vitlab = target / "bin" / "vitlab"
    assert "--global_batch_size" in without_install(vitlab, "run", "--help", path=[target], cwd=tmp_path)
    assert str(target) in without_install(
        "-c", "import experiments as e; print(e.__file__)", path=[target], cwd=tmp_path
    )
