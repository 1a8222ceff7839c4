"""A small network in place of the linear classifier: Linear-GELU-Linear, as for Kaggle's regressions
(Linear-128-GELU-Linear). D features."""

import torch
from torch import Tensor, nn


class Mlp(nn.Module):
    """(B, D) -> (B, num_outputs): fc1, GELU, dropout, fc2; weights start truncated normal of std 0.02, biases at 0, as
    timm's heads."""

    def __init__(self, width: int, hidden: int, num_outputs: int, dropout: float = 0.0):
        super().__init__()
        self.fc1, self.act, self.drop, self.fc2 = (
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_outputs),
        )
        for layer in (self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.act(self.fc1(x))))


class MlpHead:
    """The part that `with_mlp_head` puts before a network's own class."""

    head_settings: tuple[int, float]

    def reset_classifier(self, num_classes: int, *pooling: str | None) -> None:
        """A fresh head of the same kind and another width; 0 leaves it out."""
        super().reset_classifier(num_classes, *pooling)
        if num_classes:
            _replace(self, *self.head_settings)


def with_mlp_head(model: nn.Module, hidden: int, dropout: float = 0.0) -> nn.Module:
    """Put an `Mlp` in the place of a network's linear classifier; the same object, of a class derived from its own,
    with timm's interface.

    Raises ValueError where there is no single linear classifier, or for values that cannot be.
    """
    if not isinstance(hidden, int) or isinstance(hidden, bool) or hidden < 1:
        raise ValueError(f"head_hidden {hidden}: must be a whole number, at least 1")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"head_dropout {dropout}: must be at least 0 and below 1")
    _replace(model, hidden, dropout)
    own = type(model)
    model.head_settings = hidden, dropout
    model.__class__ = type(f"{own.__name__}MlpHead", (MlpHead, own), {"__module__": own.__module__})
    return model


def _replace(model: nn.Module, hidden: int, dropout: float) -> None:
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    if not isinstance(classifier, nn.Linear):
        found = "no classifier" if classifier is None else f"a classifier of type {type(classifier).__name__}"
        raise ValueError(f"{type(model).__name__} has {found}: head_hidden takes the place of one linear layer")
    place = next(name for name, module in model.named_modules() if module is classifier)
    with torch.device(classifier.weight.device):
        model.set_submodule(place, Mlp(classifier.in_features, hidden, classifier.out_features, dropout))
