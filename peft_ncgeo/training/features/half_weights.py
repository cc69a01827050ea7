"""Frozen weights in half precision for autocast, cast once and not in every pass."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn


def autocast_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """Return the dtype of Accelerate's autocast; None if there is no autocast, as for "fp16" on a CPU."""
    kind = accelerator.device.type
    with accelerator.autocast():
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class HalfWeights:
    """Context in which frozen linear and convolution layers hold half-precision copies of their weights.

    Autocast would make the same copies in every pass: it keeps only copies of trained weights, and only during a pass.
    Outside the context the model has its own weights, so other users of the model are not affected.

    Args:
        model: model with frozen weights; memory for their copies is allocated at the first use.
        dtype: torch.bfloat16 or torch.float16; None: nothing is cast.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        self.model, self.dtype = model, dtype
        self._copies: dict[nn.Parameter, nn.Parameter] = {}
        self._places: list[tuple[nn.Module, str, nn.Parameter]] = []

    def __enter__(self) -> HalfWeights:
        try:
            self._cast()
        except BaseException:  # __exit__ is not called in this case
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        while self._places:
            module, name, parameter = self._places[-1]
            module._parameters[name] = parameter
            self._places.pop()  # last: if an interruption stops this loop, a second __exit__ still finds the entry

    def _cast(self) -> None:
        modules = self.model.modules() if self.dtype is not None else ()
        for module in modules:
            if type(module) not in (nn.Linear, nn.Conv2d) or any(p.requires_grad for p in module.parameters()):
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dtype == torch.float32:
                    self._places.append((module, name, parameter))
                    module._parameters[name] = self._copy(parameter)

    def _copy(self, parameter: nn.Parameter) -> nn.Parameter:
        if parameter not in self._copies:
            self._copies[parameter] = nn.Parameter(parameter.detach().to(self.dtype), requires_grad=False)
        return self._copies[parameter]
