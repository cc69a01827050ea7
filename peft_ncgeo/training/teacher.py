"""The frozen model: the same weights with the adapter switched off, never a second copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapters import adapter_layers, adapters_off
from ..data.class_prompts import class_prompts
from .towers_module import TowersModule, encode


class FrozenTeacher:
    """Features of the model as it was before training, without gradient.

    Args:
        towers: the student; its adapter is switched off for each pass.
        tokenizer: reads the templates (unused by a model without text).
        templates: texts whose features are averaged per class.

    Raises:
        ValueError: the model has no adapters, so that there is nothing to switch off.
    """

    def __init__(self, towers: TowersModule, tokenizer: Any, templates: Sequence[str]) -> None:
        if not adapter_layers(towers):
            raise ValueError("A loss asks for the frozen model, but the model has no PEFT adapters to switch off.")
        self.towers, self.tokenizer, self.templates = towers, tokenizer, list(templates)
        self._texts: dict[tuple[str, ...], Tensor] = {}

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) to (B, d)."""
        with adapters_off(self.towers):
            return encode(self.towers, pixel_values=pixel_values)["image_features"]

    def text_features(self, names: Sequence[str], device: torch.device) -> Tensor:
        """(K, d), computed once for each list of names."""
        key = tuple(names)
        if key not in self._texts:
            features = []
            with adapters_off(self.towers):
                for template in self.templates:
                    texts = class_prompts(names, template, 0, self.tokenizer).to(device)
                    features.append(encode(self.towers, **texts)["text_features"])
            self._texts[key] = torch.stack(features).mean(dim=0)
        return self._texts[key]
