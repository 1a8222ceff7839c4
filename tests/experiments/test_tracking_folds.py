"""W&B of a run over all folds: a run for each in the parent's group, and one for what they say together."""

import pytest
from conftest import result_of
from fold_processes import quick
from test_fold_runs import LINE, comp  # noqa: F401 (the fixture)
from wandb_stub import WandbStub

from experiments.comparison import records, wandb_records
from experiments.processes import pool

FOLDS = f"{LINE.replace('--logger csv', '--logger wandb')} --epochs 1 --folds 2 --name all --logger_args.tags x"


def test_folds_are_a_group_and_their_merge_is_one_run(comp, launch, monkeypatch):  # noqa: F811
    folder = comp / "runs" / "all"
    with WandbStub() as server:
        agent = {"WANDB_SWEEP_ID": "sw1", "WANDB_RUN_ID": "trial7", "WANDB_PROJECT": "pets", "WANDB_SILENT": "false"}
        ended = launch(FOLDS, env={**server.env, **agent}, before=quick)
        assert ended.code == 0 and "Ignoring" not in ended.out, ended.out
        runs = {run["displayName"]: run for run in server.runs.values()}
        assert sorted(runs) == ["all", "all-f0", "all-f1"] and len(server.runs) == 3 and not server.unknown
        for name, run in runs.items():
            config = {key: value["value"] for key, value in run["config"].items()}
            fold = {"all": None, "all-f0": 0, "all-f1": 1}[name]
            assert (run["group"], run["state"], run["tags"]) == ("all", "finished", ["x"])
            assert (config["fold"], config["folds"], config["seed"]) == (fold, 2, 0)
        assert {run["project"] for run in runs.values()} == {"pets"} and runs["all"]["jobType"] == "folds"
        assert (runs["all"]["name"], runs["all"]["sweep"]) == ("trial7", "sw1")
        assert runs["all-f0"]["sweep"] is None and (folder / "wandb" / "run_id.txt").read_text() == "trial7"
        result = result_of(folder)
        assert all(runs["all"]["summary"][key] == value for key, value in result.items() if value is not None)

        (folder / "result.json").unlink()  # merged again
        ended = launch(FOLDS, env=server.env, before=quick)
        assert ended.code == 0 and len(server.runs) == 3 and server.runs["trial7"]["resumed"] == 1, ended.out
        for key, value in server.env.items():
            monkeypatch.setenv(key, value)
        online = records._gathered(wandb_records.online("stub/pets"))
    (of_folder,) = records.find([str(folder)])
    (offline,) = records.find(
        [str(place) for place in (folder / "wandb", *(folder / f"fold{k}" / "wandb" for k in range(2)))]
    )
    (online,) = online
    for found in (online, offline):
        assert found.name == "all" and found.best == of_folder.best == result["overall"] and found.state == "finished"
        assert [fold.best for fold in found.folds] == [fold.best for fold in of_folder.folds]
        assert found.result == {key: value for key, value in result_of(folder).items() if value is not None}


@pytest.mark.slow
def test_a_merge_without_a_server_is_a_merge(comp, launch):  # noqa: F811
    assert (
        launch(
            FOLDS.replace("--logger wandb --", "--logger csv --").replace("--logger_args.tags x", ""), before=quick
        ).code
        == 0
    )
    (comp / "runs" / "all" / "result.json").unlink()
    (comp / "runs" / "all" / "wandb").write_text("a file in the way")
    ended = launch(FOLDS, before=quick)
    assert ended.code == 0 and "no run over all folds" in ended.out and result_of(comp / "runs" / "all")["finished"], (
        ended.out
    )


def test_a_fold_is_no_trial_of_an_agent(monkeypatch):
    for variable in ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_NAME", "WANDB_PROJECT"):
        monkeypatch.setenv(variable, "x")
    monkeypatch.setattr(pool.subprocess, "Popen", lambda argv, env, **_: env)
    assert {key for key in pool.start([], {}, None) if key.startswith("WANDB_") and key in pool.OF_ONE_RUN} == set()
    assert pool.start([], {"TOLD": "1"}, None)["WANDB_PROJECT"] == "x"
