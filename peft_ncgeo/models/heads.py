"""Access to the classification head of an image model, with or without adapters."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from .adapters import unwrap

HEAD = "classifier"  # its name in Transformers' ...ForImageClassification models


def classification_head(model: nn.Module) -> nn.Module | None:
    """Return the head of an image classification model (with PEFT's wrapper if it has one), or None.

    A list of layers does not count as a head: the model calls its layers one by one.
    """
    head = getattr(unwrap(model), HEAD, None)
    return None if isinstance(head, nn.Identity | nn.ModuleList | nn.ModuleDict) else head


def other_heads(model: nn.Module) -> list[str]:
    """Return names of heads whose logits are averaged with those of the classification head, as in LeViT's teacher."""
    heads = [(name, child) for name, child in unwrap(model).named_children() if name != HEAD and HEAD in name]
    return [name for name, child in heads if not isinstance(child, nn.Identity)]


def head_width(head: nn.Module) -> int:
    """Return the width d of the features that a head takes.

    Raises:
        ValueError: the head holds no linear layer, so the width is not known.
    """
    for module in head.modules():
        width: Any = getattr(module, "in_features", None)
        if isinstance(width, int):
            return width
    raise ValueError(f"{type(head).__name__} holds no linear layer, so the width of its features is not known.")


def classifier(model: nn.Module) -> Any:
    """Return the module that takes an image model's features and gives its logits, or None.

    It is the head itself, or the replacement by an adapter: such a wrapper has an attribute `active_classifier`.
    """
    head = classification_head(model)
    if isinstance(head, ModulesToSaveWrapper):
        active = [] if head.disable_adapters else head.active_adapters
        return head.modules_to_save[active[0]] if active else head.original_module
    return getattr(head, "active_classifier", head)


def linear_classifier(model: nn.Module) -> Any:
    """Return the linear layer of [`classifier`], with `weight` (K, d) and `bias` (K,) or None.

    Return None if there is no single such layer, for example for a head under LoRA, whose own weight alone does not
    classify, or for a model with a second head.
    """
    head = None if other_heads(model) else _only_layer(classifier(model))
    if isinstance(head, BaseTunerLayer) or not isinstance(getattr(head, "weight", None), Tensor):
        return None
    return head


def _only_layer(head: Any) -> Any:
    """Return the only layer that computes in a `Sequential` head, such as ResNet's, or None if there are several."""
    if not isinstance(head, nn.Sequential):
        return head
    parts = [part for part in head if not isinstance(part, nn.Flatten | nn.Dropout | nn.Identity)]
    return parts[0] if len(parts) == 1 else None


def linear_parameter(model: nn.Module) -> nn.Parameter:
    """Return the parameter (K, d) to which a change of an image model's classifier can be added.

    It is the weight of [`linear_classifier`]; for a head under LoRA, the weight of the layer that LoRA adapts.

    Raises:
        ValueError: the head is not one linear layer, its rows are prototypes, or the model has a second head.
    """
    if others := other_heads(model):
        raise ValueError(f"{type(unwrap(model)).__name__} has another head, {others[0]!r}, which would not change.")
    head = _only_layer(classifier(model))
    if isinstance(head, BaseTunerLayer):
        head = head.get_base_layer()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
        raise ValueError(
            f"The head of {type(unwrap(model)).__name__} is a {type(head).__name__}, not one linear layer whose rows "
            "can be changed."
        )
    return weight
