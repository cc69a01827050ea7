"""Replacement of an image classifier's head: projector and prototypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...geometry.sphere import l2_normalize
from ..tuner_layer import TunerLayer


class PrototypeClassifier(nn.Module):
    """Module that returns the cosines (B, K) of features (B, d) with unit prototypes, divided by the temperature.

    The result is in float32 or wider.
    """

    bias = None

    def __init__(self, prototypes: Tensor, temperature: float, copies: int, trainable: bool) -> None:
        super().__init__()
        self.temperature, self.copies = temperature, copies
        self._checked = False
        if trainable:
            self.prototypes = nn.Parameter(prototypes.float())
        else:
            self.register_buffer("prototypes", prototypes.float())

    @property
    def weight(self) -> Tensor:
        """Prototypes (K, d), of length 1 even while they are trained."""
        return l2_normalize(self.prototypes)

    def forward(self, features: Tensor) -> Tensor:
        if not self._checked and not torch.compiler.is_compiling():  # a traced pass has no values
            if self.prototypes.isnan().any():
                raise ValueError(
                    "The prototypes were given as a tensor and have not been loaded; pass geometry=tensor, or load "
                    "the adapter's file."
                )
            self._checked = True
        with torch.autocast(features.device.type, enabled=False):
            return l2_normalize(features) @ self.weight.T / self.temperature


class PrototypeLayer(TunerLayer):
    """Wrapped classification head; a projector and prototypes replace it while an adapter is active."""

    adapter_layer_names: tuple[str, ...] = (
        "ncgeo_prototype_hidden",
        "ncgeo_prototype_output",
        "ncgeo_prototype_classifier",
    )
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, width: int) -> None:
        super().__init__(base_layer)
        self.width = width
        # three modules on one level: PEFT removes the adapter's name only from keys of this depth
        self.ncgeo_prototype_hidden = nn.ModuleDict()
        self.ncgeo_prototype_output = nn.ModuleDict()
        self.ncgeo_prototype_classifier = nn.ModuleDict()

    def update_layer(self, adapter_name: str, classifier: PrototypeClassifier, inference_mode: bool) -> None:
        """Add an adapter with a new projector."""
        self.ncgeo_prototype_hidden[adapter_name] = nn.Linear(self.width, self.width)
        self.ncgeo_prototype_output[adapter_name] = nn.Linear(self.width, classifier.prototypes.shape[1])
        self.ncgeo_prototype_classifier[adapter_name] = classifier
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @property
    def active_classifier(self) -> nn.Module:
        """Module that computes the logits: the prototypes, or the base model's head if no adapter is active."""
        name = self.active_name
        return self.base_layer if name is None else self.ncgeo_prototype_classifier[name]

    def forward(self, features: Tensor) -> Tensor:
        name = self.active_name
        if name is None:
            return self.base_layer(features)
        hidden: Any = self.ncgeo_prototype_hidden[name]
        features = F.relu(hidden(features.flatten(1).to(hidden.weight.dtype)))  # float32 for any base dtype
        return self.ncgeo_prototype_classifier[name](l2_normalize(self.ncgeo_prototype_output[name](features)))
