"""A second classifier for any network, to learn from a teacher while the first learns from the labels (DeiT's two heads
on one feature; LeViT).

Legend: B pictures, K classes.
"""

import copy

import torch
from torch import Tensor, nn


class DistHead:
    """The part that `with_dist_head` puts before a network's own class."""

    head_dist: nn.Linear
    distilled_training: bool

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Features -> (logits, distillation logits) (B, K) in distilled training, else their mean; pooled features with
        `pre_logits`."""
        pooled = super().forward_head(x, pre_logits=True)
        if pre_logits:
            return pooled
        logits, logits_dist = super().get_classifier()(pooled), self.head_dist(pooled)
        if self.training and self.distilled_training:
            return logits, logits_dist
        return (logits + logits_dist) / 2

    def set_distilled_training(self, enable: bool = True) -> None:
        self.distilled_training = enable

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        return super().get_classifier(), self.head_dist

    def reset_classifier(self, num_classes: int) -> None:
        """Fresh heads of another width, as the network makes its first one; 0 leaves them out."""
        super().reset_classifier(num_classes)
        self.head_dist = fresh_like(super().get_classifier())


def with_dist_head(model: nn.Module) -> nn.Module:
    """Give a network a second head, `head_dist`, beside its linear classifier; the same object, of a class derived from
    its own.

    For networks with timm's interface, whose logits are `get_classifier()(forward_head(x, pre_logits=True))`. One with
    two heads already (DeiT's, LeViT's) is returned as it is. Call it on fresh weights: the new head starts as the
    classifier does. Raises ValueError where there is no single linear classifier.
    """
    if hasattr(model, "set_distilled_training"):
        return model
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    if not isinstance(classifier, nn.Linear):
        found = "no classifier" if classifier is None else f"a classifier of type {type(classifier).__name__}"
        raise ValueError(f"{type(model).__name__} has {found}: a distillation head stands beside one linear layer")
    own = type(model)
    model.head_dist, model.distilled_training = fresh_like(classifier), True
    model.__class__ = type(
        f"{own.__name__}DistHead", (DistHead, own), {"__module__": own.__module__}
    )  # as torch's fully_shard does
    return model


@torch.no_grad()
def fresh_like(classifier: nn.Module) -> nn.Module:
    """A copy with each tensor's values shuffled: another draw of the same initialisation, whatever that is."""
    fresh = copy.deepcopy(classifier)
    for parameter in fresh.parameters():
        order = torch.randperm(parameter.numel(), device=parameter.device)
        parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return fresh
