"""Execution devices of models, including offloaded models."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import nn

_PASS = threading.RLock()  # held by a pass of an offloaded model


def execution_device(module: nn.Module) -> torch.device | None:
    """Return the device for a module's inputs, or None for a module without parameters.

    The weights of an offloaded model are on `meta` between passes; the device is read from Accelerate's hooks.
    """
    here = next((parameter.device for parameter in module.parameters()), None)
    if here is None or here.type != "meta":
        return here
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):  # of a SequentialHook
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return here


def check_movable(model: Any) -> None:
    """Raise an error if a model is fully offloaded: torch cannot move it, so it cannot be trained.

    Raises:
        ValueError: no part of the model is on a device.
    """
    if is_offloaded(model) and len(getattr(model, "hf_device_map", None) or {}) < 2:
        raise ValueError(
            "The whole model is offloaded; use a device_map with an entry for each part, and keep the parts that are "
            "trained on a device."
        )


def is_offloaded(model: nn.Module) -> bool:
    """Return True if Accelerate keeps some of a model's weights off the device between passes."""
    hooked = (module for module in model.modules() if "_hf_hook" in vars(module))  # few; asked before every pass
    return any(map(has_offloaded_params, hooked))


def one_at_a_time(model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context for a pass of a model, which makes other threads wait if the model is offloaded.

    Accelerate's hooks load a layer's weights before it runs and remove them afterwards, even while another thread's
    pass still needs them; without the lock, results would be wrong.
    """
    return _PASS if is_offloaded(model) else nullcontext()
