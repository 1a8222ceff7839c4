"""Recipes: the choice of one, the keys it may set, and the learning rate of its scaling rule. No torch."""

from pathlib import Path
from typing import Any

import yaml

from datamodules.loading.closest import did_you_mean
from experiments.cli.errors import UsageError

RECIPES = Path(__file__).parents[1] / "recipes"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def choose_recipe(given: dict[str, Any], asked: bool) -> tuple[str, str]:
    """The recipe's name (or `none`) and why, from the knobs that were given. Raises UsageError for an unknown one."""
    known = recipe_names()
    if given.get("recipe"):
        name, why = given["recipe"], "asked for" if asked else "from the config file"
        if name != "none" and name not in known:
            raise UsageError(
                f"no recipe named {name!r}{did_you_mean(name, known)} (there are {', '.join(known)}, none)"
            )
        return name, why
    if not any(given.get(key) for key in ("model", "data", "data_dir", "init", "list")):
        return "demo", "no model and no data named"
    on_imagenet = given.get("data") == "imagenet" or not (given.get("data") or given.get("data_dir"))
    if on_imagenet and given.get("model") in known and not given.get("eval_only"):
        return given["model"], "the model's own on ImageNet"
    if given.get("init") and not on_imagenet and not given.get("eval_only") and "finetune" in known:
        return "finetune", "--init on other data"
    return "none", "none fits; the defaults"


def recipe_data(name: str | None) -> str | None:
    """The data set that a recipe is for, if it names one."""
    return _content(name).get("data")


def recipe_model(name: str | None) -> str | None:
    """The network that a recipe is for, if it names one."""
    return _content(name).get("model")


def _content(name: str | None) -> dict[str, Any]:
    """The keys of a recipe; none where there is no such recipe."""
    file = RECIPES / f"{name}.yaml"
    return yaml.safe_load(file.read_text()) or {} if name and file.is_file() else {}


def yaml_keys(file: Path, name: str, known: list[str]) -> dict[str, Any]:
    """The top level of a YAML file, its keys checked against the known ones. Raises UsageError."""
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{name} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{name} holds no keys")
    for key in content:
        if key not in known:
            raise UsageError(f"{name}: unknown key {key!r}{did_you_mean(str(key), known)}")
    return content


def check_recipe(name: str) -> None:
    """Raises UsageError for a key that no recipe may set."""
    for key in _content(name):
        if key in ("data_args", "data_dir", "runs_dir", "name", "resume", "extend", "recipe"):
            raise UsageError(f"recipe {name} sets {key!r}: a recipe may set model and data, never paths or data_args")


def scale_lr(values: dict[str, Any], notes: list[str], *, true_peak: bool) -> dict[str, Any]:
    """Apply the recipe's scaling rule, unless the rate was given as the true peak. Swin's code scales the ends of its
    schedule too (microsoft/Swin-Transformer main.py:327-334)."""
    rule, batch, base, lr = values["lr_scaling"], values["global_batch_size"], values["lr_batch"], values["lr"]
    if true_peak or rule == "none" or not base or base < 1:
        return {**values, "lr_scaling": "none"}
    factor = batch / base if rule == "linear" else (batch / base) ** 0.5
    notes.append(f"lr {lr * factor:g} = {lr:g} x {f'{batch}/{base}' if rule == 'linear' else f'sqrt({batch}/{base})'}")
    scaled = ("lr", "min_lr", "warmup_lr") if values["schedule"] == "swin" else ("lr",)
    return {**values, **{key: values[key] * factor for key in scaled}}


def lower_ends(values: dict[str, Any], alone: dict[str, Any], chosen: set[str], notes: list[str]) -> None:
    """Lower the ends of a recipe's schedule to a peak that is below them (a small batch, a low --lr)."""
    for key in {"min_lr", "warmup_lr"} - chosen:
        if values[key] > values["lr"]:
            notes.append(f"{key} {values[key]:g} of the recipe is above the peak: {values['lr']:g}")
            values[key] = alone[key] = values["lr"]
