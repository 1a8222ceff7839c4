"""Columns of a table beside the picture: Linear-GELU of them, joined to the pooled features before the classifier. B
batch, C columns, D features."""

import torch
from torch import Tensor, nn

from models.mlp_head import Mlp

HIDDEN = 32  # units that the columns become


class ColumnHead:
    """The part that `with_columns` puts before a network's own class."""

    column_mlp: nn.Sequential

    def forward(self, image: Tensor, columns: Tensor | None = None) -> Tensor:
        """(B, 3, H, W), (B, C) standardised -> logits. Raises ValueError without columns: a guess of them would go
        unseen."""
        if columns is None:
            raise ValueError(
                f"this network takes {self.column_mlp[0].in_features} columns of a table beside the picture"
            )
        pooled = self.forward_head(self.forward_features(image), pre_logits=True)  # (B, D)
        return self.get_classifier()(torch.cat([pooled, self.column_mlp(columns)], 1))

    def reset_classifier(self, num_classes: int, *pooling: str | None) -> None:
        """A fresh classifier of another width, the columns joined as before."""
        super().reset_classifier(num_classes, *pooling)
        _widen(self, self.column_mlp[0].out_features)


def with_columns(model: nn.Module, columns: int, hidden: int = HIDDEN) -> nn.Module:
    """Let a network take so many columns beside the picture: `forward(image, columns)`; the same object, of a class
    derived from its own.

    For networks with timm's interface, whose logits are `get_classifier()(forward_head(x, pre_logits=True))`, with a
    linear classifier or an `Mlp`, whose input becomes `hidden` wider. Raises ValueError for another classifier.
    """
    classifier = _widen(model, hidden)
    own = type(model)
    with torch.device(classifier.weight.device):
        model.column_mlp = nn.Sequential(nn.Linear(columns, hidden), nn.GELU())
    model.__class__ = type(f"{own.__name__}Columns", (ColumnHead, own), {"__module__": own.__module__})
    return model


def _widen(model: nn.Module, more: int) -> nn.Linear:
    """Make the classifier's first layer so much wider: the weights of the features stay, the new ones start as timm's
    heads do."""
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    first = classifier.fc1 if isinstance(classifier, Mlp) else classifier
    if not isinstance(first, nn.Linear):
        found = "no classifier" if classifier is None else f"a classifier of type {type(classifier).__name__}"
        raise ValueError(f"{type(model).__name__} has {found}: columns are joined before one linear layer")
    with torch.device(first.weight.device), torch.no_grad():
        wide = nn.Linear(first.in_features + more, first.out_features)
        nn.init.trunc_normal_(wide.weight, std=0.02)
        wide.weight[:, : first.in_features] = first.weight
        wide.bias.copy_(first.bias)
    model.set_submodule(next(name for name, module in model.named_modules() if module is first), wide)
    return wide
