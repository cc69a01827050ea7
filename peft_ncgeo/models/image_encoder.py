"""Encoder of images, used by the whole library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .adapters import unwrap
from .families import find_family
from .heads import classifier, head_path
from .substitution import Recorder, substitute

_BESIDE_PIXELS = ("pixel_attention_mask", "spatial_shapes")  # what SigLIP 2 with patches of any number needs


def image_inputs(batch: Mapping[str, Any], device: Any = None, prefix: str = "") -> dict[str, Tensor]:
    """Return the inputs of an image tower from a batch: `pixel_values`, and the other tensors that some models need.

    Args:
        batch: output of an image processor, or a batch of a data loader.
        device: device to which the inputs are moved; None: they are not moved.
        prefix: text before the names in the batch; the names in the result do not have it.
    """
    names = ["pixel_values", *(name for name in _BESIDE_PIXELS if prefix + name in batch)]
    found = {name: batch[prefix + name] for name in names}
    return found if device is None else {name: value.to(device) for name, value in found.items()}


def check_image_inputs(model: nn.Module, others: Mapping[str, Any]) -> None:
    """Raise a ValueError if an input that the model needs in addition to the pixels is missing.

    Args:
        others: inputs in addition to the pixels.
    """
    base = unwrap(model)
    for module in (base, *base.children()):
        family = find_family(module)
        for name in family.image_inputs if family else ():
            if others.get(name) is None:
                raise ValueError(
                    f"{type(base).__name__} needs {name} beside pixel_values; pass images, or all that its own image "
                    "processor returns for them."
                )


def encode_images(model: nn.Module, pixel_values: Tensor, **others: Tensor) -> Tensor:
    """Return the unnormalised features (B, d) of pixels (B, C, H, W).

    Features of a CLIP are projected; those of an image classifier are the input of its head.

    Args:
        others: tensors that the model's image processor returns in addition to the pixels, see [`image_inputs`].

    Raises:
        ValueError: an input that the model needs in addition to the pixels is missing.
    """
    base = unwrap(model)
    if hasattr(base, "get_image_features"):
        check_image_inputs(model, others)
        return base.get_image_features(pixel_values=pixel_values, **others).pooler_output
    return encode_and_classify(model, pixel_values, **others)[0]


def encode_and_classify(model: nn.Module, pixel_values: Tensor, **others: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input features (B, d) of a classification model's head, and its logits (B, K).

    Args:
        others: see [`encode_images`].

    Raises:
        ValueError: the model has no head, does not call it exactly once, or passes feature maps to it; or an input is
            missing.
    """
    check_image_inputs(model, others)
    head, place = classifier(model), head_path(model)
    if place is None:
        raise ValueError(f"{type(unwrap(model)).__name__} has neither a text tower nor a classification head.")
    base = unwrap(model)
    path = next(path for path, module in base.get_submodule(place).named_modules(prefix=place) if module is head)
    recorder = Recorder(head)
    logits = substitute(base, {path: recorder})(pixel_values=pixel_values, **others).logits
    features = recorder.only("entered")
    if features.dim() > 2 and features[0, 0].numel() > 1:  # ResNet's features are (B, d, 1, 1)
        raise ValueError(
            f"The head of {type(base).__name__} takes maps {tuple(features.shape)}, not one feature of an image; use "
            "a model whose head follows the pooling."
        )
    return features.flatten(1), logits
