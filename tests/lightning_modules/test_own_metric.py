"""A metric of one's own that fails: before the first step where it can be seen there, and else without losing the
epoch."""

import pandas as pd
import pytest
import torch
from conftest import result_of

from experiments import run

LINE = (
    "--data_dir pics --model vit_nano4 --model_args.embed_dim 32 --model_args.depth 1 --recipe none --image_size 16 "
    "--global_batch_size 8 "
    "--workers 0 --logger csv --accelerator cpu --lr 1e-3"
)


@pytest.mark.parametrize(
    "body, words",
    [
        ("raise KeyError('label')", "KeyError: 'label' (my.py, line 2)"),
        ("return None", "TypeError: float() argument"),
        ("return t * 1.0", "it gives (4,) numbers, not one"),
        ("return t @ p.T[:, :2]", "(my.py, line 2)"),
    ],
)
def test_it_is_tried_before_the_first_step(pics, monkeypatch, capsys, body, words):
    monkeypatch.chdir(pics)
    (pics / "my.py").write_text(f"def f(t, p):\n    {body}\n")
    assert run.main(f"{LINE} --epochs 1 --metric my.py:f".split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("run.py: --metric f fails on 4 rows: ") and words in said and len(said.splitlines()) == 1
    assert not (pics / "runs").exists()


FAILS_AT_THE_THIRD_CALL = """
from pathlib import Path


def f(target, prediction):
    calls = Path("calls")
    calls.write_text((calls.read_text() if calls.exists() else "") + "x")
    if len(calls.read_text()) == 3:
        raise ZeroDivisionError("by chance")
    return (prediction.argmax(1) == target).mean()
"""


def test_an_epoch_is_saved_before_it_is_scored(pics, monkeypatch, capsys):
    monkeypatch.chdir(pics)
    (pics / "my.py").write_text(FAILS_AT_THE_THIRD_CALL)
    line = f"{LINE} --epochs 3 --metric my.py:f --name own"
    with pytest.raises(SystemExit) as stop:
        run.main(line.split())
    assert stop.value.code == 1
    said, checkpoints = capsys.readouterr().err.strip(), pics / "runs" / "own" / "checkpoints"
    assert (
        said.startswith("run.py: --metric f fails on 4 rows: ZeroDivisionError: by chance (")
        and "saved up to step 8" in said
    )
    assert len(said.splitlines()) == 1 and torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 8
    assert run.main(line.split()) == 0
    assert "resumed from" in capsys.readouterr().out and run.main(f"{line} --name whole".split()) == 0
    one, other = (pd.read_csv(pics / "runs" / name / "metrics.csv") for name in ("own", "whole"))
    kept = [name for name in one if "perf" not in name]
    pd.testing.assert_frame_equal(one[kept], other[kept])
    assert (
        len(one["val/f"].dropna()) == 3
        and result_of(pics / "runs" / "own")["best_epoch"] == result_of(pics / "runs" / "whole")["best_epoch"]
    )
    files = [
        torch.load(pics / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("own", "whole")
    ]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
