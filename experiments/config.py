"""The one declaration of every knob, and `parse`: defaults < recipe < config file < flags, in any order of flags.
Pure and light: no clock, no randomness, no torch, no file but the recipe and the config file.
"""

import argparse
import re
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from jsonargparse import ActionYesNo, ArgumentParser

from experiments.cli import launcher, recipes
from experiments.cli.checks import check, check_teacher
from experiments.cli.errors import UsageError, did_you_mean, size

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


def knob(default: Any, text: str, *, role: Literal["training", "place", "where", "numerics"] = "training") -> Any:
    """One flag. Its role says what a difference means: `training` makes another run with another name; `where` another
    run, under the same name refused; `numerics` another name, but the run may go on with it; `place` neither."""
    return field(
        default_factory=default if callable(default) else lambda: default, metadata={"help": text, "role": role}
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every knob of a run. Field = flag = YAML key."""

    # what is trained
    recipe: str | None = knob(
        None,
        "file in experiments/recipes/, or none; left out: demo without any other choice, the model's own name "
        "on ImageNet, finetune with --init on other data, else none",
        role="place",
    )
    model: str | None = knob(None, "network: a name of --list models, or timm/<name>")
    model_args: dict[str, Any] = knob(dict, "the network's own keywords, as --model_args.drop_path 0.2")
    image_size: int | str | None = knob(None, "side in pixels, or HEIGHTxWIDTH; left out: the model's own")
    init: str | None = knob(
        None,
        "weights to start from: pretrained, a file, a run directory (over folds: each fold takes its own), or a "
        "tag of timm's",
    )
    init_head: Literal["keep", "reset"] = knob(
        "keep",
        "keep takes the head's rows by the names of classes or "
        "targets, where both are known; reset starts a fresh head where the "
        "one in --init has another size or other names",
    )
    init_partial: bool = knob(False, "take weights that lack tensors of the model beside its head, which start fresh")
    allow_seen: bool = knob(
        False, "take weights (--init, --teacher) although they have learned rows that are held out here", role="place"
    )
    # from whom
    teacher: str | None = knob(
        None,
        "trained network to learn from: a run (over folds: each takes its own), a file, a name of --list models "
        "or timm/<name>; several by commas; or the folder of prepare.py teacher",
    )
    teacher_init: str | None = knob(
        None, "weights of a teacher given by name: a file or a run; left out: those timm publishes"
    )
    distill: str | None = knob(
        None, "what is learned from the teacher: a name of --list losses; left out: hard, DeiT's (mse for regression)"
    )
    distill_args: dict[str, Any] = knob(
        dict,
        "its keywords, as --distill_args.tau 3; alpha: the teacher's share of the loss; "
        "warmup_epochs: over which that term rises",
    )
    # on what
    data: str | None = knob(
        None, "data set: a name of --list data; left out: what --data_dir looks like, else imagenet"
    )
    data_dir: str | None = knob(None, "folder of the data", role="where")
    data_args: dict[str, Any] = knob(dict, "the data set's own keywords, as --data_args.per_class 100")
    target: str | None = knob(
        None, "of a table: target column, several by commas; left out: what train.csv and sample_submission.csv tell"
    )
    task: Literal["classification", "multilabel", "regression"] | None = knob(
        None, "of a table; left out: what the targets look like"
    )
    image: str | None = knob(
        None, "of a table: where the pictures are, as {split}/{Id}.jpg; left out: what the folders tell"
    )
    group: str | None = knob(None, "of a table: column whose equal values never lie on both sides of a split")
    metric: str | None = knob(
        None, "chooses the best epoch (of equals the first): a name of --list metrics, or my.py:function"
    )
    bad_images: Literal["error", "skip"] = knob(
        "error",
        "pictures that are missing or cannot be read: skip leaves them out and lists them in "
        "skipped.csv; a run goes on without those that break later",
        role="place",
    )
    bad_rows: Literal["error", "skip"] = knob(
        "error", "of a table: rows without a label; skip neither trains on them nor scores them"
    )
    folds: int | None = knob(None, "of a table: train on every fold in turn, each a process of its own, and merge")
    fold: int | None = knob(None, "of --folds: only this one, from 0 on")
    hours: float | None = knob(
        None, "time that --folds may take; a fold that would not end in it is not started", role="place"
    )
    cache_dir: str | None = knob(
        None, "keep pictures decoded and resized in this folder, for all runs that share it", role="place"
    )
    cache_side: int | None = knob(
        None, "shorter side of the pictures in --cache_dir; left out: what evaluation resizes them to"
    )
    val_fraction: float = knob(0.1, "share of train held out, stratified, where there is no val folder")
    split_seed: int = knob(0, "seed of that split (never --seed)")
    crop_scale: tuple[float, float] = knob((0.08, 1.0), "area of the random resized crop, as [0.08,1.0]")
    hflip: float = knob(0.5, "probability of a horizontal flip in training")
    rand_augment: str | None = knob(None, "RandAugment in timm's words, as rand-m9-n2-p0.5-mstd0.5-inc1")
    random_erasing: float = knob(0.0, "probability of erasing a box of a training picture")
    repeated_augment: int = knob(
        1, "times a picture comes in an epoch, each time augmented anew; the epoch's length stays"
    )
    mixup: float = knob(0.0, "alpha of mixup; 0 is off")
    cutmix: float = knob(0.0, "alpha of CutMix; 0 is off")
    augment_args: dict[str, Any] = knob(
        dict,
        "rarer: auto_augment (original, v0, 3a, augmix-m3-w3), color_jitter, vflip, crop_ratio, "
        "erasing_mode (pixel, rand, const), erasing_count, mix_prob, mix_switch_prob, mix_mode (batch, pair, "
        "elem, roll), cutmix_minmax; as --augment_args.mix_mode elem",
    )
    augment: str | None = knob(
        None, "own augmentation in place of the crop, flips and policy: my.py:build, called with (height, width)"
    )
    train_size: int | str | None = knob(
        None, "side of training crops where it is not --image_size: 160, or rising with the epochs, 128-224"
    )
    interpolation: Literal["bicubic", "bilinear", "nearest"] | None = knob(
        None, "of resizing; left out: the model's own"
    )
    crop_pct: float | None = knob(None, "share of the resized picture that evaluation crops; left out: the model's own")
    crop_mode: Literal["center", "squash", "border"] | None = knob(
        None, "of evaluation, in timm's words; left out: the model's own"
    )
    mean: tuple[float, float, float] | None = knob(None, "colour mean, 0-1; left out: the model's own")
    std: tuple[float, float, float] | None = knob(None, "colour standard deviation, 0-1; left out: the model's own")
    # how it learns
    epochs: int = knob(100, "passes over the training pictures")
    global_batch_size: int = knob(128, "pictures in one optimizer step, over all devices, nodes and accumulated passes")
    micro_batch_size: int | None = knob(
        None, "most pictures one device takes in one pass; left out: what fits its memory", role="place"
    )
    lr: float = knob(1e-3, "true peak learning rate; given here or in --config it is not scaled")
    lr_scaling: Literal["none", "linear", "sqrt"] = knob(
        "none", "how a recipe's lr grows with global_batch_size / lr_batch", role="place"
    )
    lr_batch: int = knob(256, "batch size that a recipe's lr is meant for", role="place")
    schedule: Literal["cosine", "timm", "deit", "swin", "convnext"] = knob(
        "cosine", "warm-up and cosine: by step; or as timm's, DeiT's, Swin's or ConvNeXt's own trainer does it"
    )
    min_lr: float = knob(0.0, "learning rate at the end of the cosine")
    warmup_lr: float = knob(0.0, "learning rate at the start of the warm-up")
    warmup_epochs: float | None = knob(None, "epochs of linear warm-up; left out: a tenth of --epochs, 5 at most")
    warmup_steps: int | None = knob(None, "the same in optimizer steps")
    optimizer: Literal["adamw", "lamb", "sgd", "muon"] = knob(
        "adamw", "timm's; muon takes AdamW for what is no hidden matrix"
    )
    optimizer_args: dict[str, Any] = knob(dict, "its own keywords, as --optimizer_args.betas [0.9,0.95]")
    weight_decay: float = knob(0.05, "none on norms, biases, tokens and positions")
    layer_decay: float | None = knob(
        None,
        "factor of the learning rate for each layer further from the head, as 0.75; ConvNeXt has 12 layers "
        "between stem and head, as published, other networks one a block",
    )
    head_lr_scale: float = knob(1.0, "factor of the head's learning rate")
    freeze: str | None = knob(None, "what stays as it is: backbone, or the first share of the layers, as 0.5")
    clip_grad: float | None = knob(1.0, "largest gradient; null does not clip")
    clip_mode: Literal["norm", "value"] = knob("norm", "what --clip_grad bounds: the global norm, or each value")
    loss: (
        Literal[
            "cross_entropy", "bce", "bce_rsb", "bce_deit3", "sigmoid", "mse", "l1", "huber", "ordinal", "distribution"
        ]
        | None
    ) = knob(None, "a name of --list losses; left out: cross_entropy for classification, else bce")
    loss_args: dict[str, Any] = knob(
        dict, "its own keywords, as --loss_args.bins 20; target_weights of several targets"
    )
    label_smoothing: float = knob(0.1, "of the targets")
    ema_decay: float | None = knob(
        None, "keep an exponential moving average of the weights, as 0.9999, scored beside them"
    )
    use_ema: bool | None = knob(
        None, "choose, score and predict with the averaged weights; left out: where they are kept"
    )
    average_checkpoints: str | None = knob(None, "end with the mean of the weights of several epochs: last-5 or best-3")
    patience: int | None = knob(None, "stop after so many epochs without a better val metric; left out: never")
    seed: int = knob(0, "of weights, order, augmentation and dropout")
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = knob(
        "auto", "auto is bf16-mixed on a GPU that has it, 16-mixed on another, 32-true on CPU", role="numerics"
    )
    # where it runs
    devices: int = knob(1, "devices (or CPU processes) on each machine", role="place")
    num_nodes: int = knob(1, "machines", role="place")
    accelerator: Literal["auto", "cpu", "gpu"] = knob("auto", "auto is the GPU where there is one", role="place")
    strategy: str = knob(
        "auto",
        "Lightning's strategy; auto is ddp for more than one process; folds: a device for each of --folds",
        role="place",
    )
    workers: int | None = knob(
        None, "data loading processes of each device; left out: what the machine has", role="place"
    )
    # the run directory
    name: str | None = knob(
        None, "of the run; left out: data, model, seed and what differs from the recipe", role="place"
    )
    runs_dir: str = knob("runs", "folder of the run directories", role="place")
    resume: str | None = knob(
        None, "checkpoint or directory of another run to continue in full (weights, optimizer, position)", role="place"
    )
    extend: str | None = knob(
        None,
        "finished run to train longer, up to --epochs: its state goes on, the schedule runs anew over what is added",
    )
    extend_step: int | None = knob(
        None, "optimizer steps that --extend's run has done; left out: as it says", role="place"
    )
    overwrite: bool = knob(False, "delete the run directory of that name and start again", role="place")
    save_every_steps: int | None = knob(
        None, "also save last.ckpt every so many optimizer steps, beside every epoch", role="place"
    )
    log_every_steps: int = knob(50, "optimizer steps between two rows of training metrics", role="place")
    logger: Literal["wandb", "tensorboard", "csv", "none"] = knob(
        "wandb", "tracker beside metrics.csv, which is always written", role="place"
    )
    tags: str | None = knob(None, "of the run in W&B, several by commas", role="place")
    notes: str | None = knob(None, "on the run in W&B", role="place")
    logger_args: dict[str, Any] = knob(
        dict,
        "rarer: checkpoint (true uploads the best weights at the end), attention (true: maps of 8 pictures); "
        "as --logger_args.checkpoint true",
        role="place",
    )
    # less, or something else, than training
    limit_val: int | None = knob(
        None, "pictures of val, and of test, that are scored, evenly spaced over each; left out: all"
    )
    fast_dev_run: bool = knob(
        False,
        "try everything in a temporary directory that is deleted: two optimizer steps, 16 pictures of val "
        "and of test, checkpoints, predictions, report",
        role="place",
    )
    eval_only: bool = knob(False, "score the test split if there is one, else val")
    dry_run: bool = knob(
        False, "print the plan, the memory and a time forecast; train nothing, write nothing", role="place"
    )
    list: Literal["models", "data", "recipes", "losses", "metrics"] | None = knob(
        None, "print what there is and stop", role="place"
    )

    def __post_init__(self) -> None:
        if self.image_size is not None:
            height, width = size(self.image_size)
            object.__setattr__(
                self, "image_size", height if height == width else f"{height}x{width}"
            )  # one spelling of one size
        check(self)

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
    for knob_ in fields(Config):
        default = knob_.default_factory()
        options: dict[str, Any] = {"default": default, "help": knob_.metadata["help"].replace("%", "%%")}
        if hints[knob_.name] in BOOLEAN:
            parser.add_argument(f"--{knob_.name}", action=ActionYesNo(no_prefix="no_"), nargs="?", **options)
        else:
            parser.add_argument(f"--{knob_.name}", type=hints[knob_.name], **options)
    return parser


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
