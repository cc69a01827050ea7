"""Tuner that adds bottleneck adapters beside the MLPs of an image tower."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...models.blocks import find_mlp_norms
from ...models.heads import classification_head
from ...models.towers import find_towers
from ..tuner_model import TunerModel
from .config import default_width
from .layer import AdaptFormerLayer


class AdaptFormerModel(TunerModel):
    """Tuner that applies an [`AdaptFormerConfig`] to a model; created by `get_peft_model`."""

    prefix = "ncgeo_adaptformer_"

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        self._places = find_mlp_norms(model)
        self._width = find_towers(model)["vision"].width
        if peft_config.bottleneck_dim is None:
            classes = peft_config.num_classes or _count_outputs(model)
            peft_config.bottleneck_dim = default_width(classes, len(self._places))

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        return key in self._places

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, AdaptFormerLayer) else AdaptFormerLayer(target, self._width)
        layer.update_layer(adapter_name, peft_config.bottleneck_dim, peft_config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)


def _count_outputs(model: Any) -> int:
    if classification_head(model) is None:
        raise ValueError(
            f"{type(model).__name__} has no known classification head, whose number of outputs would give the "
            "width of the adapters; pass num_classes or bottleneck_dim."
        )
    return model.config.num_labels
