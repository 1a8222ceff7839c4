"""Notebooks run from top to bottom, and carry no output."""
import json
import os
from pathlib import Path

import matplotlib
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, launch, tmp_path, monkeypatch):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    assert launch("--name digits-vit_nano4-s0 --epochs 1 --logger csv").code == 0
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
    assert 0 < names["accuracy"] < 1 and os.path.getsize(tmp_path / "runs" / "digits-vit_nano4-s0" / "curves.png") > 5000
