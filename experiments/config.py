"""The one declaration of every knob, and `parse`: defaults < recipe < config file < flags, in any order of flags.
Pure and light: no clock, no randomness, no torch, no file but the recipe and the config file.
"""
import argparse
import re
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from jsonargparse import ActionYesNo, ArgumentParser

RECIPES = Path(__file__).parent / "recipes"


class UsageError(ValueError):
    """The command line or a config file is wrong; the message is for the person who typed it."""


def knob(default: Any, text: str, *, role: Literal["training", "place", "where", "numerics"] = "training") -> Any:
    """One flag. Its role says what a difference means: `training` makes another run with another name; `where` another run, under the same
    name refused; `numerics` another name, but the run may go on with it; `place` neither."""
    return field(default_factory=default if callable(default) else lambda: default, metadata={"help": text, "role": role})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every knob of a run. Field = flag = YAML key."""

    # what is trained
    recipe: str | None = knob(None, "file in experiments/recipes/, or none; left out: demo without any other choice, the model's own name "
                              "on ImageNet, finetune with --init on other data, else none", role="place")
    model: str | None = knob(None, "network: a name of --list models, or timm/<name>")
    model_args: dict[str, Any] = knob(dict, "the network's own keywords, as --model_args.drop_path 0.2")
    image_size: int | str | None = knob(None, "side in pixels, or HEIGHTxWIDTH; left out: the model's own")
    init: str | None = knob(None, "weights to start from: pretrained, a file, a run directory, or a tag of timm's")
    init_head: Literal["keep", "reset"] = knob("keep", "reset starts a fresh head when the one in --init has another size")
    # on what
    data: str | None = knob(None, "data set: a name of --list data; left out: what --data_dir looks like, else imagenet")
    data_dir: str | None = knob(None, "folder of the data", role="where")
    data_args: dict[str, Any] = knob(dict, "the data set's own keywords, as --data_args.per_class 100")
    val_fraction: float = knob(0.1, "share of train held out, stratified, where there is no val folder")
    split_seed: int = knob(0, "seed of that split (never --seed)")
    crop_scale: tuple[float, float] = knob((0.08, 1.0), "area of the random resized crop, as [0.08,1.0]")
    hflip: float = knob(0.5, "probability of a horizontal flip in training")
    interpolation: Literal["bicubic", "bilinear", "nearest"] | None = knob(None, "of resizing; left out: the model's own")
    crop_pct: float | None = knob(None, "share of the resized picture that evaluation crops; left out: the model's own")
    crop_mode: Literal["center", "squash", "border"] | None = knob(None, "of evaluation, in timm's words; left out: the model's own")
    mean: tuple[float, float, float] | None = knob(None, "colour mean, 0-1; left out: the model's own")
    std: tuple[float, float, float] | None = knob(None, "colour standard deviation, 0-1; left out: the model's own")
    # how it learns
    epochs: int = knob(100, "passes over the training pictures")
    global_batch_size: int = knob(128, "pictures in one optimizer step, over all devices, nodes and accumulated passes")
    micro_batch_size: int | None = knob(None, "most pictures one device takes in one pass; left out: what fits its memory", role="place")
    lr: float = knob(1e-3, "true peak learning rate; given here or in --config it is not scaled")
    lr_scaling: Literal["none", "linear", "sqrt"] = knob("none", "how a recipe's lr grows with global_batch_size / lr_batch", role="place")
    lr_batch: int = knob(256, "batch size that a recipe's lr is meant for", role="place")
    min_lr: float = knob(0.0, "learning rate at the end of the cosine")
    warmup_epochs: float | None = knob(None, "epochs of linear warm-up from 0; left out: a tenth of --epochs, 5 at most")
    weight_decay: float = knob(0.05, "of AdamW; none on norms, biases, tokens and positions")
    clip_grad: float | None = knob(1.0, "largest global norm of the gradient; null does not clip")
    label_smoothing: float = knob(0.1, "of the cross entropy")
    patience: int | None = knob(None, "stop after so many epochs without a better val metric; left out: never")
    seed: int = knob(0, "of weights, order, augmentation and dropout")
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = knob(
        "auto", "auto is bf16-mixed on a GPU that has it, 16-mixed on another, 32-true on CPU", role="numerics")
    # where it runs
    devices: int = knob(1, "devices (or CPU processes) on each machine", role="place")
    num_nodes: int = knob(1, "machines", role="place")
    accelerator: Literal["auto", "cpu", "gpu"] = knob("auto", "auto is the GPU where there is one", role="place")
    strategy: str = knob("auto", "Lightning's strategy; auto is ddp for more than one process", role="place")
    workers: int | None = knob(None, "data loading processes of each device; left out: what the machine has", role="place")
    # the run directory
    name: str | None = knob(None, "of the run; left out: data, model, seed and what differs from the recipe", role="place")
    runs_dir: str = knob("runs", "folder of the run directories", role="place")
    resume: str | None = knob(None, "checkpoint or directory of another run to continue in full (weights, optimizer, position)",
                                 role="place")
    overwrite: bool = knob(False, "delete the run directory of that name and start again", role="place")
    save_every_steps: int | None = knob(None, "also save last.ckpt every so many optimizer steps, beside every epoch", role="place")
    log_every_steps: int = knob(50, "optimizer steps between two rows of training metrics", role="place")
    logger: Literal["wandb", "csv", "none"] = knob("wandb", "tracker beside metrics.csv, which is always written", role="place")
    # instead of training
    eval_only: bool = knob(False, "score the test split if there is one, else val")
    dry_run: bool = knob(False, "print the plan, the memory and a time forecast; train nothing, write nothing", role="place")
    list: Literal["models", "data", "recipes"] | None = knob(None, "print what there is and stop", role="place")

    def __post_init__(self) -> None:
        self._check_ranges()
        for key in ("model_args", "data_args"):
            if not isinstance(getattr(self, key), dict):
                raise UsageError(f"--{key} takes keywords, as --{key}.name value")
        if self.image_size is not None:
            height, width = size(self.image_size)
            object.__setattr__(self, "image_size", height if height == width else f"{height}x{width}")  # one spelling of one size
        if self.name is not None and not re.fullmatch(r"[\w][\w.+=-]*", self.name):
            raise UsageError(f"--name {self.name}: letters, digits and . _ + = - only; --runs_dir names the folder")
        if self.eval_only and (self.resume or not self.init):
            raise UsageError("--eval_only takes its weights from --init: a run directory, a file, or pretrained")
        if self.resume and self.overwrite:
            raise UsageError("--resume continues a run and --overwrite deletes one: give only one of them")

    def _check_ranges(self) -> None:
        for key in ("epochs", "global_batch_size", "micro_batch_size", "lr_batch", "devices", "num_nodes", "log_every_steps",
                    "save_every_steps", "patience"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise UsageError(f"--{key} {getattr(self, key)}: must be at least 1")
        for key in ("lr", "min_lr", "weight_decay", "warmup_epochs", "clip_grad", "seed", "split_seed", "workers"):
            if getattr(self, key) is not None and getattr(self, key) < 0:
                raise UsageError(f"--{key} {getattr(self, key)}: must not be negative")
        for key in ("hflip", "label_smoothing", "val_fraction", "crop_pct"):
            if getattr(self, key) is not None and not 0 <= getattr(self, key) <= 1:
                raise UsageError(f"--{key} {getattr(self, key)}: must lie between 0 and 1")
        if self.crop_pct == 0:
            raise UsageError("--crop_pct 0: must be above 0")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise UsageError(f"--crop_scale [{low},{high}]: give two shares of the area, smaller first, above 0 and up to 1")
        if self.warmup_epochs is not None and self.warmup_epochs > self.epochs:
            raise UsageError(f"--warmup_epochs {self.warmup_epochs:g} is more than --epochs {self.epochs}")
        if self.min_lr > self.lr:
            raise UsageError(f"--min_lr {self.min_lr:g} is more than the peak, --lr {self.lr:g}")

    def filled(self, **values: Any) -> "Config":
        """A copy in which the knobs left out (None) take these values."""
        return replace(self, **{key: value for key, value in values.items() if getattr(self, key) is None})


def size(text: int | str | list[int] | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of `224`, `512x1024` or a pair. Raises UsageError."""
    parts = text if isinstance(text, list | tuple) else str(text).lower().split("x")
    if len(parts) not in (1, 2) or not all(str(part).isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--image_size {text}: give one side, as 224, or HEIGHTxWIDTH, as 512x1024")
    return int(parts[0]), int(parts[-1])


@dataclass(frozen=True)
class Command:
    """What was typed: the config, the values of its recipe alone (run names tell the difference), a line on each derived choice."""

    config: Config
    recipe_alone: Config
    notes: tuple[str, ...]
    argv: tuple[str, ...]


def parse(argv: list[str] | None = None) -> Config:
    """The config of a command line. Exits with 2 and one line for any mistake, with 0 after --help."""
    return read(argv).config


def read(argv: list[str] | None = None) -> Command:
    """`parse`, with what the run name and the printed lines need."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _read(argv)
    except (UsageError, argparse.ArgumentError) as error:
        print(f"run.py: {_tidy(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None


def _tidy(message: str) -> str:
    """jsonargparse's words for a wrong value, as one line about the flag."""
    line = " ".join(part.strip() for part in message.splitlines() if part.strip())
    line = re.sub(r'Parser key "([\w.]+)":', r"--\1:", re.sub(r"<class '(\w+)'>", r"\1", line))
    line = re.sub(r"Does not validate against any of the Union subtypes Subtypes: \[(.*)\] Errors:.*Given value type: .* Given value:",
                  lambda found: f"expected {found[1].replace(', NoneType', ' or null')}, got", line)
    line = re.sub(r"(?:typing\.)?Literal\[(.*?)\]", lambda found: " or ".join(found[1].replace("'", "").split(", ")), line)
    return re.sub(r"argument (--\w+)\S*: invalid _boolean_type value:", r"\1: expected true or false, got", line)


def _read(argv: list[str]) -> Command:
    _check_flags(argv)
    parser = _parser([])
    given = {key: value for key, value in vars(parser.parse_args(argv, defaults=False)).items() if not key.startswith("__")}
    config_file = given.pop("config", None)
    stored = _yaml_keys(Path(config_file), f"--config {config_file}") if config_file else {}
    recipe, why = choose_recipe({**stored, **given}, "recipe" in given)
    layers = [RECIPES / f"{recipe}.yaml"] if recipe != "none" else []
    if layers:
        _check_recipe(layers[0])
    alone = vars(_parser(layers).parse_args([]))
    values = vars(_parser([*layers, Path(config_file)] if config_file else layers).parse_args(argv))
    chosen = {*stored, *given}
    notes = [f"recipe {recipe} ({why})"]
    if (values["warmup_epochs"] or 0) > values["epochs"] and "warmup_epochs" not in chosen:
        notes.append(f"warm-up: the recipe's {values['warmup_epochs']:g} epochs are more than --epochs; a tenth of those instead")
        values["warmup_epochs"] = alone["warmup_epochs"] = None
    if values["data_dir"] and "data" not in chosen:  # the folder says what it is; a recipe's data set is for where nothing is said
        values["data"] = alone["data"] = None
    values = _scale_lr(values, notes, true_peak="lr" in chosen)
    if not chosen & {"lr", "lr_scaling", "lr_batch"}:  # then the peak follows from the batch size, which names the run already
        alone["lr"] = values["lr"]
    known = [knob_.name for knob_ in fields(Config)]
    config, recipe_alone = (Config(**{key: layer[key] for key in known} | {"recipe": recipe}) for layer in (values, alone))
    return Command(config, recipe_alone, tuple(notes), tuple(argv))


def choose_recipe(given: dict[str, Any], asked: bool) -> tuple[str, str]:
    """The recipe's name (or `none`) and why, from the knobs that were given. Raises UsageError for an unknown one."""
    known = recipe_names()
    if given.get("recipe"):
        name, why = given["recipe"], "asked for" if asked else "from the config file"
        if name != "none" and name not in known:
            raise UsageError(f"no recipe named {name!r}{did_you_mean(name, known)} (there are {', '.join(known)}, none)")
        return name, why
    if not any(given.get(key) for key in ("model", "data", "data_dir", "init", "list")):
        return "demo", "no model and no data named"
    on_imagenet = given.get("data") == "imagenet" or not (given.get("data") or given.get("data_dir"))
    if on_imagenet and given.get("model") in known:
        return given["model"], "the model's own on ImageNet"
    if given.get("init") and not on_imagenet and not given.get("eval_only") and "finetune" in known:
        return "finetune", "--init on other data"
    return "none", "none fits; the defaults"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def did_you_mean(word: str, known: list[str]) -> str:
    near = get_close_matches(word, known, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _parser(files: list[Path]) -> ArgumentParser:
    parser = ArgumentParser(prog="run.py", default_config_files=[str(file) for file in files], exit_on_error=False, allow_abbrev=False,
                            description="Train one model: python experiments/run.py --model vit_b16 --devices 8",
                            usage="run.py [--flag value ...]")
    parser.add_argument("--config", type=str, help="config.yaml of a run to repeat; flags win over it, it wins over the recipe")
    hints = get_type_hints(Config)
    for knob_ in fields(Config):
        default = knob_.default_factory()
        options: dict[str, Any] = {"default": default, "help": knob_.metadata["help"].replace("%", "%%")}
        if hints[knob_.name] is bool:
            parser.add_argument(f"--{knob_.name}", action=ActionYesNo(no_prefix="no_"), nargs="?", **options)
        else:
            parser.add_argument(f"--{knob_.name}", type=hints[knob_.name], **options)
    return parser


def _check_flags(argv: list[str]) -> None:
    known = {f"--{knob_.name}": get_type_hints(Config)[knob_.name] for knob_ in fields(Config)} | {"--config": str, "--help": bool}
    negations = {f"--no_{flag[2:]}" for flag, hint in known.items() if hint is bool}
    for word in argv:
        flag = word.split("=")[0]
        root = flag.split(".")[0]
        if not word.startswith("--") or flag in negations or root in known and (flag == root or known[root] == dict[str, Any]):
            continue
        raise UsageError(f"unknown flag {flag}{did_you_mean(root, [*known, *negations])} (--help lists them all)")


def _yaml_keys(file: Path, name: str) -> dict[str, Any]:
    """The top level of a YAML file, its keys checked against Config. Raises UsageError."""
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{name} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{name} holds no keys")
    known = [knob_.name for knob_ in fields(Config)]
    for key in content:
        if key not in known:
            raise UsageError(f"{name}: unknown key {key!r}{did_you_mean(str(key), known)}")
    return content


def _check_recipe(file: Path) -> None:
    for key in _yaml_keys(file, f"recipe {file.stem}"):
        if key in ("data_args", "data_dir", "runs_dir", "name", "resume", "recipe"):
            raise UsageError(f"recipe {file.stem} sets {key!r}: a recipe may set model and data, never paths or data_args")


def _scale_lr(values: dict[str, Any], notes: list[str], *, true_peak: bool) -> dict[str, Any]:
    """Apply the recipe's scaling rule, unless the rate was given as the true peak."""
    rule, batch, base, lr = values["lr_scaling"], values["global_batch_size"], values["lr_batch"], values["lr"]
    if true_peak or rule == "none" or not base or base < 1:
        return {**values, "lr_scaling": "none"}
    peak = lr * batch / base if rule == "linear" else lr * (batch / base) ** 0.5
    notes.append(f"lr {peak:g} = {lr:g} x {f'{batch}/{base}' if rule == 'linear' else f'sqrt({batch}/{base})'}")
    return {**values, "lr": peak}


def plain(cfg: Config) -> dict[str, Any]:
    """The config as YAML writes it: no tuples, and without what belongs to one launch (its name and place, whether it resumes)."""
    left_out = ("name", "runs_dir", "overwrite", "resume", "list", "dry_run")
    return {key: _plain(value) for key, value in asdict(cfg).items() if key not in left_out}


def _plain(value: Any) -> Any:
    """Lists for tuples, text for paths, Python's numbers for NumPy's: what YAML, JSON and a checkpoint hold."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value.item() if hasattr(value, "item") else value

