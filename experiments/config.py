"""The command line of a run: all knobs in one frozen `Config`, and `parse`: defaults < recipe < config file < flags, in
any order of flags.

The knobs of the data are declared in datamodules/knobs.py, those of learning in lightning_modules/knobs.py, those of a
run here. Pure and light: no clock, no randomness, no torch, no file but the recipe and the config file.
"""

import argparse
import re
import sys
from dataclasses import Field, FrozenInstanceError, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_type_hints

from jsonargparse import ActionYesNo, ArgumentParser

from datamodules import knobs as data_knobs
from datamodules.knobs import AT_LEAST_1, NOT_NEGATIVE, default, height_width, knob
from experiments.cli import launcher, recipes
from experiments.cli.checks import check, check_teacher
from experiments.cli.errors import UsageError, did_you_mean
from lightning_modules import knobs as learning_knobs

BOOLEAN = (bool, bool | None)
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
class Network:
    """The network and its first weights."""

    title: ClassVar[str] = "What is trained"

    recipe: str | None = knob(
        None,
        "Recipe: the name of a file in experiments/recipes/, or none. Default: demo without any other choice, the "
        "model's own name on ImageNet, finetune with --init on other data, else none.",
        role="place",
    )
    model: str | None = knob(None, "Network: a name of --list models, or timm/<name>.")
    model_args: dict[str, Any] = knob(dict, "Keywords of the network, as --model_args.drop_path 0.2.")
    init: str | None = knob(
        None,
        "Weights to start from: pretrained, a file, a run directory (over folds: each fold takes its own), or a tag "
        "of timm's.",
    )
    init_head: Literal["keep", "reset"] = knob(
        "keep",
        "What to do with the head of --init: keep takes its rows by the names of classes or targets, where both are "
        "known; reset starts a fresh head where the size or the names differ.",
    )
    init_partial: bool = knob(
        False, "Accept weights that lack tensors of the model beside its head; these tensors start fresh."
    )
    allow_seen: bool = knob(
        False, "Accept weights (--init, --teacher) that were trained on rows held out here.", role="place"
    )


@dataclass(kw_only=True)
class DataSet:
    """The data set."""

    title: ClassVar[str] = "On what"

    data: str | None = knob(
        None, "Data set, a name of --list data. Default: what --data_dir looks like, else imagenet."
    )
    data_args: dict[str, Any] = knob(dict, "Keywords of the data set, as --data_args.per_class 100.")
    augment: str | None = knob(
        None,
        "Augmentation of your own in place of crop, flips and policy: my.py:build, called with (height, width).",
        group="Augmentation",
    )
    hours: float | None = knob(
        None,
        "Hours that --folds may take; a fold that would not end in time is not started.",
        NOT_NEGATIVE,
        role="place",
        group="Tables (a folder with train.csv)",
    )


@dataclass(kw_only=True)
class Scaling:
    """How the learning rate of a recipe follows the batch size."""

    title: ClassVar[str] = "How it learns"

    lr_scaling: Literal["none", "linear", "sqrt"] = knob(
        "none", "How the lr of a recipe grows with global_batch_size / lr_batch.", role="place"
    )
    lr_batch: int = knob(256, "Batch size that the lr of a recipe is meant for.", AT_LEAST_1, role="place")


@dataclass(kw_only=True)
class Machines:
    """Devices and how they compute."""

    title: ClassVar[str] = "Where it runs"

    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = knob(
        "auto",
        "Precision of computation: auto is bf16-mixed on a GPU that has it, 16-mixed on another GPU, 32-true on CPU.",
        role="numerics",
    )
    devices: int = knob(1, "Devices (or CPU processes) of each machine.", AT_LEAST_1, role="place")
    num_nodes: int = knob(1, "Number of machines.", AT_LEAST_1, role="place")
    accelerator: Literal["auto", "cpu", "gpu"] = knob(
        "auto", "Kind of device: auto is the GPU where there is one.", role="place"
    )
    strategy: str = knob(
        "auto",
        "Lightning's strategy: auto is ddp for more than one process; folds gives each of --folds a device.",
        role="place",
    )


@dataclass(kw_only=True)
class Directory:
    """The run directory: its name, what it resumes, what is saved."""

    title: ClassVar[str] = "The run directory"

    name: str | None = knob(
        None, "Name of the run. Default: data, model, seed and what differs from the recipe.", role="place"
    )
    runs_dir: str = knob("runs", "Folder of the run directories.", role="place")
    resume: str | None = knob(
        None, "Checkpoint or directory of another run to resume in full (weights, optimizer, position).", role="place"
    )
    extend: str | None = knob(
        None,
        "Finished run to train longer, up to --epochs: its state is taken, and the schedule runs anew over the epochs "
        "that are added.",
    )
    extend_step: int | None = knob(
        None, "Optimizer steps that the run of --extend has done. Default: read from it.", role="place"
    )
    overwrite: bool = knob(False, "Delete the run directory of that name and start again.", role="place")
    save_every_steps: int | None = knob(
        None, "Save last.ckpt also each time this number of optimizer steps is done.", AT_LEAST_1, role="place"
    )


@dataclass(kw_only=True)
class Tracking:
    """What is logged where."""

    title: ClassVar[str] = "Logging"

    log_every_steps: int = knob(50, "Optimizer steps between two rows of training metrics.", AT_LEAST_1, role="place")
    logger: Literal["wandb", "tensorboard", "csv", "none"] = knob(
        "wandb", "Experiment tracker beside metrics.csv, which is always written.", role="place"
    )
    tags: str | None = knob(None, "Tags of the run in W&B, separated by commas.", role="place")
    notes: str | None = knob(None, "Notes on the run in W&B.", role="place")
    logger_args: dict[str, Any] = knob(
        dict,
        "Rarer settings of the logger, as --logger_args.checkpoint true: checkpoint uploads the best weights at the "
        "end, attention logs attention maps of 8 images.",
        role="place",
    )


@dataclass(kw_only=True)
class Instead:
    """Less, or something else, than training."""

    title: ClassVar[str] = "Instead of training"

    fast_dev_run: bool = knob(
        False,
        "Try everything in a temporary directory that is deleted: two optimizer steps, 16 images of val and of test, "
        "checkpoints, predictions, report.",
        role="place",
    )
    dry_run: bool = knob(
        False, "Print the plan, the memory and a time forecast; train nothing and write nothing.", role="place"
    )
    list: Literal["models", "data", "recipes", "losses", "metrics"] | None = knob(
        None, "List the names of one kind and exit.", role="place"
    )


@dataclass(kw_only=True)
class Config(  # the last group first: dataclasses collect the fields of their bases from the end
    Instead,
    Tracking,
    Directory,
    Machines,
    learning_knobs.Distillation,
    Scaling,
    learning_knobs.Learning,
    data_knobs.Batches,
    data_knobs.Augmentation,
    data_knobs.Preparation,
    data_knobs.Table,
    data_knobs.ImageFiles,
    data_knobs.Source,
    DataSet,
    Network,
):
    """Every knob of a run, frozen. Field = flag = YAML key."""

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

    def filled(self, **values: Any) -> "Config":
        """A copy in which the knobs left out (None) take these values."""
        return replace(self, **{key: value for key, value in values.items() if getattr(self, key) is None})


@dataclass(frozen=True)
class Command:
    """What was typed: the config, the values of its recipe alone (run names tell the difference), a line on each
    derived choice, and the names of the knobs that flags and config file give."""

    config: Config
    recipe_alone: Config
    notes: tuple[str, ...]
    argv: tuple[str, ...]
    chosen: frozenset[str] = frozenset()


def parse(argv: list[str] | None = None) -> Config:
    """The config of a command line. Exits with 2 and one line for any mistake, with 0 after --help."""
    return read(argv).config


def read(argv: list[str] | None = None, prog: str = "run.py") -> Command:
    """`parse`, with what the run name and the printed lines need; `prog` is who speaks of a mistake."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _read(argv)
    except (UsageError, argparse.ArgumentError) as error:
        raise SystemExit(launcher.refuse(prog, _tidy(str(error)))) from None


def _tidy(message: str) -> str:
    """jsonargparse's words for a wrong value, as one line about the flag."""
    line = " ".join(part.strip() for part in message.splitlines() if part.strip())
    line = re.sub(r'Parser key "([\w.]+)":', r"--\1:", re.sub(r"<class '(\w+)'>", r"\1", line))
    line = re.sub(
        r"Does not validate against any of the Union subtypes Subtypes: \[(.*)\] Errors:.*Given value type: .* Given "
        r"value:",
        lambda found: f"expected {found[1].replace(', NoneType', ' or null')}, got",
        line,
    )
    line = re.sub(
        r"(?:typing\.)?Literal\[(.*?)\]", lambda found: " or ".join(found[1].replace("'", "").split(", ")), line
    )
    return re.sub(r"argument (--\w+)\S*: invalid _boolean_type value:", r"\1: expected true or false, got", line)


def _read(argv: list[str]) -> Command:
    _check_flags(argv)
    parser, known = _parser([]), [knob_.name for knob_ in fields(Config)]
    given = {
        key: value for key, value in vars(parser.parse_args(argv, defaults=False)).items() if not key.startswith("__")
    }
    config_file = given.pop("config", None)
    stored = recipes.yaml_keys(Path(config_file), f"--config {config_file}", known) if config_file else {}
    recipe, why = recipes.choose_recipe({**stored, **given}, "recipe" in given)
    layers = [recipes.RECIPES / f"{recipe}.yaml"] if recipe != "none" else []
    if layers:
        recipes.check_recipe(layers[0], known)
    alone = vars(_parser(layers).parse_args([]))
    values = vars(_parser([*layers, Path(config_file)] if config_file else layers).parse_args(argv))
    chosen = {*stored, *given}
    notes = [f"recipe {recipe} ({why})"]
    if values["model"] != recipes.recipe_model(recipe) and recipes.recipe_model(recipe) and alone["model_args"]:
        notes.append(
            f"model_args of the recipe are for {alone['model']} and left out: {', '.join(alone['model_args'])}"
        )
        values["model_args"], alone["model_args"] = (
            {**(stored.get("model_args") or {}), **(given.get("model_args") or {})},
            {},
        )
    _shorten_warmup(values, alone, chosen, notes)
    if (
        values["data_dir"] and "data" not in chosen
    ):  # the folder says what it is; a recipe's data set is for where nothing is said
        values["data"] = alone["data"] = None
    values = recipes.scale_lr(values, notes, true_peak="lr" in chosen)
    recipes.lower_ends(values, alone, chosen, notes)
    if not chosen & {
        "lr",
        "lr_scaling",
        "lr_batch",
    }:  # then the rates follow from the batch size, which names the run already
        alone |= {key: values[key] for key in ("lr", "min_lr", "warmup_lr") if key not in chosen}
    config, recipe_alone = (
        Config(**{key: layer[key] for key in known} | {"recipe": recipe}) for layer in (values, alone)
    )
    check_teacher(config)
    return Command(config, recipe_alone, tuple(notes), tuple(argv), frozenset(chosen))


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


def _parser(files: list[Path]) -> ArgumentParser:
    parser = ArgumentParser(
        prog="run.py",
        default_config_files=[str(file) for file in files],
        exit_on_error=False,
        allow_abbrev=False,
        description="Train one model: python experiments/run.py --model vit_b16 --devices 8",
        usage="run.py [--flag value ...]",
    )
    parser.add_argument(
        "--config", type=str, help="config.yaml of a run to repeat; flags win over it, it wins over the recipe"
    )
    hints = get_type_hints(Config)
    for title, members in groups().items():
        section = parser.add_argument_group(title)
        for each in members:
            options: dict[str, Any] = {"default": default(each), "help": each.metadata["help"].replace("%", "%%")}
            if hints[each.name] in BOOLEAN:
                section.add_argument(f"--{each.name}", action=ActionYesNo(no_prefix="no_"), nargs="?", **options)
            else:
                section.add_argument(f"--{each.name}", type=hints[each.name], **options)
    return parser


def groups() -> dict[str, list[Field]]:
    """The knobs under their headings, in the order of `--help`."""
    declared, found = {each.name: each for each in fields(Config)}, {}
    for base in reversed(Config.__mro__):
        for name in base.__dict__.get("__annotations__", {}):
            if name in declared:
                found.setdefault(declared[name].metadata["group"] or base.title, []).append(declared[name])
    return found


def _check_flags(argv: list[str]) -> None:
    known = {f"--{knob_.name}": get_type_hints(Config)[knob_.name] for knob_ in fields(Config)} | {
        "--config": str,
        "--help": bool,
    }
    negations = {f"--no_{flag[2:]}" for flag, hint in known.items() if hint in BOOLEAN}
    for word in argv:
        flag = word.split("=")[0]
        root = flag.split(".")[0]
        if (
            not word.startswith("--")
            or flag in negations
            or root in known
            and (flag == root or known[root] == dict[str, Any])
        ):
            continue
        raise UsageError(f"unknown flag {flag}{did_you_mean(root, [*known, *negations])} (--help lists them all)")


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
