"""The notebooks run from top to bottom, tell what the files say, and carry no output."""

import json
from pathlib import Path

import matplotlib
import pytest
from conftest import result_of

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def code(name: str) -> list[str]:
    """The source of the code cells, which have no output."""
    cells = [cell for cell in json.loads((NOTEBOOKS / name).read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    return ["".join(cell["source"]) for cell in cells]


@pytest.mark.parametrize("epochs", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_a_trainer_of_ones_own(tmp_path, monkeypatch, epochs):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in code("own_trainer.ipynb"):
        exec(cell.replace("EPOCHS = 25", f"EPOCHS = {epochs}"), names)
    best = names["history"]["val/acc1"].max()
    assert names["big"].checkpoint_callback.best_model_score.item() == pytest.approx(best)
    assert names["scores"]["test/acc1"] > (0.75 if epochs == 25 else 0.1) and names["logits"].shape == (360, 10)
    assert names["student"].teacher is not None and 0 < names["taught"]["test/acc1"] < 1
    assert names["spec"]["class_names"] == [str(digit) for digit in range(10)]


@pytest.mark.parametrize("epochs", ["3, 2", pytest.param("20, 16", marks=pytest.mark.slow)])
def test_the_notebook_trains_distils_and_compares(tmp_path, monkeypatch, capsys, epochs):
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VITLAB_DECISION", raising=False)  # which a run leaves: gone with the test
    names: dict = {}
    for cell in code("train_distil_compare.ipynb"):
        exec(cell.replace("EPOCHS = 20, 16", f"EPOCHS = {epochs}"), names)
    assert "error" not in capsys.readouterr().err
    groups, runs = names["groups"], {folder.name: result_of(folder) for folder in (tmp_path / "runs").iterdir()}
    assert len(runs) == 5 and len(groups) == 3
    for start in ("alone", "taught"):
        scores = [runs[f"{start}-s{seed}"]["test/acc1"] for seed in (0, 1)]
        assert (
            groups.loc[f"{start}-s*", "mean"] == pytest.approx(sum(scores) / 2, rel=1e-9)
            and groups.loc[f"{start}-s*", "n"] == 2
        )
    assert runs["teacher"]["epochs"] == int(epochs.split(",")[0]) and (tmp_path / "comparison" / "index.html").is_file()
    assert names["accuracy"] == pytest.approx(runs["teacher"]["test/acc1"])  # of all test pictures, as the run has it
    assert 0 < names["accuracy"] < 1 and (epochs == "3, 2" or names["accuracy"] > 0.8)
