"""Float32 weights for adapters in a base model of any precision, since half precision rounds small steps to zero."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import recursively_apply
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from .adapters import adapter_layers, is_of_base
from .heads import classification_head
from .snapshots import unchanged_on_error

HALF = (torch.float16, torch.bfloat16)


def hold_in_float32(model: nn.Module) -> bool:
    """Cast adapter tensors from half precision to float32, in place; return True if any was cast.

    Modules trained as a whole (`modules_to_save`), which PEFT keeps in the base model's dtype, are cast too. Such a
    module then takes inputs of any precision; a classification head gives float32 logits, other modules give the base
    model's dtype. Parameters stay the same objects, so an optimiser that holds them stays valid.
    """
    found = False
    with unchanged_on_error(model):
        for layer in adapter_layers(model):
            for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
                if tensor.dtype in HALF and not is_of_base(name):
                    tensor.data, tensor.grad, found = tensor.data.float(), None, True
            if isinstance(layer, ModulesToSaveWrapper) and _dtype(layer.original_module) in HALF:
                _accept_other_dtypes(layer, back=layer is not classification_head(model))
    return found


def _accept_other_dtypes(layer: Any, back: bool) -> None:
    """Add hooks that cast inputs, and outputs if `back`. Hooks without state survive copies, pickles and merges."""
    for module in layer.modules_to_save.values():
        if _cast_inputs not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
    if back and _cast_output not in layer._forward_hooks.values():
        layer.register_forward_hook(_cast_output)


def _dtype(module: nn.Module) -> torch.dtype | None:
    return next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), None)


def _to(data: Any, dtype: torch.dtype | None) -> Any:
    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return recursively_apply(cast, data)


def _cast_inputs(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return _to(args, _dtype(module)), _to(kwargs, _dtype(module))


def _cast_output(layer: Any, args: Any, output: Any) -> Any:
    return _to(output, _dtype(layer.original_module))
