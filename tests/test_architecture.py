"""The rules of the house that a machine can check."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "models": set(),
    "datamodules": set(),
    "lightning_modules": {"models"},
    "experiments": {"models", "datamodules", "lightning_modules"},
}
SOURCES = [path for room in MAY_IMPORT for path in sorted((ROOT / room).rglob("*.py"))]


def imported(tree: ast.AST) -> set[str]:
    direct = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return {
        name.split(".")[0]
        for name in direct
        | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    }


def without_types(tree: ast.Module) -> ast.Module:
    """The tree without imports of `models.spec` under TYPE_CHECKING, which every room may have."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [line for line in node.body if getattr(line, "module", None) != "models.spec"]
    return tree


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    room, tree = path.relative_to(ROOT).parts[0], ast.parse(path.read_text())
    rooms = imported(without_types(tree)) & MAY_IMPORT.keys() - {room}
    assert rooms <= MAY_IMPORT[room], f"{room} imports {rooms}"
    if room == "models":
        assert not imported(tree) & {"lightning", "wandb", "torchmetrics", "pandas"}


def test_the_entry_fits_one_screen():
    assert (ROOT / "experiments" / "run.py").read_text().count("\n") <= 60


def test_help_and_mistakes_do_not_wait_for_torch():
    assert "torch" not in imported(ast.parse((ROOT / "experiments" / "config.py").read_text()))


def test_nothing_is_unpickled_without_care():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and ast.unparse(node.func) == "torch.load"
            ):
                assert any(
                    word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords
                ), path
        assert "import pickle" not in path.read_text()
