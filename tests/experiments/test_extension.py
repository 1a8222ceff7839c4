"""`--extend RUN`: a finished run trained longer, under a schedule of its own."""

import pytest
import torch
import yaml
from conftest import result_of, weights_of

from experiments.run import main
from lightning_modules.loggers.csv_logger import read_history
from lightning_modules.optimization.schedules import cosine

TINY = (
    "--data_dir pics --image_size 16 --model vit_nano4 --model_args.embed_dim 32 --model_args.depth 1 --accelerator "
    "cpu --recipe none "
    "--global_batch_size 8 --lr 2e-3 --ema_decay 0.9 --workers 0 --logger csv --log_every_steps 1 --save_every_steps 1"
)


def refused(line, capsys):
    """What run.py says of a line that it refuses."""
    try:
        code = main(line.split())
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    return capsys.readouterr().err


def test_a_finished_run_is_trained_longer_and_says_so(pics, launch, capsys, monkeypatch):
    monkeypatch.chdir(pics)
    monkeypatch.delenv("VITLAB_DECISION", raising=False)  # which a run leaves: gone with the test
    assert launch(f"{TINY} --epochs 1 --name one").code == 0
    said = refused(f"{TINY} --epochs 3 --name one", capsys)
    assert "--extend runs/one --name other" in said and "--init runs/one --name other" in said

    line = f"{TINY} --epochs 3 --warmup_steps 2 --extend runs/one"
    for more, words in (
        ("--name one", "needs a --name of its own"),
        ("--name two --epochs 1", "has 1 epochs done, and --epochs 1 is the whole"),
        ("--name two --extend runs/nowhere", "no run directory"),
        ("--name two --warmup_steps 8", "the warm-up takes as long"),
        ("--name two --resume runs/one", "not with --resume"),
        ("--name two --overwrite", "--overwrite deletes one"),
    ):
        assert words in refused(f"{line} {more}", capsys) and not (pics / "runs" / "two").exists()

    whole = launch(f"{line} --name whole")
    assert (
        whole.code == 0
        and "extend runs/one: 1 epochs done, 2 added; the rate rises to 0.002 once more and falls to 0" in whole.out
    ), whole.out
    assert launch(f"{line} --name killed", kill_at_step=7).code == -9
    assert launch(f"{line} --name killed").code == 0
    folder = pics / "runs" / "killed"
    for name in ("last.ckpt", "best.ckpt"):
        first, second = (weights_of(pics / "runs" / run / "checkpoints" / name) for run in ("whole", "killed"))
        assert all(torch.equal(first[key], second[key]) for key in first)
    rows, stored = read_history(folder / "metrics.csv"), yaml.safe_load((folder / "config.yaml").read_text())
    assert (stored["extend"], stored["extend_step"]) == (str(pics / "runs" / "one"), 4)
    assert (result_of(folder)["epochs"], result_of(folder)["steps"]) == (3, 12)
    assert [row["step"] for row in rows] == [*range(5, 13)] and {row["epoch"] for row in rows} == {1, 2}
    rates = [
        cosine(step, peak=2e-3, min_lr=0, warmup_lr=0, warmup_steps=2, total_steps=8, steps_per_epoch=4)
        for step in range(8)
    ]
    assert [row["lr"] for row in rows] == pytest.approx(rates)
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert {int(each["step"]) for each in state["optimizer_states"][0]["state"].values()} == {
        12
    }  # the optimizer's own went on
