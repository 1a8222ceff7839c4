"""What a command line is told before torch is imported: mistakes, lists, a finished run; and what a closed pipe makes
of them."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
from conftest import write_pictures

import datamodules
import models
from experiments import run
from experiments.cli import early, listing, recipes, registered
from experiments.config import read
from lightning_modules.objectives import distill_losses, losses, metrics

TINY = (
    "--data_dir pics --image_size 16 --model vit_nano4 --model_args.embed_dim 32 --model_args.depth 1 --recipe none "
    "--global_batch_size 8 "
    "--epochs 1 --workers 0 --logger csv --accelerator cpu"
)
TORCHRUN = Path(run.__file__).parent / "launch" / "torchrun.py"
LIGHT = """
import sys
from experiments.run import main
for line in sys.stdin.read().splitlines():
    try:
        code = main(line.split())
    except SystemExit as stop:
        code = stop.code
    heavy = [name for name in ("torch", "timm", "wandb", "lightning") if name in sys.modules]
    print(f"rc {code} {heavy}", flush=True)
    print("end", file=sys.stderr, flush=True)
"""


def without_torch(folder: Path, *lines: str) -> tuple[list[str], list[str]]:
    """(what each line printed, with `rc CODE [what it imported]`; its errors) in one process of its own."""
    ended = subprocess.run(
        [sys.executable, "-c", LIGHT], input="\n".join(lines), cwd=folder, capture_output=True, text=True
    )
    return ended.stdout.splitlines(), ended.stderr.split("end\n")[:-1]


def test_mistakes_are_told_without_torch(tmp_path):
    lines = {
        "--model vit_nano5 --data digits": "no model named 'vit_nano5'; did you mean vit_nano4",
        "--model timm/resnet51 --data digits": "timm has no model named 'resnet51'; did you mean timm/resnet5",
        "--model timm/resnet50.nosuch --data digits": "timm/resnet50 has no weights tagged 'nosuch'",
        "--model resnet50 --data digits": "run.py: no model named 'resnet50'; timm has it: --model timm/resnet50",
        "--data digit": "no data set named 'digit'; did you mean digits?",
        "--data digits": "--model is missing",
        "--model vit_nano4 --data_dir nowhere": f"--data_dir nowhere: there is no such folder ({tmp_path}/nowhere)",
        "--metric rsme": "--metric rsme: there is no such metric; did you mean rmse",
        "--teacher vit_nano4 --distill sof": "no distillation loss named 'sof'; did you mean soft?",
        "--recipe demos": "no recipe named 'demos'; did you mean demo?",
        "--loss hubber": "huber",
        "--modle vit_b16": "unknown flag --modle",
        "--data digits --model vit_nano4 --num_nodes 2": "torchrun or srun",
    }
    codes, errors = without_torch(tmp_path, *lines)
    assert codes == ["rc 2 []"] * len(lines)
    for words, error in zip(lines.values(), errors):
        assert words in error and error.count("\n") == 1 and error.startswith("run.py: "), error


def test_every_registered_name_is_found_without_importing_it():
    known, beginnings = registered.models()
    assert not [name for name in models.names() if name not in known and not name.startswith(tuple(beginnings))]
    assert {*known} <= {*models.names()}
    every = [f"timm/{name}" for name in (*timm.list_models(), *timm.list_pretrained())]
    assert [problem for problem in map(registered.model_problem, [*models.names(), *every]) if problem] == []
    assert registered.distill_losses() == {
        name: (registered.summary(entry.build.__doc__), distill_losses.keywords(name))
        for name, entry in distill_losses.LOSSES.items()
    }
    assert registered.losses() == {name: (losses.tasks_of(name), text) for name, text in losses.TEXTS.items()}
    assert [*registered.data_sets()] == datamodules.names() and registered.shared_keywords() == [*distill_losses.SHARED]
    assert [name for name in datamodules.names() if registered.in_memory(name)] == ["digits"]


@pytest.mark.parametrize("kind", ["data", "recipes", "losses", "metrics"])
def test_lists_are_columns_with_whole_phrases(kind, capsys):
    assert listing.main(read(["--list", kind]).config) == 0
    rows = [
        line
        for line in capsys.readouterr().out.splitlines()
        if not line.startswith(("left out", "my.py", "--loss_args"))
    ]
    start = {
        line.rfind("  ", 0, line.index(first))
        for line, first in ((line, line.split("  ")[-1].strip()) for line in rows)
    }
    assert len(rows) >= 6 and all(not line.rstrip().endswith((",", ";", " al", " with")) for line in rows), rows
    if kind == "recipes":
        assert len(start) == 1 and [line.split()[0] for line in rows] == recipes.recipe_names()
        assert max(map(len, recipes.recipe_names())) > 26
    if kind == "metrics":
        assert [line.split()[0] for line in rows] == [*metrics.METRICS]


def test_lists_import_nothing_heavy(tmp_path):
    out, _ = without_torch(tmp_path, *(f"--list {kind}" for kind in ("data", "recipes", "losses", "metrics")))
    assert [line for line in out if line.startswith("rc ")] == ["rc 0 []"] * 4


@pytest.mark.parametrize(
    "line", [["run.py", "--list", "recipes"], ["compare.py", "--help"], ["__main__.py", "run", "--list", "data"]]
)
def test_a_reader_that_has_gone_ends_a_verb_in_silence(line):
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [sys.executable, Path(run.__file__).with_name(line[0]), *line[1:]],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert ended.stderr == "" and ended.returncode in (0, 141), ended  # argparse swallows it where it prints the help


def test_a_finished_run_is_told_without_torch(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "pics" / "train", {"dark": 12, "grey": 12, "light": 12})
    assert run.main(f"{TINY} --name one".split()) == 0 and run.main([*TINY.split(), "--lr", "2e-3"]) == 0
    out, errors = without_torch(
        tmp_path, f"{TINY} --name one", f"{TINY} --lr 2e-3", f"{TINY} --name one --workers 1 --data_dir {tmp_path}/pics"
    )
    assert [line for line in out if line.startswith("rc ")] == ["rc 0 []"] * 3, (out, errors)
    assert sum(line.startswith("already finished: runs/one (") for line in out) == 2 and '"val/acc1"' in "".join(out)
    capsys.readouterr()

    def found(line):
        return early.finished(read(line.split()).config)

    assert found(f"{TINY} --name one") and not found(TINY)
    assert not found(f"{TINY} --name one --lr 3e-3") and not found(f"{TINY} --name one --overwrite")
    os.rename("runs/one", "runs/other")
    assert not found(f"{TINY} --name one") and not found(f"{TINY} --name other")
    os.rename("runs/other", "runs/one")
    (tmp_path / "pics" / "train" / "dark" / "0.jpg").unlink()
    assert not found(f"{TINY} --name one")  # other data: told with torch, by name
    assert run.main(f"{TINY} --name one".split()) == 2 and "have changed since" in capsys.readouterr().err


def torchrun(folder, *words, **env):
    return subprocess.run(
        [sys.executable, TORCHRUN, *words], cwd=folder, capture_output=True, text=True, env={**os.environ, **env}
    )


@pytest.mark.parametrize(
    "words, env, says",
    [
        (["2", "--modle", "vit_b16"], {}, "unknown flag --modle"),
        (["2", "--model", "vit_nano5", "--data", "digits"], {}, "vit_nano4"),
        (["--model", "vit_b16"], {}, "number of devices"),
        (["2", "--model", "vit_nano4"], {"VITLAB_NODES": "2"}, "VITLAB_HEAD"),
    ],
)
def test_torchrun_sh_tells_a_mistake_once_before_it_starts_anything(tmp_path, words, env, says):
    ended = torchrun(tmp_path, *words, **env)
    assert ended.returncode == 2 and says in ended.stderr and ended.stderr.count("\n") == 1 and not ended.stdout, ended


def test_torchrun_sh_takes_no_generic_variables_and_a_port_of_its_own(monkeypatch):
    monkeypatch.syspath_prepend(str(TORCHRUN.parent))
    import torchrun as script

    for name in ("HEAD", "NODES", "PORT", "RUN", "RESTARTS", "GRACE"):
        monkeypatch.setenv(name, "7")
    assert script._places(["2"]) == (2, 1, ["--standalone"])
    monkeypatch.setenv("VITLAB_HEAD", "node0")
    monkeypatch.setenv("VITLAB_NODES", "4")
    assert script._places(["2"]) == (2, 4, ["--rdzv-backend=c10d", "--rdzv-id=vitlab", "--rdzv-endpoint=node0:29500"])


@pytest.mark.parametrize(
    "line, devices", [("--devices 8", "1 nodes x 8 devices"), ("--devices 8 --num_nodes 4", "4 nodes x 8 devices")]
)
def test_a_plan_without_the_gpus_and_the_data_tells_what_it_assumes(tmp_path, monkeypatch, capsys, line, devices):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IMAGENET_DIR", raising=False)
    assert run.main(f"--model vit_nano4 --image_size 32 --recipe vit_b16 --dry_run {line}".split()) == 0
    out = capsys.readouterr().out
    for words in (
        "8 GPUs of 40 GB with bfloat16; this machine has none",
        "ImageNet's published numbers",
        "train 1,281,167, val 50,000",
        devices,
        "bf16-mixed",
        "40.00 GB free",
        "not measured",
    ):
        assert words in out, out
    assert not [*tmp_path.iterdir()]
    for refused in (
        f"--model vit_nano4 --image_size 32 {line}",
        f"--model vit_nano4 --dry_run --data_dir nowhere {line}",
        "--model vit_nano4 --data csv --dry_run",
    ):
        assert run.main(refused.split()) == 2, refused


@pytest.mark.parametrize(
    "codes, says", [({0: 2, 1: 2}, 2), ({0: 75, 1: 75}, 75), ({0: 76}, 76), ({0: 1, 1: 75}, 1), ({0: -9}, 1), ({}, 0)]
)
def test_torchrun_sh_leaves_with_the_code_of_the_ranks(monkeypatch, capsys, codes, says):
    from torch.distributed import run as elastic
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    monkeypatch.syspath_prepend(str(TORCHRUN.parent))
    import torchrun as script

    failures = {rank: ProcessFailure(rank, 1, code, "") for rank, code in codes.items()}
    agent = SimpleNamespace(_remaining_restarts=3)
    monkeypatch.setattr(LocalElasticAgent, "_monitor_workers", lambda agent: SimpleNamespace(failures=failures))

    def ended(line):
        LocalElasticAgent._monitor_workers(agent)
        if failures:
            raise ChildFailedError("run.py", failures)

    monkeypatch.setattr(elastic, "main", ended)
    assert script._torchrun([]) == says
    assert agent._remaining_restarts == (0 if 2 in codes.values() else 3) and (capsys.readouterr().err == "") is (
        says in (0, 2)
    )
