"""PEFT's adapters inside a model: where they are, their parameters, and the model with them switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


def adapter_layers(model: nn.Module) -> list[Any]:
    """The modules through which PEFT changes the model's output, of any PEFT method."""
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that adapters brought along, of all adapters, without those of the modules they wrap."""
    return [
        parameter
        for layer in adapter_layers(model)
        for name, parameter in layer.named_parameters()
        if not {"base_layer", "original_module"} & set(name.split("."))
    ]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run the base model. PEFT's own `disable_adapter()` also rewrites every `requires_grad`, twice a step."""
    layers = adapter_layers(model)
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value
