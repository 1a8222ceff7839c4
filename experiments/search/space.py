"""A search space in W&B's sweep format, so that one file serves `wandb sweep` and sweep.py. Neither torch nor Optuna.

Keys and what they mean: docs.wandb.ai/models/sweeps/sweep-config-keys, and wandb/sweeps src/sweeps/config/schema.json,
params.py, grid_search.py.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from datamodules.loading.closest import did_you_mean
from experiments.cli.errors import UsageError
from experiments.cli.recipes import yaml_keys

KEYS = "program method metric early_terminate parameters command name description project entity run_cap".split()
METHODS, GOALS = ["bayes", "random", "grid"], ["minimize", "maximize"]
RANGE, STEPPED = ("min", "max"), ("min", "max", "q")
DISTRIBUTIONS = {
    "constant": ("value",),
    "categorical": ("values",),
    "uniform": RANGE,
    "int_uniform": RANGE,
    "log_uniform_values": RANGE,
    "q_uniform": STEPPED,
    "q_log_uniform_values": STEPPED,
}
OURS = tuple("name runs_dir resume extend overwrite dry_run list".split())  # sweep.py gives them, or no trial can
ARGS = ("${args_no_equals}", "${args}")  # macros whose flags run.py reads


@dataclass(frozen=True)
class Parameter:
    """One knob that varies. `values` are the flags' texts of a categorical one; `low`, `high` bound a number, which `q`
    rounds to its multiples."""

    name: str
    distribution: str
    values: tuple[str, ...] = ()
    low: float = 0
    high: float = 0
    q: float | None = None

    def suggest(self, trial: Any) -> Any:
        """What an Optuna trial draws for it, as the study stores it."""
        if self.values:
            return trial.suggest_categorical(self.name, self.values)
        if self.distribution == "int_uniform":
            return trial.suggest_int(self.name, self.low, self.high)
        return trial.suggest_float(self.name, self.low, self.high, log=self.distribution.endswith("log_uniform_values"))

    def text(self, drawn: Any) -> str:
        """The flag's value: rounded as W&B's q_* do, round(x / q) * q, and other numbers to six digits."""
        if self.q is not None:
            drawn = round(drawn / self.q) * self.q
        return f"{drawn:.6g}" if isinstance(drawn, float) else str(drawn)

    def __str__(self) -> str:
        return (
            f"{self.distribution} {', '.join(self.values) or f'{self.low} to {self.high}'}"
            + f" in steps of {self.q}" * (self.q is not None)
        )


@dataclass(frozen=True)
class Space:
    """A sweep's file: `varied` is what is searched, `fixed` the flags that every trial has; `early` is (first epoch,
    eta) of the pruning or None."""

    name: str
    method: str
    metric: str
    goal: str
    early: tuple[int, int] | None
    varied: tuple[Parameter, ...]
    fixed: dict[str, str]
    words: tuple[str, ...]
    run_cap: int | None

    def points(self) -> list[dict[str, Any]]:
        """All points of a grid in W&B's order: names sorted, the last one fastest."""
        varied = sorted(self.varied, key=lambda each: each.name)
        values = [each.values or range(int(each.low), int(each.high) + 1) for each in varied]
        return [dict(zip((each.name for each in varied), point)) for point in itertools.product(*values)]

    def texts(self, drawn: dict[str, Any]) -> dict[str, str]:
        """Flag and value of each knob that varies, from what a trial drew."""
        return {each.name: each.text(drawn[each.name]) for each in self.varied if each.name in drawn}


def flags(settings: dict[str, str]) -> list[str]:
    """`--name value`, and `--name=-1e-05` for what would look like a flag."""
    return [
        word
        for name, value in settings.items()
        for word in ([f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value])
    ]


def read(file: Path) -> Space:
    """The space of a sweep file. Raises UsageError, with the file and the key, for what is wrong or means something to
    W&B alone."""
    content = yaml_keys(file, str(file), KEYS)
    try:
        return _space(file, content)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None


def _space(file: Path, content: dict[str, Any]) -> Space:
    if Path(str(content.get("program"))).name != "run.py":
        raise UsageError(
            f"program: {content.get('program')}: experiments/run.py is what a sweep of this repository runs"
        )
    method = _one_of(content.get("method"), METHODS, "method")
    metric = _mapping(content.get("metric"), "metric", ["name", "goal"])
    if not isinstance(metric.get("name"), str):
        raise UsageError("metric.name: a column of metrics.csv or a key of result.json, as val/acc1")
    goal = _one_of(metric.get("goal", "minimize"), GOALS, "metric.goal")
    specs = _mapping(content.get("parameters"), "parameters")
    made = [_parameter(str(name), spec) for name, spec in specs.items()]
    fixed = {each.name: each.values[0] for each in made if len(each.values) == 1}
    varied = tuple(each for each in made if each.name not in fixed)
    if not varied:
        raise UsageError("parameters: none of them varies; give one several values, or a min and a max")
    if method == "grid":
        for each in varied:
            if each.distribution not in ("categorical", "int_uniform"):
                raise UsageError(
                    f"parameters.{each.name}: a grid takes values, or whole numbers from min to max, and no "
                    f"{each.distribution}"
                )
    cap = content.get("run_cap")
    if cap is not None and not (_whole(cap) and cap > 0):
        raise UsageError(f"run_cap: {cap!r} is not a number of trials")
    name = str(content.get("name") or file.stem)
    return Space(
        name, method, metric["name"], goal, _early(content), varied, fixed, tuple(_command(content.get("command"))), cap
    )


def _early(content: dict[str, Any]) -> tuple[int, int] | None:
    if content.get("early_terminate") is None:
        return None
    spec = _mapping(content["early_terminate"], "early_terminate", ["type", "min_iter", "eta"])
    _one_of(spec.get("type"), ["hyperband"], "early_terminate.type")
    first, eta = spec.get("min_iter"), spec.get("eta", 3)
    if not _whole(first) or first < 1:
        raise UsageError(f"early_terminate.min_iter: {first!r}: epochs after which a trial may be stopped, at least 1")
    if not _whole(eta) or eta < 2:
        raise UsageError(f"early_terminate.eta: {eta!r}: of how many trials one goes on, a whole number from 2 on")
    return first, eta


def _command(words: Any) -> list[str]:
    """The flags that a `command` gives to run.py in addition to the parameters."""
    if words is None:
        return []
    if not isinstance(words, list) or "${program}" not in words or not {*ARGS} & {*map(str, words)}:
        raise UsageError(
            "command: a list with ${program} and ${args_no_equals}, as [${env}, python, ${program}, ${args_no_equals}]"
        )
    found = [str(word) for word in words[words.index("${program}") + 1 :] if word not in ARGS]
    for word in found:
        if word.startswith("${"):
            raise UsageError(f"command: {word}: run.py reads the flags of {' or '.join(ARGS)} alone")
    return found


def _parameter(name: str, spec: Any) -> Parameter:
    where = f"parameters.{name}"
    if not re.fullmatch(r"[A-Za-z_][\w.-]*", name):
        raise UsageError(f"{where}: not the name of a flag")
    if name in OURS:
        raise UsageError(f"{where}: no trial can choose it")
    spec = _mapping(spec, where)
    if "parameters" in spec:
        raise UsageError(
            f"{where}: write nested parameters flat, as {name}.{next(iter(spec['parameters'] or ['key']))}"
        )
    kind = spec.get("distribution") or _inferred(spec, where)
    if kind not in DISTRIBUTIONS:
        hint = (
            "; log_uniform_values takes the values, where log_uniform takes exponents" if kind == "log_uniform" else ""
        )
        raise UsageError(f"{where}: no distribution {kind!r} here{hint} (there are {', '.join(DISTRIBUTIONS)})")
    for key in spec:
        if key not in (*DISTRIBUTIONS[kind], "distribution"):
            raise UsageError(f"{where}: {kind} has no {key!r}, but {', '.join(DISTRIBUTIONS[kind])}")
    for key in DISTRIBUTIONS[kind]:
        if key not in spec and key != "q":
            raise UsageError(f"{where}: {kind} needs {key!r}")
    if kind in ("constant", "categorical"):
        return Parameter(name, kind, _texts(spec["values"] if kind == "categorical" else [spec["value"]], where))
    return _numbers(name, kind, spec, where)


def _inferred(spec: dict[str, Any], where: str) -> str:
    """The distribution that W&B takes where none is named."""
    if "value" in spec or "values" in spec:
        return "constant" if "value" in spec else "categorical"
    if not {"min", "max"} <= spec.keys():
        raise UsageError(f"{where}: value, values, or min and max")
    return "int_uniform" if _whole(spec["min"]) and _whole(spec["max"]) else "uniform"


def _numbers(name: str, kind: str, spec: dict[str, Any], where: str) -> Parameter:
    spec = {"q": 1, **spec} if "q" in DISTRIBUTIONS[kind] else spec
    for key in DISTRIBUTIONS[kind]:
        value = spec[key]
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", value):
            raise UsageError(
                f"{where}: {key} {value} is text in YAML 1.1, which wandb reads too: write {value.replace('e', '.0e')}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UsageError(f"{where}: {key} {value!r} is not a number")
        if kind == "int_uniform" and not _whole(value):
            raise UsageError(f"{where}: {key} {value!r} of int_uniform is not a whole number")
    if not spec["min"] < spec["max"]:
        raise UsageError(f"{where}: min {spec['min']} is not below max {spec['max']}")
    if kind.endswith("log_uniform_values") and spec["min"] <= 0:
        raise UsageError(f"{where}: min {spec['min']} of {kind} is not above 0")
    if spec.get("q", 1) <= 0:
        raise UsageError(f"{where}: q {spec['q']} is not above 0")
    return Parameter(name, kind, low=spec["min"], high=spec["max"], q=spec.get("q"))


def _texts(values: Any, where: str) -> tuple[str, ...]:
    """Values as the command line writes them."""
    if not isinstance(values, list) or not values:
        raise UsageError(f"{where}: values is a list of at least one")
    if None in values:
        raise UsageError(
            f'{where}: write "null" in quotes; W&B\'s agent passes a plain null on as None, which run.py does not know'
        )
    texts = tuple(str(value).lower() if isinstance(value, bool) else str(value) for value in values)
    for text in texts:
        if texts.count(text) > 1:
            raise UsageError(f"{where}: {text} stands in values twice")
    return texts


def _mapping(value: Any, where: str, known: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise UsageError(f"{where}: " + ("is missing" if value is None else "holds no keys"))
    for key in value:
        if known and key not in known:
            raise UsageError(
                f"{where}: unknown key {key!r}{did_you_mean(str(key), known)} (there are {', '.join(known)})"
            )
    return value


def _one_of(value: Any, known: list[str], where: str) -> str:
    if value not in known:
        raise UsageError(f"{where}: {value!r}{did_you_mean(str(value), known)} (there are {', '.join(known)})")
    return value


def _whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
