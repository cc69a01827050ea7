"""Outcomes of a call: a value that an oracle then judges, or an error of the package's own in one line."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import peft_ncgeo

PACKAGE = Path(peft_ncgeo.__file__).resolve().parent
REFUSALS = (ValueError, TypeError, FloatingPointError)
LONGEST = 500  # characters: a line that lists every class says nothing

Value = TypeVar("Value")


def said_well(call: Callable[[], Value], *exceptions: type[Exception]) -> Value | None:
    """The value of `call`, or None where it was refused as the package promises to refuse.

    Args:
        call: without arguments.
        exceptions: which errors count as a refusal. Default: ValueError, TypeError and FloatingPointError.

    Raises:
        AssertionError: the error was raised outside the package, is of another kind, or is not one line of words.
    """
    try:
        return call()
    except Exception as error:
        assert_said_well(error, *exceptions)
        return None


def assert_said_well(error: Exception, *exceptions: type[Exception]) -> None:
    """That the package itself raised this error, and said in one line what is wrong."""
    told = "".join(traceback.format_exception(error))
    last = traceback.extract_tb(error.__traceback__)[-1]
    assert PACKAGE in Path(last.filename).resolve().parents, f"raised outside the package:\n{told}"
    # what a function in C raises has the frame of its caller
    assert (last.line or "").startswith("raise"), f"raised outside the package:\n{told}"
    assert isinstance(error, exceptions or REFUSALS), f"{type(error).__name__} is no refusal:\n{told}"
    message = str(error)
    assert message.strip(), f"an error without a word:\n{told}"
    assert "\n" not in message, f"more than one line:\n{told}"
    assert len(message) <= LONGEST, f"{len(message)} characters:\n{message}"
