"""Encoder of images, used by the whole library."""

from __future__ import annotations

from torch import Tensor, nn

from .adapters import unwrap
from .heads import HEAD, classifier
from .substitution import Recorder, substitute


def encode_images(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Return the raw features (B, d) of pixels (B, C, H, W).

    Features of a CLIP are projected and not normalised; those of an image classifier are the input of its head.
    """
    base = unwrap(model)
    if hasattr(base, "get_image_features"):
        return base.get_image_features(pixel_values=pixel_values).pooler_output
    return encode_and_classify(model, pixel_values)[0]


def encode_and_classify(model: nn.Module, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features (B, d) that a classification model's head takes, and its logits (B, K).

    Raises:
        ValueError: the model has no head, or does not call it exactly once.
    """
    head = classifier(model)
    if head is None:
        raise ValueError(f"{type(unwrap(model)).__name__} has neither a text tower nor a classification head.")
    base = unwrap(model)
    path = next(path for path, module in getattr(base, HEAD).named_modules(prefix=HEAD) if module is head)
    recorder = Recorder(head)
    logits = substitute(base, {path: recorder})(pixel_values=pixel_values).logits
    return recorder.only("entered").flatten(1), logits  # ResNet's features are (B, d, 1, 1)
