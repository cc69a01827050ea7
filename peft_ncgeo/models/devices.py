"""The device a model computes on: for one that is offloaded, not the device of its weights."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import nn

_PASS = threading.RLock()  # of offloaded models


def execution_device(module: nn.Module) -> torch.device | None:
    """The device that a module's inputs go to; None for one that has neither parameters nor a device of its own.

    The weights of a model that Accelerate has offloaded are on `meta` between passes; its hooks know the device.
    """
    here = next((parameter.device for parameter in module.parameters()), None)
    if here is None or here.type != "meta":
        return here
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):  # several in a row
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return here


def check_movable(model: Any) -> None:
    """Refuse to train a model that is offloaded as a whole, which torch cannot move.

    Raises:
        ValueError: none of its parts is left on a device.
    """
    if is_offloaded(model) and len(getattr(model, "hf_device_map", None) or {}) < 2:
        raise ValueError(
            "The whole model is offloaded; keep the parts that are trained or read directly on a device, with a "
            "device_map that names parts."
        )


def is_offloaded(model: nn.Module) -> bool:
    """Return True where Accelerate keeps some of a model's weights elsewhere between passes."""
    hooked = (module for module in model.modules() if "_hf_hook" in vars(module))  # few, and asked before every pass
    return any(map(has_offloaded_params, hooked))


def one_at_a_time(model: nn.Module) -> AbstractContextManager[Any]:
    """A context for a pass through a model, in which other threads wait where the model is offloaded.

    Accelerate's hooks bring weights into the model before a layer runs and take them out of it afterwards, also from
    under another thread's pass, whose answers are then wrong.
    """
    return _PASS if is_offloaded(model) else nullcontext()
