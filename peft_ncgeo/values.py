"""What plain arguments must be, and how values and errors are shown in a message of one line."""

from __future__ import annotations

import math
from numbers import Integral, Real
from os import PathLike
from typing import Any

import torch

_LONGEST = 80  # characters of a value in a message
_LONGEST_REASON = 250  # characters of another error's words
# Errors that say nothing about a file or an input: a package that is missing, memory, the device.
OF_THE_MACHINE: tuple[type[BaseException], ...] = (
    ImportError,
    MemoryError,
    torch.OutOfMemoryError,
    *([torch.AcceleratorError] if hasattr(torch, "AcceleratorError") else []),  # torch 2.8's
)


def check_whole_number(name: str, value: Any, least: int) -> None:
    """Refuse what is not a whole number of at least `least`, by name."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}={shown(value)} must be a whole number of at least {least}.")


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False, by name: of words, "false" too would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)} must be True or False.")


def check_names(name: str, value: Any) -> list[str] | None:
    """None or a list of words; one word alone is such a list, not a list of its letters."""
    if value is None:
        return None
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple | set) or not all(isinstance(word, str) and word for word in names):
        raise ValueError(f"{name}={shown(value)} must be a list of names.")
    return list(names)


def check_path(name: str, value: Any) -> str | None:
    """None, or a name or path as text."""
    if value is not None and not isinstance(value, str | PathLike):
        raise ValueError(f"{name}={shown(value)} must be a name or a path.")
    return None if value is None else str(value)


def shown(value: Any) -> str:
    """The `repr` of a value in one line that is not too long for a message."""
    text = repr(value) if isinstance(value, str) else " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def reason(error: BaseException) -> str:
    """What another error says, in one line that is not too long for a message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."
