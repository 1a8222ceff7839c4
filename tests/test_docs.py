"""Every command, file, link, flag and table in the pages is right.

Commands are found in blocks marked bash and in code spans. The rules by which they are made small:
* run.py and launchers: the flags are parsed (`experiments.config.parse`), no more. A word in capitals stands for a
  value (`PLACEHOLDERS`).
* Other verbs: their own parser reads the flags, and run.py's those that they hand on.
* What needs nothing but `runs/digits-vit_nano4-s0` and a folder of images runs for real (`FOR_REAL`), after a demo of
  one epoch; Python blocks run with `fast_dev_run`.
* make: the target exists. pip: the extra exists. Commands of other tools are not run.
"""

import argparse
import importlib
import importlib.util
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import tomllib
from conftest import launcher, write_pictures

import datamodules
from experiments import config
from experiments.cli import recipes

ROOT = Path(__file__).parents[1]
RUN = "runs/digits-vit_nano4-s0"
PLACEHOLDERS = {
    "--recipe": "demo",
    "--epochs": "3",
    "--devices": "2",
    "--config": "CONFIG",
    "--fold": "0",
    "--folds": "5",
}
OTHER_TOOLS = ("wandb", "tensorboard", "kaggle")
FOR_REAL = ("predict", "export", "compare")
ROOMS = ("models", "datamodules", "lightning_modules", "experiments", "notebooks", "tests", "docs")


def _tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = _tables()
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in tables.PAGES}
COMMAND = re.compile(rf"(\w+=\S+ )*(python|make|vitlab|sbatch|pip|{'|'.join(OTHER_TOOLS)}|experiments/\S+\.sh) ")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def spans(text):
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", BLOCK.sub("", text))]


def commands():
    """(page, command) of all pages, each once."""
    found = {}
    for page, text in TEXTS.items():
        lines = [line for language, block in BLOCK.findall(text) if language == "bash" for line in block.splitlines()]
        lines += [re.sub(r"^(\w+\.py) ", r"python experiments/\1 ", span) for span in spans(text)]
        for line in lines:
            for part in line.split(" && "):
                part = part.partition(" # ")[0].strip()
                if COMMAND.match(part):
                    found.setdefault(part, page)
    return [pytest.param(page, line, id=line) for line, page in found.items()]


class Parsed(Exception):
    """Ends a verb when its flags have been read."""


def filled(words):
    return [
        PLACEHOLDERS.get(before, word) if re.fullmatch("[A-Z]+", word) else word
        for before, word in zip(["", *words], words)
    ]


def parse_run(words, tmp_path):
    (tmp_path / "config.yaml").write_text("model: vit_nano4\n")
    config.parse([str(tmp_path / "config.yaml") if word == "F" else word for word in filled(words)])


def parse_verb(verb, words, monkeypatch, tmp_path):
    """Call the verb's `main` up to the end of its parsing."""
    module = importlib.import_module(f"experiments.{verb}")
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        original(self, *args, **kwargs)
        raise Parsed

    def read(argv, prog="run.py"):
        parse_run(argv, tmp_path)
        raise Parsed

    with monkeypatch.context() as patched, pytest.raises(Parsed):
        if verb == "prepare":
            patched.setattr(module, "read", read)
        else:
            patched.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        module.main(filled(words))
    if "--" in words:
        parse_run(words[words.index("--") + 1 :], tmp_path)


@pytest.mark.parametrize("page, line", commands())
def test_commands_are_right(page, line, monkeypatch, tmp_path):
    words = shlex.split(line)
    while "=" in words[0]:
        words = words[1:]
    program = words[0]
    if program in OTHER_TOOLS:
        return
    if program == "make":
        target = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{word}:", target, re.MULTILINE) for word in words[1:] if "=" not in word)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert all(extra in extras for extra in re.findall(r"\[(\w+)\]", line))
    elif program == "sbatch" or program.endswith(".sh"):
        script = next(word for word in words if word.endswith(".sh"))
        assert (ROOT / script).is_file()
        rest = words[words.index(script) + 1 :]
        parse_run([word for word in rest if not word.isdecimal() or script.endswith("y.sh")], tmp_path)
    elif words[1] == "tests/real/make_competition.py":
        parse_competition([*words[2:]], monkeypatch)
    else:
        verb = words[1] if program == "vitlab" else Path(words[1]).stem
        assert verb == "VERB" or (ROOT / "experiments" / f"{verb}.py").is_file()
        if len(words) == 2 or words[2:] == ["--help"]:
            return
        if verb == "run":
            parse_run(words[2:], tmp_path)
        else:
            parse_verb(verb, words[2:], monkeypatch, tmp_path)


def parse_competition(words, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "real"))
    module = importlib.import_module("make_competition")
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", _stop_after(argparse.ArgumentParser.parse_args))
    with pytest.raises(Parsed):
        module.main(["labels" if word == "KIND" else word for word in words])


def _stop_after(original):
    def parse_args(self, *args, **kwargs):
        original(self, *args, **kwargs)
        raise Parsed

    return parse_args


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the run that the pages name, made by a demo of one epoch, and some images."""
    folder = tmp_path_factory.mktemp("workplace")
    done = launcher(folder)(
        "--recipe demo --data digits --epochs 1 --name digits-vit_nano4-s0 --workers 0 --logger csv"
    )
    assert done.code == 0, done.out
    write_pictures(folder / "images", {"a": 2, "b": 2})
    return folder


def real_commands():
    found = [line.values[1] for line in commands()]
    return [line for line in found if (RUN in line or line.startswith("python experiments/compare.py runs --out"))]


@pytest.mark.parametrize("line", real_commands())
def test_short_commands_run(line, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    words = shlex.split(line)
    verb = Path(words[1]).stem
    assert verb in FOR_REAL
    assert importlib.import_module(f"experiments.{verb}").main(words[2:]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "page, block",
    [(page, block) for page, text in TEXTS.items() for language, block in BLOCK.findall(text) if language == "python"],
    ids=lambda value: value if value in TEXTS else "",
)
def test_python_blocks_run(page, block, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    exec(block.replace("Trainer(", "Trainer(fast_dev_run=2, accelerator='cpu', "), {})


def anchors(text):
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_links_and_files_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        file = file / "README.md" if file.is_dir() else file
        assert file.is_file(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page}: {target}"
    for span in spans(TEXTS[page]):
        if re.fullmatch(rf"({'|'.join(ROOMS)})/[\w./-]*", span) and "NAME" not in span:
            assert (ROOT / span).exists(), f"{page}: {span}"


@pytest.mark.parametrize("page", TEXTS)
def test_flags_exist(page, capsys):
    known = {config.flag(each).partition(".")[0] for each in fields(config.Config)} | {"--config", "--help"}
    moved = {f"--{each.name}" for each in fields(config.Config)} - known
    sources = [file for part in ("experiments", "tests/real") for file in (ROOT / part).rglob("*.[ps][yh]")]
    known |= {flag for file in sources for flag in re.findall(r"--\w+", file.read_text())} - moved
    text = "\n".join(line for line in TEXTS[page].splitlines() if not any(tool + " " in line for tool in OTHER_TOOLS))
    unknown = {flag for flag in re.findall(r"(?<![\w-])--[a-z]\w*(?![\w-])", text)} - known
    assert not unknown
    keys = {key for name in datamodules.names() for key in datamodules.accepted(name)}
    assert not {key for key in re.findall(r"--data_args\.(\w+)", text) if key not in keys}
    with pytest.raises(SystemExit):
        config.parse(["--help"])
    listed = set(re.findall(r"\w+", capsys.readouterr().out))
    assert not set(re.findall(r"--(?:augment|optimizer|logger)_args\.(\w+)", text)) - listed


@pytest.mark.parametrize("page", TEXTS)
def test_recipes_and_tables_come_from_the_registry(page):
    assert tables.with_tables(TEXTS[page]) == TEXTS[page], "make docs writes the tables"
    text = TEXTS[page]
    named = {name for name in re.findall(r"--recipe (\w+)", text) if not name.isupper()}
    assert not named - {*recipes.recipe_names(), "none"}


def test_the_readme_is_one_page():
    assert len(TEXTS["README.md"].splitlines()) <= 130 and len(TEXTS["README.md"].split()) < 1100
