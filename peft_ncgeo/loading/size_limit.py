"""Limit on the memory that an adapter may ask for while it is added to a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_SLACK = 2**20  # numbers that are always allowed, for small models
# Functions that make tensors of a size given by numbers alone.
_MAKERS: frozenset[Callable[..., Any]] = frozenset(
    [
        torch.arange,
        torch.empty,
        torch.empty_strided,
        torch.eye,
        torch.full,
        torch.linspace,
        torch.ones,
        torch.rand,
        torch.randint,
        torch.randn,
        torch.randperm,
        torch.zeros,
        torch.Tensor.new_empty,
        torch.Tensor.new_full,
        torch.Tensor.new_ones,
        torch.Tensor.new_zeros,
    ]
)


class SizeLimit(TorchFunctionMode):
    """Context in which new tensors may hold only as many numbers as an adapter can need.

    The author of an adapter chooses the sizes in its config (r, num_vision_tokens, ...), and PEFT makes the tensors
    before it reads the file. The tensors of a regular adapter hold a few times as many numbers as its file; for some
    methods, also a few times as many as the model.

    Args:
        numbers: limit for all tensors together; a million more are allowed.
    """

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.left: float = numbers + _SLACK

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _MAKERS and kwargs.get("out") is None:
            without = {key: value for key, value in kwargs.items() if key not in ("generator", "pin_memory")}
            asked = func(*args, **{**without, "device": "meta"}).numel()
            self.left -= asked
            if self.left < 0:
                raise ValueError(f"its config asks for a tensor of {asked:,} numbers, many more than its file holds")
        return func(*args, **kwargs)
