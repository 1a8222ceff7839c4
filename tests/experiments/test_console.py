"""The console command of an installed copy, what it records of itself, and packages of other people that hide ours."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments import __main__ as console
from experiments.cli.errors import invocation
from experiments.running import run_directory

ROOT = Path(__file__).parents[2]


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
