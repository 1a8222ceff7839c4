"""Recipes: valid, small, with their evidence."""
import pytest
import yaml

from experiments.config import parse
from experiments.recipe import RECIPES, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_parses_and_carries_its_evidence(name):
    text = (RECIPES / f"{name}.yaml").read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert any(line.startswith("# run: ") for line in header) and any(line.startswith("# measured: ") for line in header)
    assert len(text.splitlines()) <= 30
    cfg = parse(["--recipe", name])
    for key, value in yaml.safe_load(text).items():
        assert key == "lr" or getattr(cfg, key) == (tuple(value) if isinstance(value, list) else type(getattr(cfg, key))(value))
