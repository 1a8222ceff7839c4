"""The teacher: a trained network that a student learns from, frozen by construction.

It is no nn.Module, so a LightningModule that holds one has none of its weights among parameters, state dict, optimizer
or DDP; no `train()` reaches it; a deep copy of its holder, as an EMA makes, shares it. Legend: B pictures, K outputs, D
width.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn
from torch.nn import functional as F

import models
from lightning_modules.objectives.targets import predict
from models import pretrained
from models.spec import Spec

AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
MUST_AGREE = ("task", "class_names", "target_names", "num_outputs")  # between the specs of teacher and student
SHOWN = 5  # names in a line


class Teacher:
    """A network in evaluation mode, without gradients, that sees the student's own pictures prepared its own way.

    Of a regression it answers in the targets' own units, so that range and encoding of its outputs may be other than
    the student's.

    Args:
        network: pictures (B, 3, H, W) -> (B, K); it becomes the teacher's: evaluation mode, requires_grad False.
        mean, std: what the network's pictures are normalised with, and `student_mean, student_std` what the student's
            are.
        image_size: (height, width) the network wants; pictures of another size are resized, antialiased. None takes
            them as they are.
        interpolation: of that resizing, `bilinear` or else bicubic.
        precision: of the forward pass, `32-true`, `bf16-mixed` or `16-mixed`, whatever the student trains in. Raises
            ValueError for another.
        spec: what the outputs mean, as `targets.predict` takes it; of a regression it is needed.
        notes: lines to print, on what is not known of the network and was assumed.
    """

    def __init__(
        self,
        network: Any,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        student_mean: Sequence[float],
        student_std: Sequence[float],
        image_size: tuple[int, int] | None = None,
        interpolation: str = "bicubic",
        precision: str = "32-true",
        spec: Spec | None = None,
        notes: Sequence[str] = (),
    ):
        if precision not in AUTOCAST:
            raise ValueError(f"a teacher's precision is one of {', '.join(AUTOCAST)}, not {precision!r}")
        self.network = network.eval().requires_grad_(False)
        self.image_size, self.precision, self.notes = image_size, precision, list(notes)
        self.spec = (
            spec if spec and spec.get("task") == "regression" else None
        )  # of other tasks the answers are the logits
        self.interpolation = interpolation if interpolation == "bilinear" else "bicubic"
        self.affine: tuple[Tensor, ...] | None = (
            None  # from the student's normalisation to the teacher's, (1, 3, 1, 1) each
        )
        if (tuple(mean), tuple(std)) != (tuple(student_mean), tuple(student_std)):
            theirs, their_std, own, own_std = (
                torch.tensor(each)[None, :, None, None] for each in (mean, std, student_mean, student_std)
            )
            self.affine = own_std / their_std, (own - theirs) / their_std

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self

    def to(self, device: torch.device | str) -> "Teacher":
        """Move to the student's device, in place; call it in the LightningModule's `setup`."""
        self.network.to(device)
        self.affine = self.affine and tuple(each.to(device) for each in self.affine)
        return self

    @property
    def width(self) -> int:
        """Number of pooled features before the classifier."""
        return self.network.head_hidden_size

    def prepare(self, image: Tensor) -> Tensor:
        """The student's normalised pictures (B, 3, H, W) -> the teacher's, float32, in its normalisation and size."""
        image = image.float()
        if self.affine:
            image = image * self.affine[0] + self.affine[1]
        if self.image_size and tuple(image.shape[-2:]) != tuple(self.image_size):
            image = F.interpolate(image, tuple(self.image_size), mode=self.interpolation, antialias=True)
        return image

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """The student's pictures (B, 3, H, W), mixed as the student sees them -> logits (B, K) float32, of a regression
        the targets in their own units (B, T) float64."""
        with self._autocast(image):
            logits = self.network(self.prepare(image)).float()
        return logits if self.spec is None else predict(logits, self.spec)

    @torch.no_grad()
    def features(self, image: Tensor) -> Tensor:
        """The same pictures -> pooled features before the classifier (B, D) float32."""
        with self._autocast(image):
            return self.network.forward_head(
                self.network.forward_features(self.prepare(image)), pre_logits=True
            ).float()

    def _autocast(self, image: Tensor) -> torch.autocast:
        dtype = AUTOCAST[self.precision]
        return torch.autocast(image.device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    @classmethod
    def load(
        cls,
        source: str,
        init: str | None = None,
        *,
        student: Spec,
        precision: str = "32-true",
        image_size: tuple[int, int] | None = None,
    ) -> "Teacher":
        """A trained network for a student.

        Args:
            source: a run directory or a file with one of our checkpoints (averaged weights where it keeps them), or a
                model's name, ours or `timm/<name>`.
            init: the weights of a named model: a file or run; None or `pretrained` takes those timm publishes
                (`timm/<name>.<tag>` says which).
            student: the specification of the student's data: num_outputs, mean, std, and what else is known of the
                targets.
            image_size: (height, width) of the teacher's pictures; None is its own.
        Raises ValueError for an untrained or misfitting teacher, or one of other classes than the student's;
        FileNotFoundError.
        """
        found = Path(source).exists()
        if found and init:
            raise ValueError(f"--teacher {source} brings its weights with it; --teacher_init is for a model's name")
        if not found and "/" in source.removeprefix("timm/"):
            raise FileNotFoundError(f"--teacher {source}: there is no such run or file")
        with torch.random.fork_rng(devices=[]):  # the student starts the same with and without a teacher
            loaded: tuple[nn.Module, Any, list[str]]
            loaded = (*models.load(source), []) if found else _named(source, init, student, image_size)
            network, spec, notes = loaded
        check_spec(source, spec, student)
        return cls(
            network,
            mean=spec["mean"],
            std=spec["std"],
            student_mean=student["mean"],
            student_std=student["std"],
            spec=spec,
            notes=notes,
            image_size=tuple(image_size or spec["image_size"]),
            interpolation=spec["interpolation"],
            precision=precision,
        )


def check_spec(source: str, spec: Mapping[str, Any], student: Mapping[str, Any]) -> None:
    """Raises ValueError where a teacher's specification is of other targets than the student's. Of a regression the
    answers are in own units: the names of the targets must agree, and neither their range nor the encoding of the
    outputs."""
    if spec.get("columns"):
        raise ValueError(
            f"--teacher {source} takes columns of a table ({', '.join(spec['columns']['names'])}): a teacher sees "
            f"pictures only"
        )
    for key in MUST_AGREE[:-1] if spec.get("task") == "regression" else MUST_AGREE:
        if spec.get(key) is not None and student.get(key) is not None and spec[key] != student[key]:
            raise ValueError(
                f"--teacher {source} was trained for other targets than the student's: "
                f"{_difference(key, spec[key], student[key])}"
            )


class Teachers:
    """Several teachers as one, for a task: the mean of their probabilities, each of the same weight, given as logits.

    classification: log of the mean softmax; multilabel: logit of the mean sigmoid; regression: mean in own units.
    Probabilities, as in Hinton et al. 2015 and deep ensembles, so that a teacher of larger logits does not outvote the
    others. (B, K) float32.
    """

    def __init__(self, teachers: Sequence[Teacher], task: str):
        self.teachers, self.task = list(teachers), task
        self.notes = [note for teacher in self.teachers for note in teacher.notes]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teachers":
        return self

    def to(self, device: torch.device | str) -> "Teachers":
        for teacher in self.teachers:
            teacher.to(device)
        return self

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        logits = torch.stack([teacher(image) for teacher in self.teachers])  # (teachers, B, K)
        if self.task == "regression":
            return logits.mean(0)
        if self.task == "classification":
            return logits.log_softmax(-1).logsumexp(0) - torch.tensor(float(len(logits))).log()
        return F.logsigmoid(logits).logsumexp(0) - F.logsigmoid(-logits).logsumexp(0)


def _named(
    name: str, init: str | None, student: Spec, image_size: tuple[int, int] | None
) -> tuple[nn.Module, Any, list[str]]:
    """A model by its name with trained weights, what is known of its targets and pictures, and a line on what is
    not."""
    try:
        models.check_name(name)
    except ValueError as error:
        raise ValueError(f"--teacher {name}: there is no such run or file, and {error}") from None
    init = None if init == "pretrained" else init
    about = pretrained.read_about(init) if init else {}
    if init and about:
        if about["config"]["model"] != name:
            raise ValueError(f"--teacher {name} --teacher_init {init}: that is a {about['config']['model']}")
        return *models.load(init), []
    try:
        about = {} if init else pretrained.about("pretrained", name)
        weights = pretrained.read_weights(init) if init else pretrained.published_weights(name, None)
    except ValueError as error:
        if init:
            raise
        raise ValueError(
            f"--teacher {name} has no trained weights ({error}); give them: --teacher_init PATH, or a run as --teacher"
        ) from None
    preparation = about.get("spec") or models.preprocessing(
        name
    )  # timm's may differ from ours: they are of its weights
    num_outputs = student["num_outputs"]
    network = models.create(name, num_outputs, image_size or preparation["image_size"])
    weights, _ = pretrained.fit(network, weights, init or "pretrained", pretrained.saved_network(about))
    own, heads = network.state_dict(), pretrained.head_keys(network)
    where = f"--teacher {name}" + (f" --teacher_init {init}" if init else "")
    for key in sorted(own.keys() & weights.keys()):
        if weights[key].shape != own[key].shape:
            what = (
                f"it has {len(weights[key])} classes, the student's data {num_outputs}"
                if key in heads
                else f"{key} is {tuple(weights[key].shape)}, the model's {tuple(own[key].shape)}"
            )
            raise ValueError(f"{where}: {what}")
    if missing := own.keys() - weights.keys():
        raise ValueError(f"{where} leaves {len(missing)} tensors untrained, the first is {min(missing)}")
    network.load_state_dict(weights, strict=False)
    known = None if init else _published_classes(name, num_outputs, student.get("class_names") or [])
    spec = {**preparation, "num_outputs": num_outputs, "class_names": known}
    if student.get("task") == "regression":
        spec |= {key: student[key] for key in ("task", "target_names", "target_range", "encoding")}
    return network, spec, [] if known else [f"{where}: {_assumed(student)}"]


def _published_classes(name: str, count: int, ours: list[str]) -> list[str] | None:
    """The classes of weights that timm publishes, in its order, as ImageNet ids or in words, whichever the student's
    data have; None where timm does not tell them."""
    arch = name.removeprefix("timm/") if name.startswith("timm/") else models.REGISTRY[name].timm
    published = timm.get_pretrained_cfg(arch) if arch else None
    subset = published and infer_imagenet_subset({"num_classes": published.num_classes})
    if not published or not subset or published.num_classes != count:
        return None
    info = ImageNetInfo(subset)
    if {*ours} == {*info.label_names()}:
        return info.label_names()
    words = [*info.label_descriptions()]  # of two classes in the same words the data have the id behind each
    return ours if [re.sub(r" \(n\d{8}\)$", "", each) for each in ours] == words else words


def _assumed(student: Spec) -> str:
    """The assumption about the targets of a teacher whose file does not name them."""
    names = student.get("class_names") or student.get("target_names") or []
    order = ", ".join(names[:SHOWN]) + ", ..." * (len(names) > SHOWN)
    if student.get("task") == "regression":
        spans = ", ".join(f"{low:g} to {high:g}" for low, high in (student["target_range"] or [])[:SHOWN])
        return (
            f"its targets and their scale are not known: taken to be {order} ({student['encoding']}, {spans}), as "
            f"the student's"
        )
    return f"the names of its classes are not known: taken to be in this order: {order}"


def _difference(key: str, theirs: Any, ours: Any) -> str:
    """The difference in a few words, with both values."""
    if isinstance(theirs, list | tuple) and isinstance(ours, list | tuple):
        if len(theirs) != len(ours):
            return (
                f"{len(theirs)} {key} ({', '.join(map(str, theirs[:3]))}, ...), not {len(ours)} "
                f"({', '.join(map(str, ours[:3]))}, ...)"
            )
        place = next((i for i, (a, b) in enumerate(zip(theirs, ours)) if a != b), 0)
        return f"{key} number {place} is {theirs[place]!r}, not {ours[place]!r}"
    return f"{key} {theirs}, not {ours}"
