"""Access to the classification head of an image model, with or without adapters."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from .adapters import unwrap
from .families import find_family

HEAD = "classifier"  # its name in most of Transformers' ...ForImageClassification models
_NO_HEAD = (nn.Identity, nn.ModuleList, nn.ModuleDict)


def head_path(model: nn.Module) -> str | None:
    """Return the path of an image classification model's head in the model without PEFT's wrapper, or None.

    It is `classifier` unless the model's family says otherwise.
    """
    return next(iter(_head_paths(model)), None)


def classification_head(model: nn.Module) -> nn.Module | None:
    """Return the head of an image classification model (with PEFT's wrapper if it has one), or None."""
    path = head_path(model)
    return None if path is None else _module(unwrap(model), path)


def other_heads(model: nn.Module) -> list[str]:
    """Return paths of heads whose logits are averaged with those of the classification head, as in LeViT's teacher."""
    return _head_paths(model)[1:]


def replaceable_head(model: nn.Module) -> str:
    """Return the path of the head that prototypes can replace: a model's only head, with a known input width.

    Raises:
        ValueError: the model has no known head, has several heads, or has a head without a linear layer.
    """
    name, head = type(unwrap(model)).__name__, classification_head(model)
    if head is None:
        raise ValueError(
            f"{name} has no classification head that is known for prototypes to replace; use an "
            "...ForImageClassification model."
        )
    path, *others = _head_paths(model)
    if others:
        raise ValueError(
            f"{name} averages its head with another, {others[0]!r}, which prototypes would not replace; use a model "
            "with one head."
        )
    head_width(head)
    return path


def saved_head(model: nn.Module) -> str:
    """Return the argument by which PEFT trains and saves the whole head, for an error message."""
    return f"modules_to_save=[{(head_path(model) or HEAD)!r}]"


def covers(name: str, path: str) -> bool:
    """Return True if a name in PEFT's `modules_to_save` means the module at this path, or one around it."""
    return any(f".{part}".endswith(f".{name}") for part in accumulate(path.split("."), "{}.{}".format))


def _head_paths(model: nn.Module) -> list[str]:
    """Return the paths of all heads; none if the first is an identity, or a list of layers called one by one."""
    base = unwrap(model)
    family = find_family(base)
    if family is None or family.heads is None:
        paths = [HEAD, *(name for name, _ in base.named_children() if name != HEAD and HEAD in name)]
    else:
        paths = list(family.heads(base))
    heads = {path: _module(base, path) for path in paths}
    found = [path for path, head in heads.items() if head is not None and not isinstance(head, _NO_HEAD)]
    return found if found[:1] == paths[:1] else []


def _module(model: nn.Module, path: str) -> Any:
    """Return the module at a path, or None if no module is there."""
    module: Any = model
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


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
    """Return the module from an image model's features to its logits, or None.

    It is the head, or the replacement of the head by an adapter, whose wrapper has an attribute `active_classifier`.
    """
    head = classification_head(model)
    if isinstance(head, ModulesToSaveWrapper):
        active = [] if head.disable_adapters else head.active_adapters
        return head.modules_to_save[active[0]] if active else head.original_module
    return getattr(head, "active_classifier", head)


def linear_classifier(model: nn.Module) -> Any:
    """Return the linear layer of [`classifier`], with `weight` (K, d) and `bias` (K,) or None.

    Return None if there is no single layer of this kind, for example for a head under LoRA, whose own weight is only a
    part of the classifier, for a head that is a convolution, or for a model with a second head.
    """
    head = None if other_heads(model) else _only_layer(classifier(model))
    weight = None if isinstance(head, BaseTunerLayer) else getattr(head, "weight", None)
    return head if isinstance(weight, Tensor) and weight.dim() == 2 else None


def _only_layer(head: Any) -> Any:
    """Return the only layer that computes in a `Sequential` head, such as ResNet's, or None if there are several."""
    if not isinstance(head, nn.Sequential):
        return head
    parts = [part for part in head if not isinstance(part, nn.Flatten | nn.Dropout | nn.Identity)]
    return parts[0] if len(parts) == 1 else None


def linear_parameter(model: nn.Module) -> nn.Parameter:
    """Return the parameter (K, d) to which a change of an image model's classifier can be added.

    It is the weight of [`linear_classifier`], or, for a head under LoRA, the weight of the layer that LoRA adapts.

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
