"""W&B, the real client against a server here: one run a directory over kills, resumes and ranks; its states; nothing of
it costs a run."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import free_port, result_of
from safetensors.torch import load_file
from wandb_stub import WandbStub

from experiments.cli import checks
from experiments.comparison import records
from experiments.config import parse
from lightning_modules.loggers import wandb_local, wandb_logger
from lightning_modules.loggers.csv_logger import read_history

LINE = (
    "--recipe demo --model_args.depth 2 --model_args.embed_dim 32 --epochs 2 --global_batch_size 256 --val_fraction "
    "0.2 --log_every_steps 2 "
    "--name tracked"
)
ROOT = Path(__file__).parents[2]


def hurry() -> None:
    """For `launch(..., before=hurry)`: little patience with a server."""
    wandb_logger.INIT_SECONDS, wandb_logger.ASK_SECONDS = 2, 2


def at_step(step: int, act) -> None:
    """For `launch(..., before=partial(at_step, 5, crash))`: act once, in the first training pass after so many
    optimizer steps."""
    from lightning_modules.task import Task

    hurry()
    original, waiting = Task.training_step, [act]

    def training_step(self, batch, batch_idx):
        if self.global_step >= step and waiting:
            waiting.pop()()
        return original(self, batch, batch_idx)

    Task.training_step = training_step


def crash() -> None:
    raise RuntimeError("what a bug does")


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def kill_service() -> None:
    """Kill wandb-core, the process that holds all of W&B."""
    (service,) = [
        place.name for place in Path("/proc").glob("[0-9]*") if _parent_and_name(place) == (os.getpid(), "wandb-core")
    ]
    os.kill(int(service), signal.SIGKILL)


def _parent_and_name(place: Path) -> tuple[int, str]:
    try:
        text = (place / "stat").read_text()
    except OSError:
        return 0, ""
    return int(text.rsplit(")", 1)[1].split()[1]), text[text.index("(") + 1 : text.rindex(")")]


def by_step(rows: list[dict], name: str) -> dict[int, dict[str, float]]:
    """Numbers of each step. Pictures and tables have rows of their own."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        found.setdefault(int(row[name]), {}).update(
            {key: value for key, value in row.items() if isinstance(value, int | float)}
        )
    return found


def assert_as_in_metrics_csv(rows: list[dict], folder: Path) -> None:
    name = wandb_local.STEP if wandb_local.STEP in rows[0] else "step"
    found, written = by_step(rows, name), by_step(read_history(folder / "metrics.csv"), "step")
    trained = [row[name] for row in rows if "train/loss" in row]
    assert sorted(found) == sorted(written) == sorted(trained) and len(written) >= 4  # each step once
    for step, row in written.items():
        assert row.keys() - {"step"} <= found[step].keys()
        row = {
            key: value for key, value in row.items() if key != "step" and not key.startswith("perf/")
        }  # a step done twice took other times
        assert {key: found[step].get(key) for key in row} == pytest.approx(row, rel=1e-9)  # metrics.csv has ten digits


def sync(folder: Path, server: WandbStub) -> None:
    """`wandb sync` of all that lies in a run directory."""
    parts = sorted(map(str, (folder / "wandb").glob("*run-*")))
    ended = subprocess.run(
        [Path(sys.executable).with_name("wandb"), "sync", "--yes", "--include-online", *parts],
        env={**os.environ, **server.env},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def assert_no_key(folder: Path) -> None:
    for file in folder.rglob("*"):
        assert not file.is_file() or b"0" * 40 not in file.read_bytes(), f"the key is in {file}"


@pytest.fixture
def clean(monkeypatch, tmp_path):
    for name in (
        "WANDB_MODE",
        "WANDB_API_KEY",
        "WANDB_DISABLED",
        "WANDB_BASE_URL",
        "NETRC",
        "WANDB_IDENTITY_TOKEN_FILE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
    return monkeypatch


def test_mode_is_online_only_with_a_key(clean, tmp_path, capsys):
    assert wandb_logger.wandb_mode() == "offline" and capsys.readouterr().out.startswith("no W&B key")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password 0123\n")
    assert wandb_logger.wandb_mode() == "online"
    clean.setenv("WANDB_BASE_URL", "http://elsewhere:1")
    assert not wandb_local.has_credentials()
    clean.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_logger.wandb_mode() == "online"
    clean.setenv("WANDB_MODE", "dryrun")
    assert wandb_logger.wandb_mode() == "offline"
    clean.setenv("WANDB_DISABLED", "true")
    assert wandb_logger.wandb_mode() == "disabled"


@pytest.mark.parametrize(
    "line, words",
    [
        ("--logger_args.tags a,,b", "the tag ''"),
        (f"--logger_args.tags {'x' * 65}", "65 characters"),
        ("--logger_args.tags a --logger csv", "--logger_args.tags goes to W&B"),
        ("--logger_args.notes a --logger tensorboard", "--logger_args.notes goes to W&B"),
        ("--logger_args.chekpoint true", "did you mean checkpoint?"),
        ("--logger_args.checkpoint 1", "checkpoint 1 is not bool"),
        ("--logger_args.attention 1", "attention 1 is not bool"),
        ("--logger_args.checkpoint true --logger none", "--logger_args.checkpoint goes to W&B"),
        ("--logger_args.checkpoint true --eval_only --init runs/one", "--eval_only trains nothing"),
    ],
)
def test_what_no_tracker_would_keep_is_refused(capsys, line, words):
    with pytest.raises(SystemExit) as stop:
        parse(["--recipe", "demo", *line.split()])
    assert stop.value.code == 2 and words in capsys.readouterr().err
    parse(
        ["--recipe", "demo", "--logger", "csv", "--logger_args.checkpoint", "false", "--logger_args.attention", "true"]
    )


def test_tags_are_stripped_and_each_is_there_once():
    assert checks.tags(" a, b c ,a") == ["a", "b c"] and checks.tags(None) is None


def test_the_id_is_the_directorys_and_an_agents_wins(clean, tmp_path):
    for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID"):
        clean.delenv(name, raising=False)
    first = wandb_logger.persistent_id(tmp_path)
    clean.setenv("WANDB_RUN_ID", "shell")  # a person's, perhaps of another run
    assert wandb_logger.persistent_id(tmp_path) == first
    clean.setenv("WANDB_SWEEP_ID", "sw1")
    assert wandb_logger.persistent_id(tmp_path) == "shell"
    clean.delenv("WANDB_SWEEP_ID")
    assert wandb_logger.persistent_id(tmp_path) == "shell"  # the trial, resumed by hand


def test_each_run_keeps_pictures_in_its_own_directory_unless_told(clean, tmp_path):
    clean.setenv("WANDB_MODE", "offline")
    for told in (str(tmp_path / "wandb-data"), ""):
        clean.setenv("WANDB_DATA_DIR", told)
        for name in ("one", "two"):
            wandb_logger.SafeWandbLogger(tmp_path / name, config={})
            assert os.environ["WANDB_DATA_DIR"] == (told or str(tmp_path / name / "wandb" / "data"))


def test_neither_lightning_nor_torch_is_imported_to_look_for_a_key(tmp_path):
    code = (
        "import sys; from experiments.comparison import wandb_records; print(sorted({'torch', 'lightning', 'wandb'} & "
        "{*sys.modules}))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def test_killed_and_resumed_it_is_one_run_with_all_rows_and_the_weights(launch, tmp_path):
    folder = tmp_path / "runs" / "tracked"
    with WandbStub() as server:
        assert (
            launch(f"{LINE} --logger_args.tags a,b --logger_args.notes first", env=server.env, kill_at_step=6).code
            == -9
        )
        line = f"{LINE} --logger_args.notes second --logger_args.checkpoint true"
        ended = launch(line + " --logger_args.tags b,ü,b", env=server.env)
        assert ended.code == 0, ended.out
        assert not server.unknown and len(server.runs) == 1
        ((name, run),) = server.runs.items()
        assert_as_in_metrics_csv(server.history(name), folder)
        before = len(server.requests)
        again = launch(line, env=server.env)
        assert again.code == 0 and "already finished" in again.out and len(server.requests) == before
    result = result_of(folder)
    assert (run["state"], run["tags"], run["notes"], run["displayName"], run["project"]) == (
        "finished",
        ["b", "ü"],
        "second",
        "tracked",
        "vitlab",
    )
    assert all(run["summary"][key] == value for key, value in result.items() if value is not None)
    config = {key: value["value"] for key, value in run["config"].items() if not key.startswith("_")}
    assert (
        config["model"] == "vit_nano4"
        and config["model_args"]["depth"] == 2
        and config["seed"] == 0
        and config["params"] == result["params"]
    )
    (artifact,) = [
        each for each in server.artifacts if each["artifactTypeName"] != "run_table"
    ]  # tables are artifacts too
    assert artifact["artifactTypeName"] == "model" and {each["alias"] for each in artifact["aliases"]} == {
        "best",
        "latest",
    }
    assert json.loads(artifact["metadata"])["best"] == result["best"]
    best, uploaded = (
        torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True),
        load_file(folder / "model.safetensors"),
    )
    assert uploaded.keys() == {key.removeprefix("model.") for key in best["state_dict"]}
    assert all(torch.equal(uploaded[key.removeprefix("model.")], value) for key, value in best["state_dict"].items())
    uploads = [body for (_, name), body in server.storage.items() if name == "model.safetensors"]
    assert uploads == [(folder / "model.safetensors").read_bytes()]
    size = (folder / "model.safetensors").stat().st_size
    assert not [
        file
        for file in tmp_path.rglob("*")
        if file.is_file() and file.stat().st_size == size and file.name != "model.safetensors"
    ]
    assert_no_key(folder)


def test_an_offline_run_killed_and_resumed_is_read_back_and_synced_whole(launch, tmp_path):
    folder = tmp_path / "runs" / "tracked"
    for step in (2, 4, 6):  # before any checkpoint; the moment after an epoch's row and its checkpoint; steps after one
        assert launch(LINE, kill_at_step=step).code == -9
    ended = launch(LINE, env={"WANDB_DATA_DIR": ""})
    assert ended.code == 0 and "resumed" in ended.out, ended.out
    (read,) = records.find([str(folder / "wandb")])
    assert read.state == "finished"
    assert_as_in_metrics_csv(read.history, folder)
    with WandbStub() as server:
        sync(folder, server)
        ((name, run),) = server.runs.items()
        assert name == (folder / "wandb" / "run_id.txt").read_text() and run["state"] == "finished"
        assert_as_in_metrics_csv(server.history(name), folder)
    pictures = [
        file.read_bytes() for file in (folder / "wandb" / "data").rglob("*") if file.is_file()
    ]  # of a table, kept until it is uploaded
    assert pictures and {body for (_, file), body in server.storage.items() if file.endswith(".jpg")} <= {*pictures}
    assert sum(file.endswith(".jpg") for _, file in server.storage) == 32
    assert any(file.startswith("media/images/best/confusion") for file in run["files"])


@pytest.mark.slow
def test_a_finished_run_is_told_to_the_sweeps_run_that_asks_for_it_again(launch, tmp_path):
    folder = tmp_path / "runs" / "tracked"
    with WandbStub() as server:
        for name in ("aaaa1111", "bbbb2222", "bbbb2222"):
            ended = launch(LINE, env={**server.env, "WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": name})
            assert ended.code == 0, ended.out
        assert "already finished" in ended.out and server.runs.keys() == {"aaaa1111", "bbbb2222"}
        for name, run in server.runs.items():
            assert_as_in_metrics_csv(server.history(name), folder)
            assert run["state"] == "finished" and run["summary"]["best"] == result_of(folder)["best"]
    assert (folder / "wandb" / "run_id.txt").read_text() == "aaaa1111"
    assert launch(LINE, env={"WANDB_SWEEP_ID": "s2", "WANDB_RUN_ID": "cccc3333"}).code == 0
    (file,) = (folder / "wandb").glob("offline-run-*-cccc3333/*.wandb")
    told = wandb_local.read(file)
    assert_as_in_metrics_csv(told["rows"], folder)
    assert told["exit_code"] == 0 and told["summary"]["best"] == result_of(folder)["best"]


def test_two_ranks_are_one_run_and_the_environment_is_heard(launch, tmp_path):
    said = {
        "WANDB_NAME": "named",
        "WANDB_TAGS": "x,y",
        "WANDB_RUN_GROUP": "these",
        "WANDB_NOTES": "why",
        "WANDB_PROJECT": "pets",
        "WANDB_ENTITY": "us",
    }
    with WandbStub() as server:
        ended = launch(f"{LINE} --devices 2 --accelerator cpu", ranks=2, env={**server.env, **said})
        assert ended.code == 0, ended.outs
        ((name, run),) = server.runs.items()
        assert_as_in_metrics_csv(server.history(name), tmp_path / "runs" / "tracked")
    assert run["state"] == "finished" and run["summary"]["world_size"] == 2 and run["upserts"] <= 3
    assert [run[key] for key in ("displayName", "tags", "group", "notes", "project", "entity")] == [
        "named",
        ["x", "y"],
        "these",
        "why",
        "pets",
        "us",
    ]


@pytest.mark.slow
def test_two_ranks_of_lightnings_launcher_are_one_run(tmp_path):
    with WandbStub() as server:
        place = {
            "WANDB_DATA_DIR": str(tmp_path / "data"),
            "WANDB_CACHE_DIR": str(tmp_path / "cache"),
            "PYTHONPATH": str(ROOT),
        }
        ended = subprocess.run(
            [
                sys.executable,
                str(ROOT / "experiments" / "run.py"),
                *LINE.split(),
                "--devices",
                "2",
                "--accelerator",
                "cpu",
            ],
            env={**os.environ, **server.env, **place},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        ((name, run),) = server.runs.items()
        assert_as_in_metrics_csv(server.history(name), tmp_path / "runs" / "tracked")
    assert run["state"] == "finished" and run["summary"]["world_size"] == 2


@pytest.mark.slow
def test_an_outage_in_mid_run_costs_nothing_that_sync_does_not_bring_back(launch, tmp_path):
    folder = tmp_path / "runs" / "tracked"

    def cut_off(_) -> None:
        deadline = time.monotonic() + 60
        while len(read_history(folder / "metrics.csv")) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        server.fail_with = 503

    with WandbStub() as server:
        ended = launch(f"{LINE} --logger_args.checkpoint true", env=server.env, before=hurry, watch=cut_off)
        assert (
            ended.code == 0
            and result_of(folder)["finished"]
            and time.time() - (folder / "result.json").stat().st_mtime < 15
        ), ended.out
        assert ended.out.count("W&B does not answer any more") == 1 and "wandb sync --include-online" in ended.out, (
            ended.out
        )
        ((name, run),) = server.runs.items()
        assert len(server.history(name)) < 4 and run["state"] == "running"
        server.fail_with = None
        sync(folder, server)
        assert_as_in_metrics_csv(server.history(name), folder)
        assert server.runs.keys() == {name} and server.runs[name]["state"] == "finished"
        assert any(file.startswith("media/images/best/confusion") for file in run["files"])


@pytest.mark.parametrize("answer", [401, None, *(pytest.param(code, marks=pytest.mark.slow) for code in (403, 503))])
def test_a_server_that_refuses_costs_no_run(launch, tmp_path, answer):
    with WandbStub() as server:
        server.fail_with = answer
        env = server.env if answer else {**server.env, "WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}"}
        ended = launch(f"{LINE} --epochs 1", env=env, before=hurry)
    folder = tmp_path / "runs" / "tracked"
    assert ended.code == 0 and "logging offline" in ended.out and result_of(folder)["finished"], ended.out
    assert list((folder / "wandb").glob("offline-run-*"))
    assert_no_key(folder)


@pytest.mark.slow
def test_the_state_tells_how_a_run_ended(launch, tmp_path):
    with WandbStub() as server:
        failed = launch(f"{LINE} --name failed", env=server.env, before=partial(at_step, 5, crash))
        assert failed.code == 1 and "what a bug does" in failed.out, failed.out
        ((name, run),) = server.runs.items()
        assert (run["state"], run["exitcode"], run["preempting"]) == ("failed", 1, False)
        stopped = launch(
            f"{LINE} --name failed --overwrite", env=server.env, before=partial(at_step, 5, terminate)
        )  # a new run, there as here
        assert stopped.code == 75, stopped.out
        (other,) = server.runs.keys() - {name}
        assert (server.runs[other]["state"], server.runs[other]["exitcode"]) == ("preempted", 75)
        assert launch(f"{LINE} --name failed", env=server.env).code == 0
        assert {each["state"] for each in (run, server.runs[other])} == {"failed", "finished"} and len(server.runs) == 2
        assert_as_in_metrics_csv(server.history(other), tmp_path / "runs" / "failed")


@pytest.mark.slow
def test_a_service_killed_in_mid_run_costs_a_warning(launch, tmp_path):
    ended = launch(LINE, before=partial(at_step, 3, kill_service))
    folder = tmp_path / "runs" / "tracked"
    assert ended.code == 0 and len(read_history(folder / "metrics.csv")) == 4 and result_of(folder)["finished"], (
        ended.out
    )
    assert (
        ended.out.count("\nwarning: W&B takes nothing") == 1
        and "Traceback" not in ended.out
        and "Warning" not in ended.out
    ), ended.out


def test_a_service_that_does_not_answer_is_not_waited_for_at_the_end(clean, tmp_path):
    clean.setenv("WANDB_MODE", "offline")
    registered = []
    clean.setattr(wandb_logger.atexit, "register", lambda *call: registered.append(call))
    for finish in (lambda exit_code: None, lambda exit_code: 1 / 0, lambda exit_code: time.sleep(5)):
        clean.setattr(wandb_logger.wandb, "finish", finish)
        clean.setattr(wandb_logger, "FINISH_SECONDS", -29.8)
        logger = wandb_logger.SafeWandbLogger(tmp_path, config={})
        logger._experiment = object()
        logger.close(3)
        logger.close(3)  # it is closed
    assert registered == [(wandb_logger._leave, 3)] * 2


@pytest.mark.parametrize("ask", [lambda timeout: 1 / 0, lambda timeout: time.sleep(5)])
def test_a_server_that_does_not_answer_is_asked_once_and_gets_no_table(clean, tmp_path, capsys, ask):
    clean.setenv("WANDB_API_KEY", "0" * 40)
    clean.setattr(wandb_logger, "ASK_SECONDS", -0.9)
    asked = []
    clean.setattr(wandb_logger.wandb, "Api", lambda timeout: asked.append(timeout) or ask(timeout))
    clean.setattr(wandb_logger.wandb, "finish", lambda exit_code: None)
    logger = wandb_logger.SafeWandbLogger(tmp_path, config={})
    logger._experiment = SimpleNamespace(id="x", log=lambda *_: 1 / 0)
    logger.log_table("one", ["a"], [[1]], step=1)
    logger.log_table("two", ["a"], [[1]], step=1)
    logger.upload(tmp_path / "none", {})
    (said,) = capsys.readouterr().err.splitlines()
    assert (
        len(asked) == 1
        and said.startswith("warning: W&B does not answer any more")
        and said.endswith("in the run directory alone")
    )


def test_weights_that_are_not_taken_cost_a_warning(clean, tmp_path, capsys):
    clean.setenv("WANDB_MODE", "offline")
    logger = wandb_logger.SafeWandbLogger(tmp_path, config={})
    logger._experiment = SimpleNamespace(id="x", log_artifact=lambda *_, **__: 1 / 0)
    weights = tmp_path / "model.safetensors"
    weights.write_text("weights")
    logger.upload(weights, {"best": 0.5})
    assert f"the weights are not there, they are in {weights}" in capsys.readouterr().err


def terminal() -> None:
    """Give this process a pseudo-terminal, as a person has one; what it says there goes on into the log."""
    log, (ours, theirs) = os.dup(1), pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
    for stream in (0, 1, 2):
        os.dup2(theirs, stream)
    hurry()

    def copy() -> None:
        while True:
            os.write(log, os.read(ours, 4096))

    threading.Thread(target=copy, daemon=True).start()


def test_at_a_terminal_without_a_key_nothing_is_asked(launch, tmp_path):
    env = {"WANDB_MODE": "", "WANDB_SILENT": "false", "HOME": str(tmp_path), "TERM": "xterm"}
    ended = launch(f"{LINE} --epochs 1", env=env, before=terminal, timeout=60)
    assert (
        ended.code == 0
        and re.search("^no W&B key found", ended.out, re.MULTILINE)
        and result_of(tmp_path / "runs" / "tracked")["finished"]
    ), ended.out
    assert not re.search("enter your choice|paste|api key.*:", ended.out, re.IGNORECASE), ended.out
    assert "| 0/4 [" in ended.out and "epoch 1/1 | loss" in ended.out, (
        ended.out
    )  # a bar from the first step on, a line an epoch
