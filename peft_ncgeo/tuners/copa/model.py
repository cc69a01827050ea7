"""Tuner that adds heads after the pooled feature, and residual adapters to the backbone."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...models.devices import execution_device
from ...models.towers import find_pooling, find_residual_places, find_towers
from ..tuner_model import TunerModel
from .layer import CoPAInputLayer, CoPALayer, ResidualConvolution, ResidualLinear


class CoPAModel(TunerModel):
    """Tuner that applies a [`CoPAConfig`] to a model; created by `get_peft_model`."""

    prefix = "ncgeo_copa_"

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        self._pooling = find_pooling(model)
        width = self._pooling.width
        if peft_config.num_features not in (None, width):
            raise ValueError(
                f"num_features={peft_config.num_features}, but the features of {type(model).__name__} have {width}."
            )
        peft_config.num_features = width
        self._residual = find_residual_places(model) if peft_config.residual_adapters else []

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        return key == self._pooling.path or key in self._residual

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
        device = execution_device(self.model)  # a pooler has no weights to show its device
        layer: Any = target
        if current_key == self._pooling.path:
            kind = CoPAInputLayer if self._pooling.is_input else CoPALayer
            layer = target if isinstance(target, CoPALayer) else kind(target, self._pooling.width)
            layer.update_layer(adapter_name, peft_config.shared, device, peft_config.inference_mode)
        else:
            layer = target if isinstance(target, ResidualLinear | ResidualConvolution) else self._beside(target)
            layer.update_layer(adapter_name, device, peft_config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _beside(self, target: nn.Module) -> ResidualLinear | ResidualConvolution:
        vision = find_towers(self.model).get("vision")
        return ResidualConvolution(target) if vision is None else ResidualLinear(target, vision.width)
