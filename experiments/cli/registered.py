"""Registered names, read from the source files without importing them: torch and timm take seconds."""

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datamodules.loading.closest import did_you_mean


def summary(docstring: str | None) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((docstring or "").split("\n\n")[0].split())


def models() -> tuple[list[str], list[str]]:
    """(names of our models, prefixes of names that a loop counts up), in the order of the files."""
    names: list[str] = []
    beginnings: list[str] = []
    for file in sorted(_folder("models").glob("*.py")):
        text = file.read_text(encoding="utf-8")
        for node in ast.parse(text).body if re.search(r"^ *register\(", text, re.MULTILINE) else ():
            rows = _rows(node) if isinstance(node, ast.For) else {}
            for call in ast.walk(node):
                if (
                    isinstance(call, ast.Call)
                    and isinstance(call.func, ast.Name)
                    and call.func.id == "register"
                    and call.args
                ):
                    first: Any = call.args[0]
                    if isinstance(first, ast.Constant):
                        names.append(str(first.value))
                    elif isinstance(first, ast.Name) and first.id in rows:
                        names += rows[first.id]
                    else:
                        beginnings.append(
                            str(first.values[0].value)
                            if isinstance(first, ast.JoinedStr) and isinstance(first.values[0], ast.Constant)
                            else ""
                        )
    return names, beginnings


def _rows(loop: ast.For) -> dict[str, list[str]]:
    """The string values of the variables of a loop over a literal table."""
    variables = loop.target.elts if isinstance(loop.target, ast.Tuple) else [loop.target]
    table: list[list[Any]] = [
        row.elts if isinstance(row, ast.Tuple) else [row] for row in getattr(loop.iter, "elts", ())
    ]
    return {
        each.id: [row[place].value for row in table]
        for place, each in enumerate(variables)
        if isinstance(each, ast.Name)
        and table
        and all(
            place < len(row) and isinstance(row[place], ast.Constant) and isinstance(row[place].value, str)
            for row in table
        )
    }


def model_problem(name: str) -> str | None:
    """The error for an unknown model name, with the closest names; None where it may be right."""
    if name.startswith("timm/"):
        return _timm_problem(*name.removeprefix("timm/").partition(".")[::2])
    known, beginnings = models()
    if name in known or any(name.startswith(each) for each in beginnings):
        return None
    also = f"; timm has it: --model timm/{name}" if name in _timm()[0] else ""
    return (
        f"no model named {name!r}{also}{did_you_mean(name, known)} (--list models prints the names, timm/<name> is any "
        f"of timm's)"
    )


def _timm_problem(arch: str, tag: str) -> str | None:
    functions, tags = _timm()
    if arch not in functions and arch not in tags:
        return f"timm has no model named {arch!r}{did_you_mean(arch, functions, 'timm/{}')}"
    if tag and tags.get(arch) and tag not in tags[arch]:
        near = did_you_mean(tag, tags[arch])
        return f"timm/{arch} has no weights tagged {tag!r}{near} (its tags: {', '.join(tags[arch])})"
    return None


@cache
def _timm() -> tuple[list[str], dict[str, list[str]]]:
    """(functions that build timm's models, texts in its files: what stands before the first point -> what stands behind
    it)."""
    text = "\n".join(file.read_text(encoding="utf-8") for file in sorted((_folder("timm") / "models").glob("*.py")))
    tags: dict[str, list[str]] = {}
    for name, tag in dict.fromkeys(re.findall(r"""["'](\w+)\.?([\w.]*)["']""", text)):
        tags.setdefault(name, []).extend([tag] if tag else [])
    return re.findall(r"^def (\w+)\(pretrained", text, re.MULTILINE), tags


def distill_losses() -> dict[str, tuple[str, list[str]]]:
    """Name -> (what it is, its keywords) of the losses of --distill."""
    found = {}
    node: Any
    for node in ast.parse(
        (_folder("lightning_modules.objectives") / "distill_losses.py").read_text(encoding="utf-8")
    ).body:
        for mark in getattr(node, "decorator_list", ()):
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "distill_loss":
                build = (
                    node
                    if isinstance(node, ast.FunctionDef)
                    else next(each for each in node.body if getattr(each, "name", "") == "__init__")
                )
                found[ast.literal_eval(mark.args[0])] = (
                    summary(ast.get_docstring(node)),
                    [each.arg for each in build.args.kwonlyargs],
                )
    return found


def shared_keywords() -> list[str]:
    """Keywords of --distill_args that every loss takes."""
    return list(ast.literal_eval(_tables("distill_losses", "SHARED")["SHARED"]))


def losses() -> dict[str, tuple[list[str], str]]:
    """Name -> (its tasks, what it is) of the losses of --loss."""
    tables = _tables("losses", "LOSSES", "TEXTS")
    of_task = {
        key.value: [name.value for name in known.keys]
        for key, known in zip(tables["LOSSES"].keys, tables["LOSSES"].values)
    }
    return {
        name: ([task for task, known in of_task.items() if name in known], text)
        for name, text in ast.literal_eval(tables["TEXTS"]).items()
    }


def data_sets() -> dict[str, str]:
    """Name -> description of the data sets."""
    import datamodules

    files = {
        name: _folder("datamodules") / f"{datamodules.module(name).rpartition('.')[2]}.py"
        for name in datamodules.names()
    }
    return {
        name: summary(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))) for name, file in files.items()
    }


def in_memory(name: str) -> bool:
    """Whether a data set comes with vitlab, and has no folder."""
    import datamodules

    file = _folder("datamodules") / f"{datamodules.module(name).rpartition('.')[2]}.py"
    return (
        file.is_file()
        and re.search(r"^ +in_memory\b.*= True$", file.read_text(encoding="utf-8"), re.MULTILINE) is not None
    )


def _tables(module: str, *names: str) -> dict[str, Any]:
    """The dictionaries of these names that a file of lightning_modules writes down."""
    body = ast.parse((_folder("lightning_modules.objectives") / f"{module}.py").read_text(encoding="utf-8")).body
    targets = [
        (node.target if isinstance(node, ast.AnnAssign) else node.targets[0], node.value)
        for node in body
        if isinstance(node, ast.Assign | ast.AnnAssign)
    ]
    return {target.id: value for target, value in targets if isinstance(target, ast.Name) and target.id in names}


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"there is no package {package}")
    return Path(spec.submodule_search_locations[0])
