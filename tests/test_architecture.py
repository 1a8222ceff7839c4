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


def modules_imported(path: Path) -> set[Path]:
    """Files of ours that a file imports anywhere in it: at the top, in functions, under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {file for name in names if (file := _file(name))}
    return found - {path}


def _file(name: str) -> Path | None:
    """The file of a module; of a name within a module, that module; None where it is not ours."""
    if name.partition(".")[0] not in MAY_IMPORT:
        return None
    place = ROOT / name.replace(".", "/")
    for file in (place.with_suffix(".py"), place / "__init__.py"):
        if file.is_file():
            return file
    return _file(name.rpartition(".")[0]) if "." in name else None


def circles(graph: dict[Path, set[Path]]) -> list[list[str]]:
    """The sets of files that import each other, directly or through others."""

    def reached(start: Path) -> set[Path]:
        seen, open_ = set(), [start]
        while open_:
            for file in graph[open_.pop()] - seen:
                seen.add(file)
                open_.append(file)
        return seen

    reach = {path: reached(path) for path in graph}
    groups = {
        frozenset(other for other in reach[path] if path in reach[other]) for path in graph if path in reach[path]
    }
    return sorted(sorted(str(path.relative_to(ROOT)) for path in group) for group in groups)


def test_no_import_circle():
    found = circles({path: modules_imported(path) for path in SOURCES})
    assert not found, f"these files import each other: {found}"


def test_the_circle_finder_finds_one():
    a, b, c = (ROOT / name for name in ("a.py", "b.py", "c.py"))
    assert circles({a: {b}, b: {c}, c: {b}}) == [["b.py", "c.py"]]
    assert not circles({a: {b, c}, b: {c}, c: set()})


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


def test_only_a_run_that_logs_to_wandb_imports_it():
    wrapper = "lightning_modules/loggers/wandb_logger.py"
    for path in SOURCES:
        top = {
            name
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in (
                [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            )
        }
        where = path.relative_to(ROOT).as_posix()
        assert "wandb" not in {name.split(".")[0] for name in top} or where == wrapper, where
        assert "lightning_modules.loggers.wandb_logger" not in top or where.startswith("experiments/benchmarks/"), where
