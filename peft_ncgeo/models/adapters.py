"""PEFT adapters inside a model, with contexts that switch them off or keep the model in evaluation mode."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

# Values of `init_lora_weights` that leave the base model unchanged. The others (pissa, olora, corda, loftq, lora_ga)
# move the adapter's initial product out of the base model's weights.
_KEEPS_BASE = {"true", "false", "gaussian", "eva", "orthogonal", "mica"}


def adapter_layers(model: nn.Module) -> list[Any]:
    """Return the modules by which PEFT changes the model's output, for any PEFT method."""
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of all adapters, without those of the modules that they wrap."""
    return _own_parameters(adapter_layers(model))


def _own_parameters(layers: Iterable[Any]) -> list[nn.Parameter]:
    return [p for layer in layers for name, p in layer.named_parameters() if not is_of_base(name)]


def is_of_base(name: str) -> bool:
    """Return True if the tensor with this name in a PEFT layer belongs to the module that the layer wraps."""
    return not {"base_layer", "original_module"}.isdisjoint(name.split("."))


def change_of_base(model: nn.Module) -> str:
    """Return the reason why the model with its adapters off is not the pretrained model, or "" if it is.

    An unknown `init_lora_weights` is treated as one that changes the base model.
    """
    for name in trained_outside(model):
        return f"{name} is trained and belongs to no adapter, so switching adapters off does not restore it"
    return next(filter(None, map(base_change_of, _configs(model))), "")


def trained_outside(model: nn.Module) -> list[str]:
    """Return the names of trained parameters that belong to no adapter."""
    inside = {id(parameter) for parameter in adapter_parameters(model)}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]


def base_change_of(config: Any) -> str:
    """Return the reason why an adapter with this config changes the base model's own weights, or "" if it does not."""
    start = getattr(config, "init_lora_weights", True)
    if str(start).lower() not in _KEEPS_BASE:
        return (
            f"init_lora_weights={start!r} takes part of the base model's weights into the adapter, so switching "
            'it off does not restore them; True and "gaussian" do not change them'
        )
    if getattr(config, "bias", "none") != "none":  # of an adapter that was loaded and is not trained
        return f"bias={config.bias!r} changes biases of the base model, which switching adapters off does not restore"
    return ""


def _configs(model: nn.Module) -> list[Any]:
    """Return the PEFT configs of all adapters, active or not."""
    owners: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "peft_config", None), dict)]
    return [config for owner in owners for config in owner.peft_config.values()]


def check_adapter_weights(model: nn.Module) -> None:
    """Raise an error for adapters whose weights have no values, which would give random output.

    Raises:
        ValueError: the weights are on `meta`, where PEFT puts the adapter of an offloaded layer.
    """
    for parameter in adapter_parameters(model):
        if parameter.is_meta:
            raise ValueError(
                "An adapter's weights are on meta, where PEFT puts the adapter of an offloaded layer; use a "
                "device_map that keeps the adapted layers on a device."
            )


class AdapterSnapshot:
    """Copy of the state of a model's adapters: whether each is on, and the weights of those that are on.

    The base model's own weights are not part of it.

    Args:
        settings: all other values on which a result depends.

    Attributes:
        switches: for each adapter layer, True if it is off, with the names of its active adapters.
    """

    def __init__(self, model: nn.Module, *settings: Any) -> None:
        self.settings, self.switches = settings, _switches(model)
        self._weights = [weight.detach().clone() for weight in _weights_in_force(model)]

    def matches(self, model: nn.Module, *settings: Any) -> bool:
        """Return True if the same adapters are on, with equal weights.

        Weights are compared by value, since addresses and version counters miss some changes.
        """
        if (settings, _switches(model)) != (self.settings, self.switches):
            return False
        weights = _weights_in_force(model)
        return len(weights) == len(self._weights) and all(map(_same, weights, self._weights))


def _switches(model: nn.Module) -> tuple[Any, ...]:
    return tuple((layer._disable_adapters, tuple(layer.active_adapters)) for layer in adapter_layers(model))


def _weights_in_force(model: nn.Module) -> list[Tensor]:
    """Return the parameters of adapters that are on, and their buffers, such as the statistics of batch norms."""
    on = [layer for layer in adapter_layers(model) if not layer._disable_adapters]
    return [*_own_parameters(on), *(b for layer in on for name, b in layer.named_buffers() if not is_of_base(name))]


def _same(weight: Tensor, copy: Tensor) -> bool:
    return weight.device == copy.device and torch.equal(weight, copy)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Switch adapters off. Unlike PEFT's `disable_adapter()`, this does not rewrite `requires_grad` at every use.

    Use it only if no other thread runs the model: other threads would run the base model too.
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
_EVALUATED: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # module -> passes that hold it


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Keep the model in evaluation mode; afterwards, restore the mode of each module.

    Uses in several threads may overlap: the last one that ends restores training mode.
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


def innermost(module: Any) -> Any:
    """Return the module inside all adapters around it."""
    while isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    return module


def unwrap(model: nn.Module) -> Any:
    """Return the Transformers model inside a `PeftModel`, with the adapters in it; return other models unchanged."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
