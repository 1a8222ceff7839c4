"""`lightning_modules.create`: a task from a network, its data and the learning knobs. The command line calls it too."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, get_origin, get_type_hints

import torch
from torch import nn

import models
from lightning_modules.distiller import Distiller
from lightning_modules.knobs import Learning, out_of_range
from lightning_modules.objectives import distill_losses, losses, metrics, targets
from lightning_modules.objectives.aux_targets import Aux
from lightning_modules.optimization.freeze import freeze
from lightning_modules.optimization.optimizers import DEFAULTS as OPTIMIZERS
from lightning_modules.optimization.optimizers import check_optimizer
from lightning_modules.optimization.schedules import SCHEDULES
from lightning_modules.task import Task
from lightning_modules.teachers.cached_teacher import CachedTeacher, is_cache
from lightning_modules.teachers.teacher import Teacher, Teachers
from lightning_modules.wiring import wire
from models import closest, pretrained
from models.spec import Spec


class Data(Protocol):
    """The attributes of a data module of `datamodules.create` that a task uses."""

    task: str
    encoding: str
    outputs_per_target: int
    eval_only: bool
    label_smoothing: float

    @property
    def spec(self) -> Any: ...
    @property
    def steps_per_epoch(self) -> int: ...
    @property
    def mixing(self) -> bool: ...


AnyTeacher = Teacher | Teachers | CachedTeacher
SHARED = ("epochs", "seed", "label_smoothing", "metric")  # knobs of the data module, which are the defaults
OF_TEACHER = ("teacher_init", "distill", "distill_args")
OF_NETWORK = ("model_args", "init")
OF_RUNS = {"patience": "lightning's EarlyStopping", "average_checkpoints": "the command line"}


def names() -> dict[str, list[str]]:
    """The registered values of each knob that takes a name: loss, distill, metric, optimizer, schedule."""
    return {
        "loss": list(dict.fromkeys(name for known in losses.LOSSES.values() for name in known)),
        "distill": distill_losses.names(),
        "metric": list(metrics.METRICS),
        "optimizer": list(OPTIMIZERS),
        "schedule": list(SCHEDULES),
    }


def create(
    model: str | nn.Module,
    data: Data,
    teacher: str | Path | nn.Module | AnyTeacher | Sequence[str] | None = None,
    *,
    epochs: int | None = None,
    start_step: int = 0,
    config: dict[str, Any] | None = None,
    **knobs: Any,
) -> Task:
    """A LightningModule that trains `model` on `data` in any `L.Trainer`; a `Distiller` where there is a teacher.

    Loss, optimizer, schedule and metric are chosen for the data's task where no knob says otherwise. The loss of a
    regression sets the encoding of the data module's targets.

    Args:
        model: a name (`models.names()` or `timm/<name>`), built for the data with the knobs `model_args` and `init`; or
            a network, images (B, 3, H, W) -> logits (B, data.spec["num_outputs"]).
        data: a data module of `datamodules.create`.
        teacher: a network, which sees the images as the student does and becomes the teacher's (evaluation mode, no
            gradients); a run directory, checkpoint or model name, or several; a folder of cached answers; a `Teacher`.
        epochs: length of the schedule, to be given to the Trainer as max_epochs too; None takes the data module's.
        start_step: optimizer step at which the schedule begins.
        config: what the checkpoint keeps in place of the knobs given here.
        knobs: fields of `lightning_modules.knobs.Learning`; `seed`, `label_smoothing` and `metric` in place of the data
            module's; `distill`, `distill_args`, `teacher_init`.

    Raises:
        ValueError: an unknown knob or name (with the closest), a value out of range, or a model, teacher and data that
            do not fit each other.
        TypeError: `data` is no data module, or `teacher` nothing that teaches.
        FileNotFoundError: there is no such teacher or file of weights.
    """
    if not hasattr(data, "spec"):
        raise TypeError(f"data must be a data module of datamodules.create, not {data!r}")
    knobs = _settings(data, {**knobs, "epochs": epochs})
    if data.task == "regression":
        data.encoding, data.outputs_per_target = targets.encoding_of(
            knobs["loss"], knobs["loss_args"].get("bins", targets.BINS)
        )
    network = _network(model, data.spec, knobs)
    if knobs["freeze"] and not data.eval_only:
        freeze(network, knobs["freeze"])
    parts = wire(knobs, data.spec, data.steps_per_epoch, start_step)
    if data.task == "classification" and not data.eval_only:
        losses.check_loss(
            knobs["loss"] or losses.default(data.task),
            smoothing=knobs["label_smoothing"],
            mixing=data.mixing,
            num_outputs=data.spec["num_outputs"],
        )
    if (aux := getattr(data, "aux", None)) and not data.eval_only:
        parts["aux"] = Aux(network, len(aux), getattr(data, "aux_weight", 1.0))
    if config is None:
        built = getattr(network, "created_as", {})  # `model` and `model_args`; another network no checkpoint rebuilds
        config = {**knobs, **built, "steps_per_epoch": data.steps_per_epoch}
    if teacher is None:
        _check_teacher_knobs(knobs)
        return Task(network, data.spec, config, **parts)
    teacher = load_teacher(teacher, data.spec, knobs["teacher_init"])
    return Distiller(
        network, data.spec, config, teacher=teacher, **_distillation(network, teacher, data, knobs), **parts
    )


def _settings(data: Data, given: dict[str, Any]) -> dict[str, Any]:
    """Every learning knob: what is given, else the data module's, else the default. Raises ValueError."""
    declared = {each.name: each for each in fields(Learning) if each.name not in OF_RUNS}
    known = [*declared, *SHARED, *OF_TEACHER, *OF_NETWORK]
    for name in given:
        if name in OF_RUNS:
            raise ValueError(f"create has no knob {name!r}: it belongs to {OF_RUNS[name]}")
        if name not in known and name in getattr(data, "__dataclass_fields__", ()):
            raise ValueError(f"create has no knob {name!r}: it belongs to the data, datamodules.create takes it")
        if name not in known:
            raise ValueError(f"create has no knob {name!r}{closest(name, known)} (it takes {', '.join(known)})")
    learning = Learning(**{name: value for name, value in given.items() if name in declared})
    _check_values(learning)
    shared = {name: getattr(data, "metric_name" if name == "metric" else name, None) for name in SHARED}
    if data.task == "regression":
        shared["label_smoothing"] = 0.0  # the default is for classes and labels
    shared |= {name: given[name] for name in SHARED if given.get(name) is not None}
    if data.mixing and data.task == "classification" and shared["label_smoothing"] != data.label_smoothing:
        raise ValueError(
            f"label_smoothing {shared['label_smoothing']}: mixed targets take it from the data module, where it is "
            f"{data.label_smoothing}"
        )
    rest: dict[str, Any] = {"teacher_init": None, "distill": None, "distill_args": {}, "model_args": {}, "init": None}
    rest |= {name: given[name] for name in rest if given.get(name) is not None}
    return {**{name: getattr(learning, name) for name in declared}, **shared, **rest}


def _check_values(learning: Learning) -> None:
    """Raises ValueError for a value outside its range or its list of words."""
    for name, hint in get_type_hints(Learning).items():
        words = [word for part in (hint, *get_args(hint)) if get_origin(part) is Literal for word in get_args(part)]
        value = getattr(learning, name, None)
        if words and value is not None and value not in words:
            raise ValueError(f"{name} {value!r}{closest(str(value), words)} (there are {', '.join(words)})")
    if problem := out_of_range(learning):
        knob, value, rule = problem
        raise ValueError(f"{knob.name} {value}: {rule}")
    check_optimizer(learning.optimizer, learning.optimizer_args)


def _network(model: str | nn.Module, spec: Spec, knobs: dict[str, Any]) -> nn.Module:
    """The network of a name, with fresh weights by the seed or those of `init`; a given one is checked for its head."""
    if isinstance(model, nn.Module):
        for name in OF_NETWORK:
            if knobs[name]:
                raise ValueError(f"{name} is for a model given by name; give it to models.create")
        outputs = getattr(model, "num_outputs", getattr(model, "num_classes", spec["num_outputs"]))
        if outputs != spec["num_outputs"]:
            raise ValueError(f"the network has {outputs} outputs, the data need {spec['num_outputs']}")
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(knobs["seed"])
        return models.create(
            model,
            spec["num_outputs"],
            (spec["image_size"][0], spec["image_size"][1]),
            columns=pretrained.columns_of(spec),
            init=knobs["init"],
            **knobs["model_args"],
        )


def load_teacher(
    teacher: str | Path | nn.Module | AnyTeacher | Sequence[str], spec: Spec, init: str | None = None
) -> AnyTeacher:
    """The teacher that `create` is given, for a student of these data. Raises TypeError, and as `Teacher.load`."""
    if isinstance(teacher, AnyTeacher):
        return teacher
    if isinstance(teacher, nn.Module):
        mean, std = spec["mean"], spec["std"]
        return Teacher(teacher, mean=mean, std=std, student_mean=mean, student_std=std, spec=spec)
    if not isinstance(teacher, str | Path | Sequence):
        raise TypeError(f"teacher must be a network, a run, a file, a model's name or several of them, not {teacher!r}")
    sources = [str(teacher)] if isinstance(teacher, str | Path) else [str(each) for each in teacher]
    if len(sources) > 1:
        return Teachers([Teacher.load(each, init, student=spec) for each in sources], spec["task"])
    return CachedTeacher(sources[0]) if is_cache(sources[0]) else Teacher.load(sources[0], init, student=spec)


def _check_teacher_knobs(knobs: dict[str, Any]) -> None:
    for name in OF_TEACHER:
        if knobs[name]:
            raise ValueError(f"{name} needs a teacher")


def _distillation(network: Any, teacher: AnyTeacher, data: Data, knobs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `Distiller` beside the teacher: the loss, its weights and its warm-up."""
    name = knobs["distill"] or distill_losses.default(data.task)
    hyper = dict(knobs["distill_args"])
    alpha, warmup_epochs = hyper.pop("alpha", None), hyper.pop("warmup_epochs", 0)
    distill_losses.check_warmup(warmup_epochs)
    widths = None
    if distill_losses.check_name(name, data.task).on_features:
        if not isinstance(teacher, Teacher):
            raise ValueError(f"distill {name} compares the features of one live teacher")
        widths = (network.head_hidden_size, teacher.width)
    return {
        "distill": distill_losses.create(name, data.task, widths, **hyper),
        "weights": distill_losses.weights(name, alpha),
        "warmup_epochs": warmup_epochs,
    }
