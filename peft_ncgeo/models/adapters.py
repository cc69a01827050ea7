"""PEFT's adapters inside a model, and contexts that switch them off or hold the model in evaluation mode."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

# `init_lora_weights` that leave the base model as it is. The others (pissa, olora, corda, loftq, lora_ga) take what
# the adapter begins with out of the base model's weights.
_KEEPS_BASE = {"true", "false", "gaussian", "eva", "orthogonal", "mica"}


def adapter_layers(model: nn.Module) -> list[Any]:
    """The modules through which PEFT changes the model's output, of any PEFT method."""
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that adapters brought along, of all adapters, without those of the modules they wrap."""
    return [
        parameter
        for layer in adapter_layers(model)
        for name, parameter in layer.named_parameters()
        if not is_of_base(name)
    ]


def is_of_base(name: str) -> bool:
    """Return True for a tensor of the module that a PEFT layer wraps, by its name inside that layer."""
    return not {"base_layer", "original_module"}.isdisjoint(name.split("."))


def change_of_base(model: nn.Module) -> str:
    """Return the reason why the model with its adapters off is not the pretrained one, or "".

    Nothing is guessed: an unknown `init_lora_weights` counts as one that changes the base model.
    """
    inside = {id(parameter) for parameter in adapter_parameters(model)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in inside:
            return f"{name} is trained and belongs to no adapter, so switching adapters off does not undo it"
    return next(filter(None, map(base_change_of, _configs(model))), "")


def base_change_of(config: Any) -> str:
    """Return the reason why an adapter with this PEFT config changes the base model's own weights, or ""."""
    start = getattr(config, "init_lora_weights", True)
    if str(start).lower() not in _KEEPS_BASE:
        return (
            f"init_lora_weights={start!r} takes part of the base model's weights into the adapter, so switching "
            'it off does not give them back; True and "gaussian" leave them alone'
        )
    if getattr(config, "bias", "none") != "none":  # loaded with an adapter that is not trained here
        return f"bias={config.bias!r} changes biases of the base model, which switching adapters off does not undo"
    return ""


def _configs(model: nn.Module) -> list[Any]:
    """The PEFT configs of all adapters, active or not."""
    owners: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "peft_config", None), dict)]
    return [config for owner in owners for config in owner.peft_config.values()]


def check_adapter_weights(model: nn.Module) -> None:
    """Refuse adapters without weights, whose output would be what happens to lie in memory.

    Raises:
        ValueError: PEFT has put them on `meta`, as it does beside a layer that is offloaded.
    """
    for parameter in adapter_parameters(model):
        if parameter.is_meta:
            raise ValueError(
                "An adapter's weights are on meta, where PEFT puts them beside a layer that is offloaded; keep the "
                "adapted layers on a device with another device_map."
            )


class AdapterSnapshot:
    """The state of a model's adapters at a moment: which are on, and copies of the weights that training changes.

    Args:
        settings: whatever else a result depends on.

    Attributes:
        switches: of each adapter layer, whether it is off and the names of its active adapters.
    """

    def __init__(self, model: nn.Module, *settings: Any) -> None:
        self.settings, self.switches = settings, _switches(model)
        self._weights = [weight.detach().clone() for weight in _weights_in_force(model)]

    def matches(self, model: nn.Module, *settings: Any) -> bool:
        """Return True where the same adapters are on, with the same weights.

        Weights are compared by value: neither addresses nor version counters tell every change.
        """
        if (settings, _switches(model)) != (self.settings, self.switches):
            return False
        weights = _weights_in_force(model)
        return len(weights) == len(self._weights) and all(map(_same, weights, self._weights))


def _switches(model: nn.Module) -> tuple[Any, ...]:
    return tuple((layer._disable_adapters, tuple(layer.active_adapters)) for layer in adapter_layers(model))


def _weights_in_force(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of adapters that are on, and all that are trained."""
    on = [layer for layer in adapter_layers(model) if not layer._disable_adapters]
    of_adapters = {p: None for layer in on for n, p in layer.named_parameters() if not is_of_base(n)}
    inside = {id(parameter) for parameter in adapter_parameters(model)}
    others = {p: None for p in model.parameters() if p.requires_grad and id(p) not in inside}
    return [*of_adapters, *others]


def _same(weight: Tensor, copy: Tensor) -> bool:
    return weight.device == copy.device and torch.equal(weight, copy)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run the base model. PEFT's own `disable_adapter()` also rewrites every `requires_grad`, twice a step.

    For training, where nothing else runs the model: other threads would run the base model too.
    """
    layers = adapter_layers(model)
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value


_LOCK = threading.Lock()
_EVALUATED: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # to be trained on, and how many passes hold them


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Hold the model in evaluation mode; afterwards each module is in the mode that it was in.

    Passes in several threads may overlap: the last one to end gives training mode back.
    """
    held: list[nn.Module] = []
    try:
        with _LOCK:
            for module in model.modules():
                if module.training or module in _EVALUATED:
                    _EVALUATED[module] = _EVALUATED.get(module, 0) + 1
                    held.append(module)
                    module.training = False
        yield
    finally:
        with _LOCK:
            for module in held:
                _EVALUATED[module] -= 1
                if not _EVALUATED[module]:
                    del _EVALUATED[module]
                    module.training = True


def _innermost(module: Any) -> Any:
    """What an adapter wraps, or the module itself."""
    while isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    return module


def unwrap(model: nn.Module) -> Any:
    """The Transformers model inside a `PeftModel`, adapters still in place; any other model as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
