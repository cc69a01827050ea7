"""The classification head of an image model, under whatever adapters it has."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from .adapters import unwrap

HEAD = "classifier"  # what Transformers' ...ForImageClassification models call theirs


def classification_head(model: nn.Module) -> nn.Module | None:
    """The head of an image classification model (under PEFT's wrapper where it has one), or None.

    A list of layers is none: the model calls them one by one, so features enter and logits leave elsewhere.
    """
    head = getattr(unwrap(model), HEAD, None)
    return None if isinstance(head, nn.Identity | nn.ModuleList | nn.ModuleDict) else head


def other_heads(model: nn.Module) -> list[str]:
    """Names of heads whose logits a model averages with those of its classification head, as LeViT's teacher has."""
    heads = [(name, child) for name, child in unwrap(model).named_children() if name != HEAD and HEAD in name]
    return [name for name, child in heads if not isinstance(child, nn.Identity)]


def head_width(head: nn.Module) -> int:
    """How many numbers the features have that enter a head.

    Raises:
        ValueError: the head holds no linear layer to tell it by.
    """
    for module in head.modules():
        width: Any = getattr(module, "in_features", None)
        if isinstance(width, int):
            return width
    raise ValueError(f"{type(head).__name__} holds no linear layer, so the width of its features is not known.")


def classifier(model: nn.Module) -> Any:
    """The module whose input are an image model's features and whose output are logits, or None.

    The head itself, or what an adapter puts in its place: such a wrapper has an attribute `active_classifier`.
    """
    head = classification_head(model)
    if isinstance(head, ModulesToSaveWrapper):
        active = [] if head.disable_adapters else head.active_adapters
        return head.modules_to_save[active[0]] if active else head.original_module
    return getattr(head, "active_classifier", head)


def linear_classifier(model: nn.Module) -> Any:
    """The part of [`classifier`] with `weight` (K, d) and `bias` (K,) or None, by which the logits are linear.

    None where there is no such single layer, as for a head that LoRA adapts, whose own weight is not what classifies,
    or beside another head.
    """
    head = None if other_heads(model) else _only_layer(classifier(model))
    if isinstance(head, BaseTunerLayer) or not isinstance(getattr(head, "weight", None), Tensor):
        return None
    return head


def _only_layer(head: Any) -> Any:
    """What computes in a head that is a `Sequential` of one layer and others that only pass on, as ResNet's is."""
    if not isinstance(head, nn.Sequential):
        return head
    parts = [part for part in head if not isinstance(part, nn.Flatten | nn.Dropout | nn.Identity)]
    return parts[0] if len(parts) == 1 else None


def linear_parameter(model: nn.Module) -> nn.Parameter:
    """The parameter (K, d) to which a change of an image model's classifier can be added.

    The weight of [`linear_classifier`], or for a head under LoRA that of the layer it adapts.

    Raises:
        ValueError: the head is not one linear layer that is added to, its rows are prototypes, or there are two heads.
    """
    if others := other_heads(model):
        raise ValueError(f"{type(unwrap(model)).__name__} has another head, {others[0]!r}, which would not be turned.")
    head = _only_layer(classifier(model))
    if isinstance(head, BaseTunerLayer):
        head = head.get_base_layer()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
        raise ValueError(
            f"The head of {type(unwrap(model)).__name__} is a {type(head).__name__}, not one linear layer whose rows "
            "could be turned."
        )
    return weight
