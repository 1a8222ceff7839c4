"""Sweeps: one file for Optuna here and for W&B's agents, trials as processes, resume, pruning, failures."""

import csv
import fcntl
import functools
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import alembic
import optuna
import pytest
import yaml
from conftest import result_of
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sweep_processes import instead_of_run, score, settings_of, unsafe
from wandb.sdk.sweeps.scheduler.optuna import sweep_parameter_to_distribution
from wandb_stub import WandbStub

import experiments
from experiments import compare, config, sweep
from experiments.cli.errors import UsageError
from experiments.processes import pool
from experiments.search import space as sweep_space
from experiments.search import trials as sweep_trials
from lightning_modules.callbacks.signals import ORDER

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "experiments" / "sweep.yaml"
TINY = {"recipe": "none", "model": "vit_nano4", "data": "digits", "epochs": 4, "logger": "csv", "accelerator": "cpu"}
START = pool.start
LOAD = functools.cache(
    alembic.util.load_python_file
)  # its scripts, which are most of the time that a study takes to open


def write(folder, name="space.yaml", fixed=None, **changes):
    """A space over lr and mixup."""
    varied = {"lr": {"distribution": "log_uniform_values", "min": 1.0e-5, "max": 1.0e-1}, "mixup": {"values": [0, 0.5]}}
    content = {
        "program": "experiments/run.py",
        "method": "random",
        "metric": {"name": "val/acc1", "goal": "maximize"},
        "parameters": {key: {"value": value} for key, value in (TINY | (fixed or {})).items()} | varied,
    } | changes
    (folder / name).write_text(
        yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False)
    )
    return folder / name


def trials_of(folder, *columns):
    with open(folder / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    if columns:
        return [tuple(row[column] for column in columns) for row in rows]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


class Acted:
    """A run.py in which each look at it is an epoch. `act` gives, for its flags, the metric's values (or whole rows)
    and how it ends."""

    act = staticmethod(lambda settings: ([score(settings, epoch) for epoch in range(int(settings["epochs"]))], 0, {}))
    started: list = []

    def __init__(self, argv, env, log):
        self.settings, self.code = settings_of(argv), None
        self.folder = Path(self.settings["runs_dir"]) / self.settings["name"]
        self.folder.mkdir(exist_ok=True)
        values, self.ends, self.says = self.act(self.settings)
        self.rows = [{"val/acc1": value} if not isinstance(value, dict) else value for value in values]
        self.started.append((self.settings, env))
        self.done, self.signals = len(rows_of(self.folder)), []
        log.write_text("line 1\nwhat went wrong\n")

    def poll(self):
        if self.code is None and self.done < len(self.rows):
            rows = rows_of(self.folder) + [{"epoch": self.done, "step": self.done + 1, **self.rows[self.done]}]
            with open(self.folder / "metrics.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, [*dict.fromkeys(key for row in rows for key in row)])
                writer.writeheader()
                writer.writerows(rows)
            self.done += 1
        elif self.code is None:
            self.code = self.ends
            if not self.ends or self.says:
                values = [row["val/acc1"] for row in self.rows if "val/acc1" in row]
                result = {
                    "metric": "val/acc1",
                    "best": max(values, default=None),
                    "params": 9,
                    "finished": not self.ends,
                } | self.says
                (self.folder / "result.json").write_text(json.dumps(result))
        return self.code

    def send_signal(self, signum):
        self.signals.append(signum)
        self.code = 75


def rows_of(folder):
    if not (folder / "metrics.csv").is_file():
        return []
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def acted(tmp_path, monkeypatch):
    """acted(act) -> the flags and environments of the trials that were started, a list that grows."""
    handlers = {
        each: signal.signal(each, signal.default_int_handler) for each in ORDER
    }  # a job in the background is born with some ignored
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pool, "POLL_SECONDS", 0)
    monkeypatch.setattr(pool, "start", Acted)
    monkeypatch.setattr(Acted, "started", [])
    monkeypatch.setattr(alembic.util, "load_python_file", LOAD)

    def acting(act=Acted.act):
        monkeypatch.setattr(Acted, "act", staticmethod(act))
        return Acted.started

    event.listen(Engine, "connect", unsafe)
    yield acting
    event.remove(Engine, "connect", unsafe)
    for each, handler in handlers.items():
        signal.signal(each, handler)


# the file


def test_the_shipped_file_is_one_that_both_take():
    space = sweep_space.read(SHIPPED)
    first = sweep_trials.Trials(space, 0).ask()
    cfg = config.parse([*sweep_space.flags(space.fixed), *sweep_space.flags(space.texts(first.params))])
    assert cfg.recipe == "demo" and cfg.data == "digits" and cfg.epochs == 20
    assert 3e-4 <= cfg.lr <= 2e-2 and 0 <= cfg.model_args["drop_path"] <= 0.3
    content = yaml.safe_load(SHIPPED.read_text())
    assert (
        content["command"] == ["${env}", "python", "${program}", "${args_no_equals}"]
        and content["early_terminate"]["type"] == "hyperband"
    )


@pytest.mark.parametrize(
    "spec",
    [
        {"min": 1, "max": 9},
        {"min": 0.0, "max": 0.5},
        {"min": 0, "max": 0.5},
        {"min": 1.0e-5, "max": 1.0e-1, "distribution": "log_uniform_values"},
        {"min": 0, "max": 3, "distribution": "uniform"},
        {"min": 2, "max": 8, "distribution": "int_uniform"},
        {"values": ["adamw", "lamb"]},
        {"values": [0.1, 0.2, 0.3], "distribution": "categorical"},
    ],
)
def test_a_parameter_is_drawn_from_where_wandbs_own_optuna_scheduler_draws_it(tmp_path, spec):
    space = sweep_space.read(write(tmp_path, parameters={"x": spec, "y": {"values": [1, 2]}}))
    trial = sweep_trials.Trials(space, 0).ask()
    theirs = sweep_parameter_to_distribution(spec)
    if isinstance(theirs, optuna.distributions.CategoricalDistribution):
        theirs = optuna.distributions.CategoricalDistribution(
            [str(value) for value in theirs.choices]
        )  # as their agent passes them on
    assert trial.distributions["x"] == theirs


@pytest.mark.parametrize(
    "low, high, q, kind",
    [
        (0, 1, 0.25, "q_uniform"),
        (1, 64, 8, "q_uniform"),
        (0.4, 3, 1, "q_uniform"),
        (1, 1000, 10, "q_log_uniform_values"),
        (0.01, 1, 0.05, "q_log_uniform_values"),
    ],
)
def test_steps_are_those_that_wandb_documents(tmp_path, low, high, q, kind):
    """docs.wandb.ai/models/sweeps/sweep-config-keys: q_uniform returns round(X / q) * q where X is uniform;
    q_log_uniform_values the same of X log-uniform."""
    (parameter, _) = sweep_space.read(
        write(
            tmp_path, parameters={"x": {"min": low, "max": high, "q": q, "distribution": kind}, "y": {"values": [1, 2]}}
        )
    ).varied
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [parameter.suggest(study.ask()) for _ in range(300)]
    assert min(drawn) >= low and max(drawn) <= high
    for value in drawn:
        assert float(parameter.text(value)) == pytest.approx(round(value / q) * q, abs=1e-9)
    steps = {float(parameter.text(value)) for value in drawn}
    assert steps == {round(step * q, 9) for step in range(round(low / q), round(high / q) + 1)} or kind != "q_uniform"
    assert not isinstance(q, int) or all(text.isdecimal() for text in map(parameter.text, drawn))


def test_words_are_those_that_wandbs_agent_would_pass(tmp_path):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    values = {
        "use_ema": True,
        "ema_decay": 0.99,
        "optimizer_args.betas": [0.9, 0.95],
        "optimizer_args.eps": 1e-8,
        "weight_decay": 0.01234567,
    }
    space = sweep_space.read(write(tmp_path, fixed=values))
    theirs = create_sweep_command_args({"args": {key: {"value": value} for key, value in (TINY | values).items()}})[
        "args_no_equals"
    ]
    ours = sweep_space.flags(space.fixed)
    assert [word.lower() for word in ours] == [word.lower() for word in theirs] and config.parse(ours) == config.parse(
        theirs
    )
    assert config.parse(ours).use_ema is True and config.parse(ours).optimizer_args == {
        "betas": [0.9, 0.95],
        "eps": 1e-8,
    }
    assert sweep_space.flags({"loss_args.beta": "-1e-05"}) == ["--loss_args.beta=-1e-05"]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"metod": "grid"}, "unknown key 'metod'; did you mean method"),
        ({"method": "bayess"}, "method: 'bayess'; did you mean bayes"),
        ({"method": None}, "method: None (there are bayes, random, grid)"),
        ({"program": "train.py"}, "program: train.py"),
        ({"metric": None}, "metric: is missing"),
        ({"metric": {"name": "x", "gaol": "maximize"}}, "metric: unknown key 'gaol'; did you mean goal"),
        ({"metric": {"name": "x", "goal": "max"}}, "metric.goal: 'max'"),
        ({"metric": {"name": 3}}, "metric.name"),
        ({"parameters": {"lr": {"value": 1}}}, "none of them varies"),
        ({"parameters": {}}, "parameters: holds no keys"),
        ({"parameters": {"lr": {"min": 0.1}}}, "parameters.lr: value, values, or min and max"),
        (
            {"parameters": {"lr": {"min": "1e-5", "max": 0.1}}},
            "parameters.lr: min 1e-5 is text in YAML 1.1, which wandb reads too: write 1.0e-5",
        ),
        ({"parameters": {"lr": {"min": 0.2, "max": 0.1}}}, "parameters.lr: min 0.2 is not below max 0.1"),
        (
            {"parameters": {"lr": {"min": 0, "max": 0.1, "distribution": "log_uniform_values"}}},
            "parameters.lr: min 0 of log_uniform_values",
        ),
        (
            {"parameters": {"lr": {"min": -9, "max": -1, "distribution": "log_uniform"}}},
            "log_uniform_values takes the values",
        ),
        ({"parameters": {"lr": {"distribution": "normal", "mu": 1}}}, "parameters.lr: no distribution 'normal' here"),
        (
            {"parameters": {"lr": {"distribution": "int_uniform", "min": 1, "max": 2.5}}},
            "parameters.lr: max 2.5 of int_uniform",
        ),
        (
            {"parameters": {"lr": {"distribution": "q_uniform", "min": 1, "max": 2, "q": 0}}},
            "parameters.lr: q 0 is not above 0",
        ),
        ({"parameters": {"lr": {"min": 1, "max": 2, "q": 1}}}, "parameters.lr: int_uniform has no 'q'"),
        ({"parameters": {"lr": {"min": True, "max": 2}}}, "parameters.lr: min True is not a number"),
        ({"parameters": {"lr": {"min": 1, "max": float("inf")}}}, "parameters.lr: max inf is not a number"),
        ({"parameters": {"lr": {"values": 3}}}, "parameters.lr: values is a list"),
        ({"parameters": {"lr": {"values": [1, 1]}}}, "1 stands in values twice"),
        ({"parameters": {"clip_grad": {"values": [1.0, None]}}}, 'parameters.clip_grad: write "null" in quotes'),
        (
            {"parameters": {"lr": {"values": [1, 2], "probabilities": [0.5, 0.5]}}},
            "parameters.lr: categorical has no 'probabilities'",
        ),
        ({"parameters": {"optimizer_args": {"parameters": {"betas": {"values": [1, 2]}}}}}, "as optimizer_args.betas"),
        ({"parameters": {"name": {"values": ["a", "b"]}}}, "parameters.name: no trial can choose it"),
        ({"parameters": {"lr": 3}}, "parameters.lr: holds no keys"),
        ({"method": "grid"}, "parameters.lr: a grid takes values"),
        ({"early_terminate": {"type": "envelope"}}, "early_terminate.type: 'envelope'"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 0}}, "early_terminate.min_iter: 0"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 2, "eta": 1.5}}, "early_terminate.eta: 1.5"),
        ({"early_terminate": {"type": "hyperband", "max_iter": 9, "s": 2}}, "early_terminate: unknown key 'max_iter'"),
        ({"run_cap": 0}, "run_cap: 0"),
        ({"command": ["${env}", "python", "${program}"]}, "command: a list with"),
        ({"command": ["${program}", "${args_no_boolean_flags}", "${args}"]}, "command: ${args_no_boolean_flags}"),
    ],
)
def test_a_wrong_line_of_the_file_is_named(tmp_path, monkeypatch, capsys, changes, words):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, **changes)
    assert sweep.main([str(file)]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith(f"sweep.py: {file}: ")
        and words in error
        and error.count("\n") == 1
        and not (tmp_path / "runs").exists()
    )


@pytest.mark.parametrize(
    "line, words",
    [
        ("none.yaml", "none.yaml: No such file"),
        ("space.yaml --trails 3", "unknown flag --trails; did you mean --trials"),
        ("space.yaml --trials 0", "0 is not a number from 1 on"),
        ("space.yaml -- --epoks 3", "unknown flag --epoks; did you mean --epochs"),
        ("space.yaml -- --epochs x", "--epochs"),
        ("space.yaml --trials 3 --model_args.depth 2", "--model_args.depth is a flag of run.py: put it behind --"),
        ("space.yaml -- --name x", "--name behind -- is not for a sweep's trials: put --name before it"),
        ("space.yaml -- --lr 0.1", "--lr behind -- is what the file varies"),
        ("space.yaml --hours nan", "--hours: nan is not a number of hours"),
        ("space.yaml --hours -1", "--hours: -1 is not"),
        ("space.yaml -- --data csv --folds 2", "metric.name: val/acc1: with --folds it is over all rows, as oof/acc1"),
        ("space.yaml --name a/b", "--name a/b"),
        ("space.yaml --seed -1", "--seed -1"),
    ],
)
def test_a_wrong_command_line_ends_before_anything_is_written(acted, tmp_path, capsys, line, words):
    started = acted()
    write(tmp_path)
    try:
        code = sweep.main(line.split())
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert (
        code == 2
        and words in error
        and error.startswith("sweep.py: ")
        and not started
        and not (tmp_path / "runs").exists()
    ), error


def test_a_flag_of_the_file_that_run_py_does_not_have_is_named(acted, tmp_path, capsys):
    started = acted()
    write(tmp_path, fixed={"wieght_decay": 1})
    with pytest.raises(SystemExit) as stop:
        sweep.main(["space.yaml"])
    assert (
        stop.value.code == 2
        and "--wieght_decay; did you mean --weight_decay" in capsys.readouterr().err
        and not started
    )
    assert not (tmp_path / "runs").exists()


def test_without_optuna_it_says_what_to_install(acted, tmp_path, monkeypatch, capsys):
    for name in ("processes", "trials"):
        monkeypatch.delitem(sys.modules, f"experiments.search.{name}", raising=False)
        monkeypatch.delattr(experiments.search, name, raising=False)
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "optuna.trial")
    assert sweep.main([str(write(tmp_path))]) == 2 and "pip install optuna" in capsys.readouterr().err


# trials that only write what a run writes


def test_a_sweep_tells_its_trials_and_repeats_itself(acted, tmp_path, capsys):
    started = acted()
    file = write(tmp_path, method="bayes", run_cap=11)
    assert sweep.main([str(file), "--", "--workers", "0", "--epochs", "3"]) == 0
    out, rows = capsys.readouterr().out, trials_of(tmp_path / "runs" / "space")
    assert (
        len(rows) == 11
        and [row["state"] for row in rows] == ["finished"] * 11
        and {row["epochs"] for row in rows} == {"3"}
    )
    for row, (settings, env) in zip(rows, started):
        assert (settings["lr"], settings["mixup"], settings["workers"], settings["epochs"]) == (
            row["lr"],
            row["mixup"],
            "0",
            "3",
        )
        assert (
            settings["name"] == f"trial-{row['number']}"
            and settings["runs_dir"] == "runs/space"
            and env["WANDB_RUN_GROUP"] == "space"
        )
        assert float(row["value"]) == pytest.approx(score(row, 2))
    best = max(rows, key=lambda row: float(row["value"]))
    alone = next(line.strip() for line in out.splitlines() if "run.py" in line and "alone" not in line)
    argv = alone.split()[2:]
    assert argv.count("--epochs") == 1
    assert (
        alone.startswith("python experiments/run.py ")
        and config.parse(argv).lr == float(best["lr"])
        and config.parse(argv).name is None
    )
    assert (
        f"best: trial {best['number']}, " in out
        and "experiments/compare.py runs/space" in out
        and "importance by Optuna: lr " in out
    )
    before = list(started)
    assert (
        sweep.main([str(file), "--", "--workers", "0", "--epochs", "3"]) == 0
        and len(started) == 11
        and "11 finished" in capsys.readouterr().out
    )
    assert sweep.main([str(file), "--name", "again", "--", "--workers", "0", "--epochs", "3"]) == 0
    assert trials_of(tmp_path / "runs" / "again") == rows and [each["lr"] for each, _ in started[11:]] == [
        each["lr"] for each, _ in before
    ]
    assert sweep.main([str(file), "--name", "other", "--seed", "1", "--trials", "3", "--", "--epochs", "3"]) == 0
    assert trials_of(tmp_path / "runs" / "other", "lr") != trials_of(tmp_path / "runs" / "again", "lr")[:3]


def test_bayes_learns_from_the_trials_before_and_random_does_not(acted, tmp_path):
    drawn = {}
    for method, sign in itertools.product(("bayes", "random"), (1, -1)):
        started = acted(lambda settings, sign=sign: ([sign * score(settings, 0)], 0, {}))
        del started[:]
        assert (
            sweep.main(
                [
                    str(write(tmp_path, method=method, fixed={"epochs": 1})),
                    "--trials",
                    "12",
                    "--name",
                    f"{method}{sign}",
                ]
            )
            == 0
        )
        drawn[method, sign] = [settings["lr"] for settings, _ in started]
    assert drawn["random", 1] == drawn["random", -1]
    ten = drawn["bayes", 1][:10]
    assert (
        ten == drawn["bayes", -1][:10]
        and drawn["bayes", 1][10:] != drawn["bayes", -1][10:]
        and len({*drawn["bayes", 1]}) == 12
    )


def test_a_grid_is_walked_once_in_wandbs_order(acted, tmp_path):
    started = acted(lambda settings: ([0.5, 0.6], 0, {}))
    varied = {"mixup": {"values": [0.5, 0]}, "lr": {"values": [0.1, 0.01]}, "seed": {"min": 3, "max": 5}}
    file = write(tmp_path, method="grid", parameters={key: {"value": value} for key, value in TINY.items()} | varied)
    assert sweep.main([str(file), "--trials", "5"]) == 0 and len(started) == 5
    assert sweep.main([str(file)]) == 0
    # wandb/sweeps grid_search.py: itertools.product over the names sorted, each in the order of its values
    wanted = list(itertools.product(["0.1", "0.01"], ["0.5", "0"], ["3", "4", "5"]))
    assert [(each["lr"], each["mixup"], each["seed"]) for each, _ in started] == wanted
    assert trials_of(tmp_path / "runs" / "space", "lr", "mixup", "seed") == wanted
    assert sweep.main([str(file), "--trials", "50"]) == 0 and len(started) == 12


def test_what_falls_behind_is_stopped_at_the_rungs(acted, tmp_path, capsys, recwarn):
    """Rungs after 2 and 6 epochs of 8; at each the best third of those that have come so far goes on, one at least."""
    order = [0.5, 0.9, 0.4, 0.8, 0.95, 0.99]
    started = acted(lambda settings: ([order[int(settings["seed"])] + 0.001 * epoch for epoch in range(8)], 0, {}))
    file = write(
        tmp_path,
        method="grid",
        early_terminate={"type": "hyperband", "min_iter": 2},
        fixed={"epochs": 8},
        parameters={
            **{key: {"value": value} for key, value in (TINY | {"epochs": 8}).items()},
            "seed": {"min": 0, "max": 5},
        },
    )
    assert sweep.main([str(file)]) == 0
    rows = trials_of(tmp_path / "runs" / "space", "state", "epochs")
    assert rows == [
        ("finished", "8"),
        ("finished", "8"),
        ("pruned", "2"),
        ("pruned", "2"),
        ("finished", "8"),
        ("finished", "8"),
    ]
    assert len(started) == 6 and float(trials_of(tmp_path / "runs" / "space", "value")[2][0]) == pytest.approx(0.401)
    assert "trial 2 pruned after 2 epochs" in capsys.readouterr().out and not [
        *recwarn
    ]  # Optuna warns of an epoch reported twice


def test_the_last_epoch_is_not_cut_off(acted, tmp_path):
    acted(lambda settings: ([0.9 - 0.1 * int(settings["seed"])] * 2, 0, {}))
    parameters = {
        **{key: {"value": value} for key, value in (TINY | {"epochs": 2}).items()},
        "seed": {"min": 0, "max": 3},
    }
    assert (
        sweep.main(
            [
                str(
                    write(
                        tmp_path,
                        method="grid",
                        early_terminate={"type": "hyperband", "min_iter": 2},
                        parameters=parameters,
                    )
                )
            ]
        )
        == 0
    )
    assert trials_of(tmp_path / "runs" / "space", "state") == [("finished",)] * 4


@pytest.mark.parametrize("early", [None, {"type": "hyperband", "min_iter": 1, "eta": 3}])
def test_a_metric_that_is_never_a_number_is_said(acted, tmp_path, capsys, early):
    acted(lambda settings: ([float("nan")] * 2, 0, {"best": None}))
    parameters = {
        **{key: {"value": value} for key, value in (TINY | {"epochs": 2}).items()},
        "seed": {"min": 0, "max": 2},
    }
    assert sweep.main([str(write(tmp_path, method="grid", parameters=parameters, early_terminate=early))]) == 1
    assert trials_of(tmp_path / "runs" / "space", "state") == [("pruned",)] * 3
    assert "no best: val/acc1 was not a number in 3 of 3 trials" in capsys.readouterr().out


def test_trials_that_are_not_finite_are_no_failures_of_the_sweep(acted, tmp_path, capsys):
    """Four in a row end with exit code 1: what they tried is to blame, and the next is tried."""
    acts = [([0.5], 1, {"not_finite": "the loss is nan at step 2 (epoch 1). Try less."})] * 4 + [([0.5, 0.6], 0, {})]
    acted(lambda settings: acts[int(settings["seed"])])
    parameters = {
        **{key: {"value": value} for key, value in (TINY | {"epochs": 2}).items()},
        "seed": {"min": 0, "max": 4},
    }
    assert sweep.main([str(write(tmp_path, method="grid", parameters=parameters))]) == 0
    assert trials_of(tmp_path / "runs" / "space", "state") == [("pruned",)] * 4 + [("finished",)]
    assert "(the loss is nan at step 2 (epoch 1))" in capsys.readouterr().out


def test_a_loss_that_is_no_number_costs_a_trial_not_the_sweep(acted, tmp_path, capsys):
    nan = float("nan")
    acts = {
        "0": ([0.5, 0.6, 0.7, 0.8], 0, {}),
        "1": ([nan] * 4, 0, {"best": None}),
        "2": ([0.1, float("inf"), nan, nan], 0, {"best": None}),
        "3": ([nan] * 4, 0, {"best": None}),
        "4": ([nan, 0.1, 0.2, 0.9], 0, {"best": 0.9}),
    }
    acted(lambda settings: acts[settings["seed"]])
    parameters = {**{key: {"value": value} for key, value in TINY.items()}, "seed": {"min": 0, "max": 4}}
    assert sweep.main([str(write(tmp_path, method="grid", parameters=parameters))]) == 0
    assert trials_of(tmp_path / "runs" / "space", "state") == [
        (each,) for each in ("finished", "pruned", "pruned", "pruned", "finished")
    ]
    assert "its val/acc1 is NaN, not a number" in capsys.readouterr().out
    early = write(
        tmp_path,
        "early.yaml",
        method="grid",
        early_terminate={"type": "hyperband", "min_iter": 1, "eta": 3},
        parameters=parameters,
    )
    assert sweep.main([str(early)]) == 0
    assert trials_of(tmp_path / "runs" / "early", "state", "epochs")[1] == ("pruned", "1")


def test_failures_are_kept_and_three_in_a_row_stop_it(acted, tmp_path, capsys):
    codes = {"0": 0, "1": 1, "2": -9, "3": 0, "4": 2, "5": 1, "6": 1, "7": 0}
    started = acted(lambda settings: ([0.5], codes[settings["seed"]], {}))
    parameters = {
        **{key: {"value": value} for key, value in (TINY | {"epochs": 1}).items()},
        "seed": {"min": 0, "max": 7},
    }
    file = write(tmp_path, method="grid", parameters=parameters)
    assert sweep.main([str(file)]) == 1
    out = capsys.readouterr().out
    assert (
        len(started) == 7
        and "trial 1 has failed (exit code 1):\nline 1\nwhat went wrong\n" in out
        and "killed by SIGKILL" in out
    )
    assert "3 trials in a row have failed" in out and "best: trial 0" in out
    assert [row[0] for row in trials_of(tmp_path / "runs" / "space", "state")] == [
        "finished",
        "failed",
        "failed",
        "finished",
    ] + ["failed"] * 3
    kept = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path}/runs/space/study.db").trials[1]
    assert kept.user_attrs["why"] == "line 1\nwhat went wrong\nexit code 1"
    assert sweep.main([str(file)]) == 0 and len(started) == 8  # it goes on with the next


def test_what_no_trial_can_run_with_ends_it_and_leaves_nothing(acted, tmp_path, capsys):
    started = acted(lambda settings: ([], 2, {}))
    file = write(tmp_path)
    for parallel, trials, starts in (("1", "20", 2), ("2", "20", 2), ("1", "1", 1)):
        del started[:]
        assert sweep.main([str(file), "--parallel", parallel, "--trials", trials]) == 2
        assert (
            len(started) == starts
            and "what went wrong" in capsys.readouterr().out
            and not (tmp_path / "runs" / "space").exists()
        )


def test_what_one_value_cannot_run_with_costs_its_trials_alone(acted, tmp_path):
    def act(settings):
        (Path(settings["runs_dir"]) / settings["name"] / "config.yaml").write_text("")  # it got past all checks
        return [0.5] * 4, 0, {}

    parameters = {**{key: {"value": value} for key, value in TINY.items()}, "seed": {"min": 0, "max": 3}}
    for name, parallel, bad in (("first", "1", "0"), ("two", "2", "12"), ("last", "2", "123")):
        acted(lambda settings, bad=bad: ([], 2, {}) if settings["seed"] in bad else act(settings))
        assert (
            sweep.main(
                [str(write(tmp_path, f"{name}.yaml", method="grid", parameters=parameters)), "--parallel", parallel]
            )
            == 0
        )
        assert trials_of(tmp_path / "runs" / name, "state") == [
            ("failed" if each in bad else "finished",) for each in "0123"
        ]


def test_three_failures_in_a_row_stop_what_runs_to_go_on(acted, tmp_path):
    file = write(tmp_path)
    acted(lambda settings: ([0.5] * 99, 0, {}) if settings["name"] == "trial-0" else ([], 1, {}))
    assert sweep.main([str(file), "--parallel", "2", "--name", "three"]) == 1  # the one that ran is stopped, to go on
    assert trials_of(tmp_path / "runs" / "three", "state") == [("unfinished",)] + [("failed",)] * 3
    acted(lambda settings: ([0.5], 0 if settings["name"] == "trial-0" else 1, {}))
    assert sweep.main([str(file), "--trials", "2"]) == 0


def test_a_study_that_cannot_be_read_or_written_is_named(acted, tmp_path, capsys, monkeypatch):
    started, file, study = acted(), write(tmp_path), tmp_path / "runs" / "space" / "study.db"

    def fails(self, *_):
        raise optuna.exceptions.StorageInternalError("words") from sqlite3.OperationalError("database is locked")

    signals = []
    with monkeypatch.context() as patch:
        patch.setattr(sweep_trials.Trials, "write_csv", fails)
        patch.setattr(
            Acted,
            "send_signal",
            lambda self, signum: (signals.append((self.settings["name"], signum)), setattr(self, "code", 75)),
        )
        assert sweep.main([str(file), "--parallel", "2", "--trials", "2"]) == 2
    assert signals == [("trial-1", signal.SIGTERM)]  # it saves
    assert (
        capsys.readouterr().err
        == f"sweep.py: {study.relative_to(tmp_path)}: database is locked; once it can be read and written, the same "
        "command goes on\n"
    )
    assert sweep.main([str(file), "--trials", "2"]) == 0 and [each["name"] for each, _ in started] == [
        "trial-0",
        "trial-1",
        "trial-1",
    ]
    study.write_text("no database")
    assert (
        sweep.main([str(file), "--trials", "2"]) == 2
        and "study.db: file is not a database; once" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "metric, rows, says, words",
    [
        (
            "val/acc",
            [{"train/loss": 1.0}, {"train/loss": 0.9, "val/acc1": 0.5, "val/loss": 2.0}],
            {},
            "no val/acc (there are train/loss, val/acc1, val/loss)",
        ),
        (
            "test/acc",
            [{"val/acc1": 0.5}],
            {"test/acc1": 0.4},
            "no test/acc (there are val/acc1, best, params, finished, test/acc1)",
        ),
    ],
)
def test_a_metric_that_the_runs_do_not_have_ends_the_first(acted, tmp_path, capsys, metric, rows, says, words):
    started = acted(lambda settings: ([{**row, "epoch": 0} for row in rows] + [{"val/acc1": 0.5}] * 3, 0, says))
    assert sweep.main([str(write(tmp_path, metric={"name": metric, "goal": "maximize"}))]) == 2
    error = capsys.readouterr().err
    assert len(started) == 1 and f"metric.name: the runs have {words}" in error, error
    assert (tmp_path / "runs" / "space").exists() == (metric == "test/acc")  # a run that is finished is not thrown away


FOLDED = {"metric": "oof/rmse", "best": 17.5, "overall": 17.5}


@pytest.mark.parametrize(
    "metric, says, value",
    [("test/acc1", {"test/acc1": 0.25}, 0.25), ("oof/rmse", FOLDED, 17.5), ("overall", FOLDED, 17.5)],
)
def test_a_metric_of_the_result_alone(acted, tmp_path, metric, says, value):
    acted(lambda settings: ([] if "rmse" in str(says) else [0.5, 0.6], 0, says))
    assert sweep.main([str(write(tmp_path, metric={"name": metric, "goal": "minimize"})), "--trials", "2"]) == 0
    assert [float(row[0]) for row in trials_of(tmp_path / "runs" / "space", "value")] == [value] * 2


def test_a_signal_and_the_end_of_the_time_leave_it_to_go_on(acted, tmp_path, capsys, heard):
    acted()
    file, early = write(tmp_path, method="bayes"), {"type": "hyperband", "min_iter": 1, "eta": 2}
    assert (
        sweep.main([str(write(tmp_path, "whole.yaml", method="bayes", early_terminate=early)), "--trials", "14"]) == 0
    )
    whole, file = trials_of(tmp_path / "runs" / "whole"), write(tmp_path, method="bayes", early_terminate=early)
    names = [f"trial-{row['number']}" for row in whole if row["state"] == "finished"][1:]
    for signum, code, when in ((signal.SIGTERM, 75, names[0]), (signal.SIGINT, 130, names[-1])):

        def interrupted(settings, signum=signum, when=when):
            if settings["name"] == when:
                os.kill(os.getpid(), signum)
            return [score(settings, epoch) for epoch in range(4)], 0, {}

        acted(interrupted)
        assert sweep.main([str(file), "--trials", "14"]) == code
        assert "has stopped (exit code 75); the same command goes on" in capsys.readouterr().out
        assert trials_of(tmp_path / "runs" / "space", "state")[-1] == ("unfinished",)
    started = acted()
    begun = len(started)
    assert sweep.main([str(file), "--trials", "14", "--hours", "0"]) == 75 and len(started) == begun
    assert f"{14 - int(names[-1][6:])} of 14 trials are left; the same command goes on" in capsys.readouterr().out
    assert sweep.main([str(file), "--trials", "14"]) == 0 and started[begun][0]["name"] == names[-1]
    assert trials_of(tmp_path / "runs" / "space") == whole  # the same suggestions, and the same ends


def test_another_sweep_under_the_same_name_is_refused(acted, tmp_path, capsys):
    started, fixed = acted(), {key: {"value": value} for key, value in TINY.items()}
    assert sweep.main([str(write(tmp_path)), "--trials", "1"]) == 0
    for changes, line, words in (
        (
            {"metric": {"name": "val/loss", "goal": "minimize"}},
            "",
            "metric.name val/acc1 -> val/loss, metric.goal maximize -> minimize",
        ),
        ({"method": "bayes"}, "", "method random -> bayes"),
        ({}, "--seed 1", "sweep's seed 0 -> 1)"),
        ({}, "-- --epochs 3", "epochs 4 -> 3"),
        ({"fixed": {"model_args.depth": 2}}, "", "model_args.depth None -> 2"),
        (
            {"parameters": fixed | {"lr": {"min": 0.1, "max": 0.2}, "mixup": {"values": [0, 0.5]}}},
            "",
            "parameters.lr log_uniform_values 1e-05 to 0.1 -> uniform 0.1 to 0.2",
        ),
    ):
        assert sweep.main([str(write(tmp_path, **changes)), "--trials", "2", *line.split()]) == 2
        error = capsys.readouterr().err
        assert f"runs/space is a sweep with other values ({words}" in error and "--name another" in error, error
    assert len(started) == 1
    assert (
        sweep.main([str(write(tmp_path)), "--trials", "2", "--", "--workers", "0", "--logger", "none"]) == 0
    )  # where it runs may change
    (tmp_path / "runs" / "mine").mkdir()
    (tmp_path / "runs" / "mine" / "config.yaml").write_text("model: x\n")
    assert (
        sweep.main([str(write(tmp_path)), "--name", "mine"]) == 2
        and "runs/mine exists and is not a sweep" in capsys.readouterr().err
    )


def test_two_at_once_on_one_sweep_are_refused(acted, tmp_path, capsys):
    acted()
    file = write(tmp_path)
    assert sweep.main([str(file), "--trials", "1"]) == 0
    with open(tmp_path / "runs" / "space" / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert sweep.main([str(file), "--trials", "2"]) == 2
    assert f"another sweep.py is at work on it (process {os.getpid()})" in capsys.readouterr().err
    assert sweep.main([str(file), "--trials", "2"]) == 0


def test_several_at_once_have_slots_of_their_own(acted, tmp_path, monkeypatch):
    started = acted()
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(sweep, "cores", lambda parallel: 8 // parallel)
    assert sweep.main([str(write(tmp_path)), "--trials", "5", "--parallel", "4"]) == 0
    assert (
        len(started) == 5
        and {env["OMP_NUM_THREADS"] for _, env in started} == {"2"}
        and len(trials_of(tmp_path / "runs" / "space")) == 5
    )

    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "4\n"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    del started[:]
    line = ["--trials", "3", "--parallel", "2", "--name", "gpus", "--", "--devices", "2", "--accelerator", "auto"]
    assert sweep.main([str(write(tmp_path)), *line]) == 0
    assert [env["CUDA_VISIBLE_DEVICES"] for _, env in started] in (["3,5", "6,7", "3,5"], ["3,5", "6,7", "6,7"])
    with pytest.raises(UsageError, match="--parallel 3 with --devices 2 takes 6 GPUs, and there are 4"):
        sweep._slots(config.parse(["--devices", "2"]), 3)


def test_trials_meet_on_ports_of_their_own(acted, tmp_path, monkeypatch):
    """A person's or a launcher's MASTER_PORT is one port, and two trials of several devices would both listen on it."""
    acted()
    monkeypatch.setattr(pool, "start", START)
    given = []
    monkeypatch.setattr(
        pool.subprocess, "Popen", lambda line, env, **_: (given.append(env), Acted(line[2:], env, tmp_path / "log"))[1]
    )
    for variable in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "CALLED"):
        monkeypatch.setenv(variable, "1")
    assert sweep.main([str(write(tmp_path)), "--trials", "2", "--parallel", "2", "--", "--devices", "2"]) == 0
    assert len(given) == 2
    for env in given:
        strange = {
            key for key in env if key.startswith(("MASTER_", "TORCHELASTIC_")) or "RANK" in key or "WORLD" in key
        }
        assert not strange and env["CALLED"] == "1"


def test_under_torchrun_it_is_refused(acted, tmp_path, monkeypatch, capsys):
    acted()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sweep.main([str(write(tmp_path))]) == 2 and "not under torchrun or srun" in capsys.readouterr().err


# processes


def test_a_killed_sweep_takes_its_trials_with_it_and_goes_on(tmp_path):
    file = write(tmp_path, method="bayes", early_terminate={"type": "hyperband", "min_iter": 1, "eta": 2})
    line = [sys.executable, str(ROOT / "tests" / "helpers" / "sweep_processes.py"), "sweep", str(file), "--trials", "4"]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    assert (
        subprocess.run([*line, "--name", "whole"], cwd=tmp_path, env=env, capture_output=True, timeout=60).returncode
        == 0
    )
    folder, history = tmp_path / "runs" / "space", tmp_path / "runs" / "space" / "trial-0" / "metrics.csv"
    process = subprocess.Popen(line, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while len(rows_of(folder / "trial-0")) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    time.sleep(0.1)
    at_the_kill = history.read_text()
    time.sleep(0.4)
    assert history.read_text() == at_the_kill and len(rows_of(folder / "trial-0")) < 4  # nothing writes on
    ended = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and "trial 0 goes on" in ended.stdout and "1 unfinished" in ended.stdout, (
        ended.stdout + ended.stderr
    )
    assert (folder / "trial-0.log").read_text().split("\n")[1] != "from epoch 0"
    assert trials_of(folder) == trials_of(tmp_path / "runs" / "whole") and [
        row["epoch"] for row in rows_of(folder / "trial-0")
    ] == list("0123")


TINIEST = {
    "recipe": "none",
    "data": "digits",
    "model": "vit_nano4",
    "image_size": 16,
    "model_args.embed_dim": 32,
    "model_args.depth": 1,
    "model_args.patch_size": 4,
    "epochs": 2,
    "global_batch_size": 256,
    "workers": 0,
    "logger": "csv",
    "accelerator": "cpu",
}


def test_end_to_end_with_run_py(tmp_path, launch, capsys):
    write(
        tmp_path,
        method="grid",
        early_terminate={"type": "hyperband", "min_iter": 1, "eta": 2},
        parameters={**{key: {"value": value} for key, value in TINIEST.items()}, "lr": {"values": [5.0e-3, 1.0e-7]}},
    )
    ended = launch("space.yaml", before=instead_of_run)
    assert ended.code == 0, ended.out
    folder = tmp_path / "runs" / "space"
    assert trials_of(folder, "state", "epochs", "lr") == [("finished", "2", "0.005"), ("pruned", "1", "1e-07")], (
        ended.out
    )
    assert (
        result_of(folder / "trial-0")["best"] == float(trials_of(folder, "value")[0][0])
        and not (folder / "trial-1" / "result.json").exists()
    )
    assert "SIGTERM: saved step" in (folder / "trial-1.log").read_text() and "epoch 1/2" not in ended.out
    assert compare.main([str(folder), "--out", str(tmp_path / "out")]) == 0
    with open(tmp_path / "out" / "runs.csv", newline="") as file:
        assert {row["name"]: row["state"] for row in csv.DictReader(file)} == {
            "trial-0": "finished",
            "trial-1": "unfinished",
        }


@pytest.mark.slow
def test_a_wandb_agent_drives_two_ranks_by_flags_alone(tmp_path):
    """`wandb sweep` and `wandb agent`, the real ones, over the shipped file made tiny."""
    content = yaml.safe_load(SHIPPED.read_text()) | {"program": str(ROOT / "experiments" / "run.py")}
    tiny = TINIEST | {"epochs": 1, "logger": "wandb", "devices": 2}
    content["parameters"] = {key: {"value": value} for key, value in tiny.items()} | {
        "lr": {"values": [1.0e-3, 1.0e-2]},
        "use_ema": {"value": False},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import os, sys\nif any(word.endswith('run.py') for word in sys.orig_argv):\n"
        f"    open({str(tmp_path / 'ranks')!r}, 'a').write(os.environ.get('LOCAL_RANK', '0') + ' ' + ' "
        f"'.join(sys.orig_argv[1:]) + '\\n')\n"
    )
    with WandbStub() as server:
        env = (
            {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
            | server.env
            | {
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "HOME": str(tmp_path),
                "WANDB_DIR": str(tmp_path),
                "WANDB_DATA_DIR": str(tmp_path / "data"),
                "WANDB_CACHE_DIR": str(tmp_path / "cache"),
                "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]),
            }
        )

        def wandb(*words):
            ended = subprocess.run(
                [sys.executable, "-m", "wandb", *words],
                cwd=tmp_path,
                env=env,
                capture_output=True,
                text=True,
                timeout=280,
            )
            assert ended.returncode == 0, ended.stdout + ended.stderr
            return ended.stdout + ended.stderr

        assert "stub/vitlab/sw1" in wandb("sweep", "--project", "vitlab", "sweep.yaml")
        sent = yaml.safe_load(server.sweep_cfg)
        assert sent == content
        for number, lr in enumerate(content["parameters"]["lr"]["values"]):
            args = {key: {"value": spec["value"]} for key, spec in sent["parameters"].items() if "value" in spec} | {
                "lr": {"value": lr}
            }
            server.sweep_q.append({"type": "run", "run_id": f"agent{number}", "program": sent["program"], "args": args})
        out = wandb("agent", "stub/vitlab/sw1")
        assert not server.unknown and sorted(server.runs) == ["agent0", "agent1"], out
        for number, lr in enumerate((1e-3, 1e-2)):
            run = server.runs[f"agent{number}"]
            assert (
                run["sweep"] == "sw1"
                and run["exitcode"] == 0
                and run["config"]["lr"]["value"] == lr
                and run["config"]["devices"]["value"] == 2
            )
            assert [row["epoch"] for row in server.history(f"agent{number}") if "val/acc1" in row] == [0]
    ranks = [line.split(" ", 1) for line in (tmp_path / "ranks").read_text().splitlines()]
    assert sorted(rank for rank, _ in ranks) == ["0", "0", "1", "1"]
    for lr in ("0.001", "0.01"):
        (first, second) = [line.split()[-len(tiny) * 2 - 4 :] for _, line in ranks if f"--lr {lr} " in f"{line} "]
        assert first == second and settings_of(first)["model_args.embed_dim"] == "32"
    assert [result_of(folder)["world_size"] for folder in (tmp_path / "runs").iterdir()] == [2, 2]
