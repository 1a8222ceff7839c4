"""Every knob of a run, composed from three rooms: the data's (datamodules/knobs.py), those of learning
(lightning_modules/knobs.py) and those of a run, declared here. No torch."""

from dataclasses import Field, dataclass, fields
from typing import Any, ClassVar, Literal

from datamodules import knobs as data
from datamodules.knobs import AT_LEAST_1, NOT_NEGATIVE, knob
from lightning_modules import knobs as learning

RECORDED = "recorded"  # in place of a flag: written to config.yaml, never typed


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
        flag="augment_args.function",
    )


@dataclass(kw_only=True)
class Folds:
    """The folds of a table, run one after the other."""

    title: ClassVar[str] = data.Table.title

    hours: float | None = knob(
        None,
        "Hours that --folds may take; a fold that would not end in time is not started.",
        NOT_NEGATIVE,
        role="place",
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
        None, "Optimizer steps that the run of --extend has done, recorded in config.yaml.", role="place", flag=RECORDED
    )
    overwrite: bool = knob(False, "Delete the run directory of that name and start again.", role="place")
    save_every_steps: int | None = knob(
        None, "Save last.ckpt also each time this number of optimizer steps is done.", AT_LEAST_1, role="place"
    )


@dataclass(kw_only=True)
class Tracking:
    """Loggers and how often they get a row."""

    title: ClassVar[str] = "Logging"

    log_every_steps: int = knob(50, "Optimizer steps between two rows of training metrics.", AT_LEAST_1, role="place")
    logger: Literal["wandb", "tensorboard", "csv", "none"] = knob(
        "wandb", "Experiment tracker beside metrics.csv, which is always written.", role="place"
    )
    tags: str | None = knob(None, "Tags of the run in W&B, separated by commas.", role="place", flag="logger_args.tags")
    notes: str | None = knob(None, "Notes on the run in W&B.", role="place", flag="logger_args.notes")
    logger_args: dict[str, Any] = knob(
        dict,
        "Rarer settings of the logger, as --logger_args.checkpoint true: checkpoint uploads the best weights at the "
        "end, attention logs attention maps of 8 images.",
        role="place",
    )


@dataclass(kw_only=True)
class Instead:
    """Dry runs and lists."""

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
class Knobs(  # the last group first: dataclasses collect the fields of their bases from the end
    Instead,
    Tracking,
    Directory,
    Machines,
    learning.Distillation,
    Scaling,
    learning.Learning,
    data.Batches,
    data.Augmentation,
    data.Preparation,
    Folds,
    data.Table,
    data.ImageFiles,
    data.Source,
    DataSet,
    Network,
):
    """Every knob of a run. Field = YAML key = flag, but for the rare ones that are typed within a dictionary."""


def groups() -> dict[str, list[Field]]:
    """The knobs under their headings, in the order of `--help`."""
    declared = {each.name: each for each in fields(Knobs)}
    rooms = {base: vars(base)["title"] for base in reversed(Knobs.__mro__) if "title" in vars(base)}
    found: dict[str, list[Field]] = {title: [] for title in rooms.values()}
    for room, title in rooms.items():
        for name in room.__annotations__.keys() & declared.keys():
            found[declared[name].metadata["group"] or title].append(declared[name])
    return {title: sorted(members, key=[*declared.values()].index) for title, members in found.items()}


def flag(each: Field) -> str:
    """The flag of a knob: --cache_dir, --data_args.cache_side."""
    return f"--{each.metadata['flag'] or each.name}"


def rare(within: str) -> dict[str, Field]:
    """Key -> knob, of the rare knobs that are typed within a dictionary of keywords."""
    typed = {each.metadata["flag"].partition(".")[::2]: each for each in fields(Knobs)}
    return {key: each for (dictionary, key), each in typed.items() if dictionary == within}
