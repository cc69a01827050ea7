"""Tuner that replaces the head by a projector and prototypes, and adds prompts to the backbone."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ...models.adapters import unwrap
from ...models.heads import covers, head_width, replaceable_head
from ..prompt_model import PromptModel
from .layer import PrototypeClassifier, PrototypeLayer


class PrototypeModel(PromptModel):
    """Tuner that applies a [`PrototypeConfig`] to a model; created by `get_peft_model`."""

    prefix = "ncgeo_prototype_"

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        self._head = replaceable_head(model)  # refuses an unsuitable head before any module is replaced
        for name in peft_config.modules_to_save or ():
            if covers(name, self._head):
                raise ValueError(f"modules_to_save names {name!r}, the head that prototypes replace; leave it out.")
        labels = unwrap(model).config.num_labels
        if peft_config.num_classes is None:
            peft_config.num_classes = labels
        elif peft_config.num_classes != labels:
            warnings.warn(
                f"num_classes={peft_config.num_classes}, but the model names {labels} labels; load it with "
                f"num_labels={peft_config.num_classes}, or pipelines cannot name the classes.",
                stacklevel=2,
            )
        peft_config.prototypes()  # refuses impossible prototypes before any module is replaced
        super()._prepare_model(peft_config, model)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        return key == self._head or super()._check_target_module_exists(peft_config, key)

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
        if current_key != self._head:
            super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key)
            return
        layer = target if isinstance(target, PrototypeLayer) else PrototypeLayer(target, head_width(target))
        classifier = PrototypeClassifier(
            peft_config.prototypes(),
            peft_config.temperature,
            peft_config.prototypes_per_class,
            peft_config.trainable,
        )
        layer.update_layer(adapter_name, classifier, peft_config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
