"""Restoring a model after a failed change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def unchanged_on_error(model: Any, copy_weights: bool = False) -> Iterator[None]:
    """Restore the model if the body of the context raises an error, also on Ctrl-C.

    Its modules with their attributes, hooks and modes, its config, and its parameter and buffer objects are restored.
    Without a model, nothing is done.

    Args:
        copy_weights: True: also restore weights that the body may change in place; this doubles the model's memory.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    owners: list[Any] = [*model.modules(), *([model.config] if hasattr(vars(model).get("config"), "__dict__") else [])]
    attributes = [(owner, vars(owner).copy(), _contents(owner)) for owner in owners]
    parameters = [(p, p.data, p.requires_grad, p.grad) for p in model.parameters()]
    tensors = (*model.parameters(), *model.buffers()) if copy_weights else ()
    numbers = [(tensor.data, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    except BaseException:
        for owner, held, contents in attributes:
            vars(owner).clear()
            vars(owner).update(held)
            for container, content in contents:
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(content)
        for parameter, data, requires_grad, gradient in parameters:
            parameter.data = data
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        with torch.no_grad():
            for tensor, copy in numbers:
                tensor.copy_(copy)
        raise


def _contents(owner: Any) -> list[tuple[Any, Any]]:
    """Return the containers among an object's attributes, each with a copy of its content."""
    return [(value, value.copy()) for value in vars(owner).values() if isinstance(value, dict | list | set)]
