"""W&B: never asks, never blocks, falls back to offline; one run over a kill and a resume."""
import pytest
from wandb_stub import WandbStub

from lightning_modules import tracking

LINE = "--recipe demo --epochs 2 --global_batch_size 256 --name tracked --val_fraction 0.2"


@pytest.fixture
def clean(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DISABLED", "WANDB_BASE_URL", "NETRC", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


def test_mode_is_online_only_with_a_key(clean, tmp_path):
    with pytest.warns(UserWarning, match="no W&B key"):
        assert tracking.wandb_mode() == "offline"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password 0123\n")
    assert tracking.wandb_mode() == "online"
    clean.setenv("WANDB_BASE_URL", "http://elsewhere:1")
    assert not tracking.has_credentials()
    clean.setenv("WANDB_API_KEY", "0" * 40)
    assert tracking.wandb_mode() == "online"
    clean.setenv("WANDB_MODE", "dryrun")
    assert tracking.wandb_mode() == "offline"
    clean.setenv("WANDB_DISABLED", "true")
    assert tracking.wandb_mode() == "disabled"


def test_a_killed_and_resumed_run_is_one_finished_run_on_the_server(launch):
    with WandbStub() as server:
        assert launch(LINE, env=server.env, kill_at_step=6).code == -9
        ended = launch(LINE, env=server.env)
        assert ended.code == 0, ended.out
        assert not server.unknown and len(server.runs) == 1
        ((name, run),) = server.runs.items()
        history = [row for row in server.history(name) if "val/acc1" in row]
    epochs = [row["epoch"] for row in history]  # the kill may take the last two seconds before it from the server, never a row twice
    assert epochs in ([0, 1], [1]) and run["exitcode"] == 0


def test_a_server_that_refuses_costs_no_run(launch, tmp_path):
    with WandbStub() as server:
        server.fail_with = 401
        ended = launch(LINE, env=server.env)
    assert ended.code == 0 and "logging offline" in ended.out, ended.out
    assert list((tmp_path / "runs" / "tracked" / "wandb").glob("offline-run-*")) and (tmp_path / "runs" / "tracked" / "result.json").is_file()
    for file in (tmp_path / "runs").rglob("*"):
        assert not file.is_file() or b"0" * 40 not in file.read_bytes(), f"the key is in {file}"
