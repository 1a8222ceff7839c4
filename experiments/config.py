"""The command line of a run: all knobs in one frozen `Config`, and `parse`: defaults < recipe < config file < flags, in
any order of flags.

The knobs are declared in experiments/cli/knobs.py and in the two files that it names. Pure and light: no clock, no
randomness, no torch, no file but the recipe and the config file.
"""

import argparse
import re
import sys
from dataclasses import Field, FrozenInstanceError, asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jsonargparse import ActionYesNo, ArgumentParser, DefaultHelpFormatter

from datamodules.knobs import default, height_width
from datamodules.loading.closest import did_you_mean
from experiments.cli import launcher, recipes
from experiments.cli.checks import check, check_teacher
from experiments.cli.errors import UsageError
from experiments.cli.knobs import RECORDED, Knobs, flag, groups, rare

BOOLEAN = (bool, bool | None)
ELSEWHERE = {"gpus": "--devices", "learning_rate": "--lr", "batch_size": "--global_batch_size"}  # in other libraries
SPLIT = (
    "data",
    "data_args",
    "target",
    "task",
    "image",
    "group",
    "bad_images",
    "folds",
    "fold",
    "val_fraction",
    "split_seed",
    "limit_val",
)  # the knobs that decide which rows are held out


@dataclass(kw_only=True)
class Config(Knobs):
    """Every knob of a run, frozen; `experiments/cli/knobs.py` declares them."""

    def __setattr__(self, key: str, value: Any) -> None:
        if "_frozen" in self.__dict__:  # data modules inherit the same groups and are not, so no dataclass option
            raise FrozenInstanceError(f"cannot assign to field {key!r}")
        super().__setattr__(key, value)

    def __post_init__(self) -> None:
        if self.image_size is not None:
            try:
                height, width = height_width(self.image_size)
            except ValueError as error:
                raise UsageError(str(error)) from None
            self.image_size = height if height == width else f"{height}x{width}"  # one spelling of one size
        check(self)
        self.__dict__["_frozen"] = True

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> "Config":
        """A config of plain values, as `plain` makes them and JSON, YAML and checkpoints keep them."""
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return cls(**values)

    @property
    def folder(self) -> Path:
        """The run directory, of a config with a name."""
        return Path(self.runs_dir) / str(self.name)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), of a config with an image size."""
        return height_width(self.image_size)

    def filled(self, **values: Any) -> "Config":
        """A copy in which the knobs left out (None) take these values."""
        return replace(self, **{key: value for key, value in values.items() if getattr(self, key) is None})


@dataclass(frozen=True)
class Typed:
    """A command line, parsed once.

    Args:
        argv: its words. flags: values of the flags given, `whole` those that replace a dictionary instead of adding to
            it. file: values of --config.
    """

    argv: tuple[str, ...]
    flags: dict[str, Any]
    whole: frozenset[str]
    file: dict[str, Any]

    def over(self, values: dict[str, Any]) -> dict[str, Any]:
        """The values of a config with those of the file and of the flags over them."""
        values = {**values, **self.file}
        for key, value in self.flags.items():
            added = isinstance(value, dict) and isinstance(values.get(key), dict) and key not in self.whole
            values[key] = {**values[key], **value} if added else value
        return values


@dataclass(frozen=True)
class Command:
    """A command line, resolved as far as no file but the recipe is needed.

    Args:
        config: all knobs. recipe_alone: the values of its recipe alone, from which a run name takes the differences.
        notes: a line to print on each derived choice. typed: the words as parsed.
        chosen: names of the knobs that flags and config file set.
    """

    config: Config
    recipe_alone: Config
    notes: tuple[str, ...]
    typed: Typed
    chosen: frozenset[str] = frozenset()

    @property
    def argv(self) -> tuple[str, ...]:
        return self.typed.argv

    def again(self, **flags: Any) -> "Command":
        """The command with more flags, from which another recipe may follow. Raises UsageError."""
        return _command(replace(self.typed, flags={**self.typed.flags, **flags}))


def parse(argv: list[str] | None = None) -> Config:
    """The config of a command line. Exits with 2 and one line for any mistake, with 0 after --help."""
    return read(argv).config


def read(argv: list[str] | None = None, prog: str = "run.py") -> Command:
    """Like `parse`, with the notes to print and the recipe's own values. `prog` is the name in error messages."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _command(_typed(argv))
    except UsageError as error:
        raise SystemExit(launcher.refuse(prog, error)) from None
    except argparse.ArgumentError as error:
        raise SystemExit(launcher.refuse(prog, _tidy(str(error)))) from None


def _tidy(message: str) -> str:
    """Format jsonargparse's message about a wrong value as one line about the flag."""
    line = " ".join(part.strip() for part in message.splitlines() if part.strip())
    line = re.sub(r'Parser key "([\w.]+)":', r"--\1:", re.sub(r"<class '(\w+)'>", r"\1", line))
    line = re.sub(
        r"Does not validate against any of the Union subtypes Subtypes: \[(.*)\] Errors:.*Given value type: .* Given "
        r"value:",
        lambda found: f"expected {found[1].replace(', NoneType', ' or null')}, got",
        line,
    )
    line = re.sub(r"Expected a (?:typing\.)?(Literal\[.*?\])\. Got value:", r"expected \1, got", line)
    line = re.sub(
        r"(?:typing\.)?Literal\[(.*?)\]", lambda found: " or ".join(found[1].replace("'", "").split(", ")), line
    )
    for kind, text in (("float", "a number"), ("int", "a whole number"), ("dict", "KEY VALUE after a dot")):
        line = re.sub(rf"Expected a {kind}\. Got value:", f"expected {text}, got", line)
    line = re.sub(r"argument (--\w+)\S*: invalid _boolean_type value:", r"\1: expected true or false, got", line)
    if extra := re.match(r"unrecognized arguments: (-?)(\S+)", line):
        return (
            f"unknown flag -{extra[2]}: flags begin with --"
            if extra[1]
            else f"{extra[2]}: one word too many; a value follows its flag, as --model vit_b16 (--help lists all)"
        )
    spelled = {f"--{each.name}": flag(each) for each in fields(Config)}
    return re.sub(r"--\w+", lambda found: spelled.get(found[0], found[0]), line)


def _typed(argv: list[str]) -> Typed:
    words = _by_name(argv)
    flags = vars(_parser().parse_args(words, defaults=False))
    file = flags.pop("config", None)
    whole = {word.partition("=")[0].removeprefix("--") for word in words}
    return Typed(tuple(argv), flags, frozenset(whole), _from_file(Path(file), f"--config {file}") if file else {})


def _from_file(file: Path, name: str) -> dict[str, Any]:
    """The knobs of a YAML file, of their types. Raises UsageError for one that does not exist."""
    content = recipes.yaml_keys(file, name, [each.name for each in fields(Config)])
    for each in fields(Config):
        within, _, key = each.metadata["flag"].partition(".")
        if key and key in (content.get(within) or {}):
            raise UsageError(f"{name}: {within}.{key} is the key {each.name} in a YAML file, beside {within}")
    return vars(_parser().parse_path(str(file), defaults=False)) if content else {}


def _command(typed: Typed) -> Command:
    """The config of a command line: recipe, layers, what the recipe gives way to, learning rate."""
    chosen = {*typed.file, *typed.flags}
    recipe, why = recipes.choose_recipe({**typed.file, **typed.flags}, "recipe" in typed.flags)
    alone, notes = {each.name: default(each) for each in fields(Config)}, [f"recipe {recipe} ({why})"]
    if recipe != "none":
        alone |= _from_file(recipes.RECIPES / f"{recipe}.yaml", f"recipe {recipe}")
        recipes.check_recipe(recipe)
    values, meant_for = typed.over(alone), recipes.recipe_model(recipe)
    if meant_for not in (None, values["model"]) and alone["model_args"]:
        notes.append(f"model_args of the recipe are for {meant_for} and left out: {', '.join(alone['model_args'])}")
        alone["model_args"] = {}
        values["model_args"] = typed.over({"model_args": {}})["model_args"]
    _shorten_warmup(values, alone, chosen, notes)
    if values["data_dir"] and "data" not in chosen:
        values["data"] = alone["data"] = None  # the folder says what it is; a recipe's data set is for no folder
    values = recipes.scale_lr(values, notes, true_peak="lr" in chosen)
    recipes.lower_ends(values, alone, chosen, notes)
    if not chosen & {"lr", "lr_scaling", "lr_batch"}:  # the rates follow from the batch size, which is in the name
        alone |= {key: values[key] for key in ("lr", "min_lr", "warmup_lr") if key not in chosen}
    config, recipe_alone = (Config(**each | {"recipe": recipe}) for each in (values, alone))
    check_teacher(config)
    return Command(config, recipe_alone, tuple(notes), typed, frozenset(chosen))


def _shorten_warmup(values: dict[str, Any], alone: dict[str, Any], chosen: set[str], notes: list[str]) -> None:
    """A recipe's warm-up gives way to a choice on the command line: of its other unit, or of fewer epochs than it
    takes."""
    for key, other in (("warmup_epochs", "warmup_steps"), ("warmup_steps", "warmup_epochs")):
        if other in chosen and key not in chosen:
            values[key] = None
    if "warmup_epochs" not in chosen and (values["warmup_epochs"] or 0) > values["epochs"]:
        notes.append(
            f"warm-up: the recipe's {values['warmup_epochs']:g} epochs are more than --epochs; a tenth of those instead"
        )
        values["warmup_epochs"] = alone["warmup_epochs"] = None


class Help(DefaultHelpFormatter):
    """Texts with their defaults; types are shown as metavars."""

    def _get_help_string(self, action: argparse.Action) -> str:
        left_out = any(action.default is none for none in (None, False)) or action.default in ({}, argparse.SUPPRESS)
        return (action.help or "") + " Default: %(default)s." * (not left_out)


def _metavar(hint: Any) -> str:
    """How the value of a type is written: N, X, TEXT, one of several words."""
    parts = [part for part in get_args(hint) or (hint,) if part is not type(None)]
    words = [word for part in (hint, *parts) if get_origin(part) is Literal for word in get_args(part)]
    if words:
        return f"{{{','.join(words)}}}"
    if get_origin(hint) is tuple or get_origin(parts[0]) is tuple:
        return "[X,...]"
    names = {bool: "BOOL", int: "N", float: "X", str: "TEXT"}
    return "KEYWORDS" if hint == dict[str, Any] else "|".join(names[part] for part in parts)


@cache
def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="run.py",
        formatter_class=Help,
        exit_on_error=False,
        allow_abbrev=False,
        description="Train one model: python experiments/run.py --model vit_b16 --devices 8",
        usage="run.py [--flag value ...]",
    )
    parser.add_argument(
        "--config",
        type=str,
        metavar="FILE",
        help="Config file, as config.yaml of a run to repeat; flags win over it, and it wins over the recipe.",
    )
    hints = get_type_hints(Config)
    for title, members in groups().items():
        section = parser.add_argument_group(title)
        for each in members:
            hint = hints[each.name]
            options: dict[str, Any] = {"default": default(each), "help": _help(each), "metavar": _metavar(hint)}
            if hint in BOOLEAN:
                added = section.add_argument(
                    f"--{each.name}", action=ActionYesNo(no_prefix="no_"), nargs="?", **options
                )
                added.metavar = options["metavar"]  # jsonargparse sets its own
            else:
                section.add_argument(f"--{each.name}", type=hint, **options)
    return parser


def _help(each: Field) -> str:
    """The text of a knob. A dictionary of keywords lists the rare knobs that are typed within it."""
    if each.metadata["flag"]:
        return argparse.SUPPRESS
    typed_within = [f"{key} ({other.metadata['help'].rstrip('.')})" for key, other in rare(each.name).items()]
    return (each.metadata["help"] + f" Also {'; '.join(typed_within)}." * bool(typed_within)).replace("%", "%%")


def _by_name(argv: list[str]) -> list[str]:
    """The words of a command line with rare knobs under their names, which the parser knows. Raises UsageError for an
    unknown flag."""
    hints = get_type_hints(Config)
    knobs = {flag(each): each.name for each in fields(Config) if each.metadata["flag"] != RECORDED}
    negations = [f"--no_{name}" for name in knobs.values() if hints[name] in BOOLEAN]
    words = []
    for word in argv:
        typed, sign, value = word.partition("=")
        keywords = hints.get(typed.partition(".")[0][2:]) == dict[str, Any]
        if typed in knobs:
            word = f"--{knobs[typed]}{sign}{value}"
        elif word.startswith("--") and not keywords and typed not in (*negations, "--config", "--help"):
            raise UsageError(_unknown(typed, [*knobs, *negations, "--config"]))
        words.append(word)
    return words


def _unknown(typed: str, known: list[str]) -> str:
    """The error for a flag that does not exist, or no longer does."""
    knob = Config.__dataclass_fields__.get(typed[2:])
    if knob and knob.metadata.get("flag") == RECORDED:
        return f"{typed} is recorded in config.yaml and not typed"
    if knob and knob.metadata.get("flag"):
        return f"{typed} is now typed as {flag(knob)}"
    if typed[2:] in ELSEWHERE:
        return f"unknown flag {typed}; here it is {ELSEWHERE[typed[2:]]} (--help lists them all)"
    return f"unknown flag {typed}{did_you_mean(typed.partition('.')[0], known)} (--help lists them all)"


def plain(cfg: Config) -> dict[str, Any]:
    """The config as YAML writes it: no tuples, and without what belongs to one launch (its name and place, whether it
    resumes)."""
    left_out = ("name", "runs_dir", "overwrite", "resume", "list", "dry_run", "fast_dev_run")
    return {key: _plain(value) for key, value in asdict(cfg).items() if key not in left_out}


def _plain(value: Any) -> Any:
    """Lists for tuples, text for paths, Python's numbers for NumPy's: what YAML, JSON and a checkpoint hold."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value.item() if hasattr(value, "item") else value
