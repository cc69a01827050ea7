"""Checks of arguments: types, shapes, and values on a device; [`DeferredChecks`] reads many values in one copy."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, Token
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

_active: ContextVar[DeferredChecks | None] = ContextVar("active", default=None)


def check(good: Tensor, tell: Callable[[], None]) -> None:
    """Call `tell`, which raises or warns, if the scalar `good` is False: now, or when [`DeferredChecks`] are read."""
    deferred = _active.get()
    if deferred is not None:
        deferred.noted.append((good.detach(), tell))
    elif not good:
        tell()


def refuse_unless(good: Tensor, error: type[Exception], message: str, *values: Any) -> None:
    """Raise `error` if the scalar `good` is False; see [`check`].

    Args:
        message: text with `{}` for each of `values`; scalar tensors among these are read only for the error.
    """
    check(good, partial(_refuse, error, message, values))


def _refuse(error: type[Exception], message: str, values: tuple[Any, ...]) -> None:
    raise error(message.format(*values))


def maybe(condition: Tensor) -> bool:
    """Return the value of the scalar `condition`; inside [`DeferredChecks`], return True without reading it."""
    return _active.get() is not None or bool(condition)


def number(value: Tensor) -> float | Tensor:
    """Return the scalar `value` as a float; inside [`DeferredChecks`], return a copy on its device."""
    return float(value) if _active.get() is None else value.clone()


def numbers(name: str, value: Any) -> Tensor:
    """Return real numbers (a tensor, array, list or number) as a tensor, at full precision.

    Raises:
        TypeError: the value is of another type.
    """
    try:
        value = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{name} must be numbers, got a value of type {type(value).__name__}.") from None
    check_tensor(name, value)
    return value


def check_tensor(name: str, value: Any) -> None:
    """Raise a TypeError unless the value is a tensor of real numbers."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got a value of type {type(value).__name__}.")
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must hold real numbers, got {value.dtype}.")


def check_shape(name: str, value: Any, *axes: str) -> None:
    """Check that a value is a tensor of real numbers with these axes, for example K and d, none of length 0."""
    check_tensor(name, value)
    if value.dim() != len(axes):
        raise ValueError(f"{name} must have shape ({', '.join(axes)}), got {tuple(value.shape)}.")
    if not value.numel():
        raise ValueError(f"{name} is empty: its shape is {tuple(value.shape)}.")


def check_finite(name: str, value: Tensor) -> None:
    """Check that all values are finite; see [`check`]."""
    if value.is_floating_point():
        refuse_unless(value.isfinite().all(), ValueError, "{} has non-finite values.", name)


def check_labels(labels: Tensor, num_classes: int, lowest: int = 0) -> None:
    """Check that labels are in `lowest`..K-1; see [`check`]."""
    if labels.numel():
        low, high = labels.aminmax()
        wrong = low.where(low < lowest, high)
        good = (low >= lowest) & (high < num_classes)
        refuse_unless(good, ValueError, "labels must be in {}..{}, got {}.", lowest, num_classes - 1, wrong)


def deferred() -> bool:
    """Return True if each [`check`] is only recorded now and read later."""
    return _active.get() is not None


class DeferredChecks:
    """Context in which [`check`] only records its condition, so that the host does not wait for the device.

    If an error is raised inside the context and an earlier recorded check has failed, the error of that check is
    raised in its place.
    """

    def __init__(self) -> None:
        self.noted: list[tuple[Tensor, Callable[[], None]]] = []
        self._token: Token[DeferredChecks | None] | None = None

    def __enter__(self) -> DeferredChecks:
        self._token = _active.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._token is not None
        _active.reset(self._token)
        if isinstance(error, Exception):
            self.read()

    def read(self) -> None:
        """Read all recorded checks in one copy, and report those that failed, in the order of recording."""
        noted, self.noted = self.noted, []
        if noted:
            device = noted[0][0].device
            results = torch.stack([good.to(device) for good, _ in noted]).tolist()
            for good, (_, tell) in zip(results, noted, strict=True):
                if not good:
                    tell()
