"""Features of the frozen model: the student with its adapter switched off, without a second copy of the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import BatchEncoding

from ...models.adapters import adapter_layers, adapters_off, change_of_base
from ...models.feature_extractor import FeatureExtractor, extract_features
from .text_share import TextShare


class FrozenTeacher:
    """Features of the model as it was before training, without gradient.

    Args:
        extractor: the student; its adapter is switched off for each pass.
        texts: the class names in each template; features of several templates are averaged.

    Raises:
        ValueError: the model has no adapters to switch off, or is not the pretrained model without them: parameters
            outside of adapters are trained, or the adapter was made from the base model's weights.
    """

    def __init__(self, extractor: FeatureExtractor, texts: Sequence[BatchEncoding]) -> None:
        if not adapter_layers(extractor):
            raise ValueError(
                "A loss asks for the frozen model, but the model has no PEFT adapters to switch off; wrap it with "
                "get_peft_model(model, config), or leave the loss out."
            )
        if change := change_of_base(extractor.model):
            raise ValueError(f"A loss asks for the frozen model, but {change}.")
        self.extractor, self.texts = extractor, list(texts)
        self._text_features: Tensor | None = None

    def image_features(self, pixel_values: Tensor, **others: Tensor) -> Tensor:
        """Return the features (B, d) of `pixel_values` (B, C, H, W) and the other tensors that the model needs."""
        with adapters_off(self.extractor):
            return extract_features(self.extractor, pixel_values=pixel_values, **others)["image_features"]

    def text_features(self, device: torch.device) -> Tensor:
        """Return the text features (K, d), the mean over the templates, computed once."""
        if self._text_features is None:
            with adapters_off(self.extractor):
                shares = [TextShare(dict(texts.to(device))) for texts in self.texts]
                features = [
                    share.gather(extract_features(self.extractor, **share.own)["text_features"]) for share in shares
                ]
            self._text_features = torch.stack(features, dim=1).mean(dim=1)
        return self._text_features
