"""What plain arguments must be, and how values and errors are shown in a message of one line."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from os import PathLike
from typing import Any

import torch

LONGEST_TEXT = 1000  # characters of a name, a path or a template in a config; no tower reads as many words
MOST_NAMES = 10_000  # in a list of a config
_LONGEST = 80  # characters of a value in a message
_LONGEST_REASON = 250  # characters of another error's words
# Errors that say nothing about a file or an input: a package that is missing, memory, the device.
OF_THE_MACHINE: tuple[type[BaseException], ...] = (
    ImportError,
    MemoryError,
    torch.OutOfMemoryError,
    *([torch.AcceleratorError] if hasattr(torch, "AcceleratorError") else []),  # torch 2.8's
)


def whole_number(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """The value as Python's integer; numpy's and tensors' of one number are taken too.

    Raises:
        TypeError: another kind of value; True and False are no numbers.
        ValueError: less than `least` or more than `most`.
    """
    wanted = "a whole number" if least is None else f"a whole number of at least {least}"
    wanted = wanted if most is None else f"{wanted} and at most {most:,}"
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, Integral):
        raise TypeError(f"{name}={shown(value)} must be {wanted}.")
    number = int(plain)
    if (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(f"{name}={shown(value)} must be {wanted}.")
    return number


def real_number(
    name: str, value: Any, wanted: str = "a finite number", fits: Callable[[float], bool] = math.isfinite
) -> float:
    """The value as Python's float; numpy's and tensors' of one number are taken too.

    Args:
        wanted: what it must be, in the words of the message.
        fits: whether a number is that.

    Raises:
        TypeError: another kind of value; True and False are no numbers.
        ValueError: a number that does not fit.
    """
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, Real):
        raise TypeError(f"{name}={shown(value)} must be {wanted}.")
    try:
        number = float(plain)
    except OverflowError:  # of integers
        number = math.inf if plain > 0 else -math.inf  # type: ignore[operator]
    if not fits(number):
        raise ValueError(f"{name}={shown(value)} must be {wanted}.")
    return number


def positive(name: str, value: Any) -> float:
    """The value as a finite float above 0; see [`real_number`]."""
    return real_number(name, value, "greater than 0 and finite", lambda number: 0 < number < math.inf)


def not_negative(name: str, value: Any) -> float:
    """The value as a finite float of at least 0; see [`real_number`]."""
    return real_number(name, value, "a finite number of at least 0", lambda number: 0 <= number < math.inf)


def flag(name: str, value: Any) -> bool:
    """The value as Python's True or False. Others are refused, by name: of words, "false" too would count as true."""
    plain = _plain(value)
    if not isinstance(plain, bool):
        raise ValueError(f"{name}={shown(value)} must be True or False.")
    return plain


def check_names(name: str, value: Any) -> list[str] | None:
    """None or a list of words; one word alone is such a list, not a list of its letters."""
    if value is None:
        return None
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple | set) or not all(isinstance(word, str) and word for word in names):
        raise ValueError(f"{name}={shown(value)} must be a list of names.")
    if len(names) > MOST_NAMES or any(len(word) > LONGEST_TEXT for word in names):
        raise ValueError(f"{name} must be at most {MOST_NAMES:,} names of at most {LONGEST_TEXT:,} characters.")
    return list(names)


def check_path(name: str, value: Any) -> str | None:
    """None, or a name or path as text."""
    if value is not None and not isinstance(value, str | PathLike):
        raise ValueError(f"{name}={shown(value)} must be a name or a path.")
    return None if value is None else check_length(name, str(value))


def check_length(name: str, text: str) -> str:
    """The text, which a person can have written; refuse one of many thousand characters."""
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"{name} has {len(text):,} characters; it must be at most {LONGEST_TEXT:,}.")
    return text


def _plain(value: Any) -> Any:
    """What an array or tensor of one number holds; any other value as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "shape", None) in ((), (1,)) else value


def shown(value: Any) -> str:
    """The `repr` of a value in one line that is not too long for a message."""
    text = repr(value) if isinstance(value, str) else " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def reason(error: BaseException) -> str:
    """What another error says, in one line that is not too long for a message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."
