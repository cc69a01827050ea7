"""Base class of the wrapped modules of all PEFT methods in this package."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..models.devices import execution_device

# Transformers and Accelerate set these on every module that has them, so the wrapper must not forward them to its base
# layer.
_NOT_FORWARDED = {"gradient_checkpointing", "_gradient_checkpointing_func", "_hf_hook", "_old_forward", "base_layer"}


class TunerLayer(nn.Module, BaseTunerLayer):
    """Wrapper that forwards attributes to its base layer. One adapter is active at a time; none can be merged."""

    base_layer: Any
    keeps_tokens_apart = True  # so texts can share rows, see `models.text_encoder`

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _NOT_FORWARDED:
                raise
            return getattr(self.base_layer, name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise ValueError(f"One adapter of this kind can be active at a time, got {list(adapter_names)}.")
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError("This adapter cannot be merged into weights; `unload()` returns the base model without it.")

    def unmerge(self) -> None:
        raise ValueError("This adapter is never merged, so there is nothing to unmerge.")

    @property
    def active_name(self) -> str | None:
        """Name of the adapter that is active in this layer, or None."""
        names = [] if self.disable_adapters else self.active_adapters
        return next((name for name in names if name in self._get_available_adapters()), None)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype]:
        # PEFT looks for `.weight`, which many wrapped modules lack. Trained weights stay float32 for any base dtype.
        return execution_device(base_layer), torch.float32
