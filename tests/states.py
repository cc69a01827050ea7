"""All that a pass, a training or a load could leave behind in a model."""

from __future__ import annotations

import copy

import torch
from torch import nn


def state(model: nn.Module, modes: bool = True) -> dict:
    """Types, modes, hooks, adapters and config of a model, and its tensors bit for bit."""
    found = {"config": copy.deepcopy(vars(model.config)) if hasattr(model, "config") else None}
    found["adapters"] = str(getattr(model, "peft_config", None))
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        adapter = getattr(module, "_disable_adapters", None), str(getattr(module, "_active_adapter", None))
        found[name] = type(module), modes and module.training, hooks, "forward" in vars(module), adapter
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        content = tensor.detach().clone().view(-1).view(torch.uint8).numpy().tobytes()
        found[f"{name} (tensor)"] = tensor.dtype, tensor.requires_grad, content
    return found


def changes(before: dict, after: dict) -> list[str]:
    """Return the names of all that differs between two states."""
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
