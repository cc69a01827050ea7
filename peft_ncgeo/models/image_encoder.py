"""Features of images."""

from __future__ import annotations

from torch import Tensor, nn

from .adapters import unwrap
from .heads import HEAD, classifier
from .substitution import Recorder, substitute


def image_features(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Projected, unnormalised image features of CLIP: pixels (B, C, H, W) to (B, d)."""
    return unwrap(model).get_image_features(pixel_values=pixel_values).pooler_output


def head_features(model: nn.Module, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """What enters a classification model's head (B, d), and the logits (B, K) that leave it."""
    head = classifier(model)
    if head is None:
        raise ValueError(f"{type(unwrap(model)).__name__} has neither a text tower nor a classification head.")
    base = unwrap(model)
    path = next(path for path, module in getattr(base, HEAD).named_modules(prefix=HEAD) if module is head)
    recorder = Recorder(head)
    logits = substitute(base, {path: recorder})(pixel_values=pixel_values).logits
    return recorder.only("entered").flatten(1), logits  # ResNet's end in (B, d, 1, 1)
