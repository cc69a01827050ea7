"""Module for all forward passes of the student, so that DDP sees all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .adapters import evaluation_mode, unwrap
from .devices import one_at_a_time
from .image_encoder import encode_and_classify, encode_images
from .text_encoder import encode_texts
from .towers import reads_text


class FeatureExtractor(nn.Module):
    """Module that runs the towers for which it gets inputs, and returns unnormalized features.

    The result has `image_features` (B, d) and `text_features` (K, d) for a CLIP-like model, and `image_features` and
    `logits` (B, K) for a classification model. Features of a classification model are the input of its head.

    Args:
        text_batch_size: number of texts that are encoded at a time, see [`~peft_ncgeo.models.encode_texts`].
    """

    def __init__(self, model: nn.Module, text_batch_size: int | None = None) -> None:
        super().__init__()
        self.model, self.text_batch_size = model, text_batch_size

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Set training mode, but do not update frozen batch norms, whose statistics adapter files do not store."""
        super().train(mode)
        trained = trained_batch_norms(self)
        for module in self.modules():
            if isinstance(module, _BatchNorm) and module not in trained:
                module.eval()
        return self

    def spare_lower_layers(self, args: Any) -> None:
        """Stop the backward pass at the first prompt, also under gradient checkpointing.

        Only reentrant checkpointing needs tower inputs that require gradients. Transformers makes the inputs of text
        towers require them, also for other checkpointing, but not those of image models, whose adapters would then not
        be trained.
        """
        options = getattr(args, "activation_checkpointing_kwargs", None) or {}
        model = unwrap(self.model)
        model.disable_input_require_grads()
        if options.get("use_reentrant", False) and model.is_gradient_checkpointing:
            model.enable_input_require_grads()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **beside_pixels: Tensor,
    ) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        if pixel_values is not None:  # ResNet's layers do not cast their inputs
            pixel_values = pixel_values.to(next(self.model.parameters()).dtype)
        if pixel_values is not None and reads_text(self.model):
            out["image_features"] = encode_images(self.model, pixel_values, **beside_pixels)
        elif pixel_values is not None:
            out["image_features"], out["logits"] = encode_and_classify(self.model, pixel_values, **beside_pixels)
        if input_ids is not None:
            out["text_features"] = encode_texts(self.model, input_ids, attention_mask, self.text_batch_size)
        return out


def trained_batch_norms(model: nn.Module) -> list[nn.Module]:
    """Return the batch norms that are trained; they use the statistics of each batch."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [module for module in norms if any(parameter.requires_grad for parameter in module.parameters())]


@torch.no_grad()
def extract_features(towers: FeatureExtractor, **inputs: Tensor) -> dict[str, Tensor]:
    """Run a pass without gradients in evaluation mode, and restore the mode of every module."""
    with evaluation_mode(towers), one_at_a_time(towers):
        return towers(**inputs)
