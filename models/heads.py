"""Heads that any network with timm's interface can have in place of its linear classifier, in any combination.

* a hidden layer: Linear-GELU-Linear, as for Kaggle's regressions (Linear-128-GELU-Linear);
* table columns beside the image: Linear-GELU of them, joined to the pooled features before the classifier;
* a second classifier that learns from a teacher while the first learns from the labels (DeiT's two heads on one
  feature; LeViT).
Legend: B images, C columns, D features, K outputs.
"""

import copy
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

COLUMN_UNITS = 32  # that the columns become

if TYPE_CHECKING:

    class _Network(nn.Module):
        """timm's interface, as far as a head uses it."""

        forward_features: Callable[[Tensor], Tensor]
        forward_head: Callable[..., Any]
        get_classifier: Callable[[], Any]
        reset_classifier: Callable[..., None]

else:
    _Network = object


class Mlp(nn.Module):
    """(B, D) -> (B, K): fc1, GELU, dropout, fc2; weights start truncated normal of std 0.02, biases at 0, as timm's
    heads."""

    def __init__(self, width: int, hidden: int, num_outputs: int, dropout: float = 0.0):
        super().__init__()
        self.fc1, self.act = nn.Linear(width, hidden), nn.GELU()
        self.drop, self.fc2 = nn.Dropout(dropout), nn.Linear(hidden, num_outputs)
        for layer in (self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.act(self.fc1(x))))


class Parts(NamedTuple):
    """Parts of a composed head."""

    hidden: int | None = None  # units of a hidden layer
    dropout: float = 0.0  # behind the hidden layer
    columns: int = 0  # table columns beside the image
    dist: bool = False  # a second classifier, `head_dist`


class ComposedHead(_Network):
    """Class before a network's own that adds a hidden layer or columns; pickles and copies like any module."""

    own: type[nn.Module]  # the network's class
    head_parts: Parts
    column_mlp: nn.Sequential

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (self.own, self.head_parts.dist), self.__dict__

    def forward(self, image: Tensor, columns: Tensor | None = None) -> Any:
        """(B, 3, H, W), and (B, C) standardised columns where the network takes some -> logits (B, K). Raises
        ValueError without the columns."""
        if not self.head_parts.columns:
            return super().forward(image)
        if columns is None:
            raise ValueError(f"this network takes {self.head_parts.columns} columns of a table beside the picture")
        pooled = self.forward_head(self.forward_features(image), pre_logits=True)  # (B, D)
        return self.classify(torch.cat([pooled, self.column_mlp(columns)], 1))

    def classify(self, pooled: Tensor) -> Any:
        """Pooled features, with the columns' units -> logits (B, K)."""
        return self.get_classifier()(pooled)

    def reset_classifier(self, num_classes: int, *pooling: str | None) -> None:
        """A fresh head of the same parts and another width; 0 leaves it out."""
        super().reset_classifier(num_classes, *pooling)
        self.make_classifier(super().get_classifier())

    def make_classifier(self, linear: nn.Module) -> None:
        """Put the parts in the place of a fresh linear classifier (D, K); nothing in that of Identity."""
        if not isinstance(linear, nn.Linear):
            return
        hidden, dropout, columns, _ = self.head_parts
        first, place = linear, next(name for name, module in self.named_modules() if module is linear)
        if hidden is not None:
            with torch.device(linear.weight.device):
                mlp = Mlp(linear.in_features, hidden, linear.out_features, dropout)
            self.set_submodule(place, mlp)
            first, place = mlp.fc1, f"{place}.fc1"
        if columns:
            self.set_submodule(place, _widened(first, COLUMN_UNITS))


class ComposedTwoHeads(ComposedHead):
    """A composed head with a second classifier, `head_dist`."""

    head_dist: nn.Module
    distilled_training: bool

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Features -> (logits, distillation logits) (B, K) in distilled training, else their mean; pooled features
        (B, D) with `pre_logits`."""
        pooled = super().forward_head(x, pre_logits=True)
        return pooled if pre_logits else self.classify(pooled)

    def classify(self, pooled: Tensor) -> Any:
        first, second = self.get_classifier()
        logits, logits_dist = first(pooled), second(pooled)
        return (logits, logits_dist) if self.training and self.distilled_training else (logits + logits_dist) / 2

    def set_distilled_training(self, enable: bool = True) -> None:
        self.distilled_training = enable

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        return super().get_classifier(), self.head_dist

    def make_classifier(self, linear: nn.Module) -> None:
        super().make_classifier(linear)
        self.head_dist = fresh_like(super().get_classifier())


def compose_head(
    model: nn.Module, *, hidden: int | None = None, dropout: float = 0.0, columns: int = 0, dist: bool = False
) -> nn.Module:
    """Give a network another head; the same object, of a class derived from its own, with timm's interface. Call it on
    fresh weights.

    Args:
        model: its logits are `get_classifier()(forward_head(x, pre_logits=True))`, with a linear classifier.
        hidden, dropout: a hidden layer of so many units, and the dropout behind it.
        columns: table columns that the network takes beside the image, as `forward(image, columns)`.
        dist: a second classifier, which starts as another draw of the first. A network with two (DeiT's, LeViT's) keeps
            them.
    Raises ValueError where there is no single linear classifier, or for a value out of range.
    """
    if hidden is not None and (not isinstance(hidden, int) or isinstance(hidden, bool) or hidden < 1):
        raise ValueError(f"head_hidden {hidden}: must be a whole number, at least 1")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"head_dropout {dropout}: must be at least 0 and below 1")
    dist = dist and not hasattr(model, "set_distilled_training")
    if hidden is None and not columns and not dist:
        return model
    linear = cast(_Network, model).get_classifier() if hasattr(model, "get_classifier") else None
    if not isinstance(linear, nn.Linear):
        found = "no classifier" if linear is None else f"a classifier of type {type(linear).__name__}"
        raise ValueError(f"{type(model).__name__} has {found}: another head takes the place of one linear layer")
    own: Any = type(model)
    model.__class__ = _composed(own, dist)
    composed = cast(ComposedTwoHeads, model)
    composed.head_parts = Parts(hidden, dropout, columns, dist)
    if dist:
        composed.distilled_training = True
    composed.make_classifier(linear)
    if columns:
        with torch.device(linear.weight.device):
            composed.column_mlp = nn.Sequential(nn.Linear(columns, COLUMN_UNITS), nn.GELU())
    return composed


@cache
def _composed(own: type, dist: bool) -> type:
    """The class of a network of class `own` with a composed head, as torch's fully_shard makes one."""
    head = ComposedTwoHeads if dist else ComposedHead
    return type(f"{own.__name__}{head.__name__}", (head, own), {"__module__": own.__module__, "own": own})


def _blank(own: type, dist: bool) -> nn.Module:
    """An empty object for pickle and copy to fill."""
    composed: Any = _composed(own, dist)
    return composed.__new__(composed)


def _widened(linear: nn.Linear, more: int) -> nn.Linear:
    """A layer with so many inputs more: weights of the features stay, new ones start as timm's heads do."""
    with torch.device(linear.weight.device), torch.no_grad():
        wide = nn.Linear(linear.in_features + more, linear.out_features, bias=linear.bias is not None)
        nn.init.trunc_normal_(wide.weight, std=0.02)
        wide.weight[:, : linear.in_features] = linear.weight
        if linear.bias is not None:
            wide.bias.copy_(linear.bias)
    return wide


@torch.no_grad()
def fresh_like(classifier: nn.Module) -> nn.Module:
    """A copy with each tensor's values shuffled: another draw of the same initialisation, whatever that is."""
    fresh = copy.deepcopy(classifier)
    for parameter in fresh.parameters():
        order = torch.randperm(parameter.numel(), device=parameter.device)
        parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return fresh
