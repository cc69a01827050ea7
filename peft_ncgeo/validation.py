"""Checks of plain arguments, and one-line texts of values and errors for messages."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from os import PathLike
from typing import Any

import torch

LONGEST_TEXT = 1000  # characters of a name, a path or a template in a config; no text tower reads longer texts
MOST_NAMES = 10_000  # of names in one list of a config
_LONGEST = 80  # characters of a value shown in a message
_LONGEST_REASON = 250  # characters of another error's text in a message
# Errors of the machine, not of a file or an input: a missing package, memory, the device.
OF_THE_MACHINE: tuple[type[BaseException], ...] = (
    ImportError,
    MemoryError,
    torch.OutOfMemoryError,
    *([torch.AcceleratorError] if hasattr(torch, "AcceleratorError") else []),  # new in torch 2.8
)


def check_int(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Return the value as a Python int; accept numpy values and tensors of one number too.

    Raises:
        TypeError: the value is not an integer; True and False are refused.
        ValueError: the value is less than `least` or more than `most`.
    """
    wanted = "a whole number" if least is None else f"a whole number of at least {least}"
    wanted = wanted if most is None else f"{wanted} and at most {most:,}"
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, Integral):
        raise TypeError(f"{name}={short_repr(value)} must be {wanted}.")
    number = int(plain)
    if (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(f"{name}={short_repr(value)} must be {wanted}.")
    return number


def check_float(
    name: str, value: Any, wanted: str = "a finite number", fits: Callable[[float], bool] = math.isfinite
) -> float:
    """Return the value as a Python float; accept numpy values and tensors of one number too.

    Args:
        wanted: requirement on the value, in the words of the error message.
        fits: test that returns True for a valid number.

    Raises:
        TypeError: the value is not a number; True and False are refused.
        ValueError: `fits` returns False.
    """
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, Real):
        raise TypeError(f"{name}={short_repr(value)} must be {wanted}.")
    try:
        number = float(plain)
    except OverflowError:  # an int too large for a float
        number = math.inf if plain > 0 else -math.inf  # type: ignore[operator]
    if not fits(number):
        raise ValueError(f"{name}={short_repr(value)} must be {wanted}.")
    return number


def check_positive(name: str, value: Any) -> float:
    """Return the value as a finite float above 0; see [`check_float`]."""
    return check_float(name, value, "greater than 0 and finite", lambda number: 0 < number < math.inf)


def check_non_negative(name: str, value: Any) -> float:
    """Return the value as a finite float of at least 0; see [`check_float`]."""
    return check_float(name, value, "a finite number of at least 0", lambda number: 0 <= number < math.inf)


def check_bool(name: str, value: Any) -> bool:
    """Return the value as a Python bool; refuse other types, since the string "false" is true in Python."""
    plain = _plain(value)
    if not isinstance(plain, bool):
        raise ValueError(f"{name}={short_repr(value)} must be True or False.")
    return plain


def check_names(name: str, value: Any) -> list[str] | None:
    """Return a list of names, or None for None; a single string becomes a list of one name."""
    if value is None:
        return None
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple | set) or not all(isinstance(word, str) and word for word in names):
        raise ValueError(f"{name}={short_repr(value)} must be a list of names.")
    if len(names) > MOST_NAMES or any(len(word) > LONGEST_TEXT for word in names):
        raise ValueError(f"{name} must be at most {MOST_NAMES:,} names of at most {LONGEST_TEXT:,} characters.")
    return list(names)


def check_path(name: str, value: Any) -> str | None:
    """Return a name or a path as a string, or None for None."""
    if value is not None and not isinstance(value, str | PathLike):
        raise ValueError(f"{name}={short_repr(value)} must be a name or a path.")
    return None if value is None else check_length(name, str(value))


def check_length(name: str, text: str) -> str:
    """Return the text; raise an error if it is longer than a person would write."""
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"{name} has {len(text):,} characters; it must be at most {LONGEST_TEXT:,}.")
    return text


def _plain(value: Any) -> Any:
    """Return the number in an array or tensor of one number; return other values unchanged."""
    return value.item() if hasattr(value, "item") and getattr(value, "shape", None) in ((), (1,)) else value


def short_repr(value: Any) -> str:
    """Return the `repr` of a value in one line, cut to a length that fits a message."""
    text = repr(value) if isinstance(value, str) else " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def one_line(error: BaseException) -> str:
    """Return the text of an error in one line, cut to a length that fits a message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."
