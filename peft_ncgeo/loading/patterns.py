"""Limits on regular expressions from files: a pattern that could run for a very long time is refused."""

from __future__ import annotations

import math
import re
from typing import Any

from ..validation import LONGEST_TEXT, short_repr

_MOST = 2**20  # steps for one name, over all patterns: a few hundredths of a second
_LEAST = 2**10  # steps that each pattern counts at least, because it has to be compiled
_PLACES = 2**5  # positions inside a module's name where a repeat may end
# Fields that PEFT reads as patterns of module names, even if they are plain names; in a mapping, its keys.
_FIELDS = ("modules", "pattern", "layers", "parameters")


def check_patterns(fields: dict[str, Any]) -> None:
    """Raise an error if a pattern in the fields of a PEFT config could take too long to match.

    Python matches by backtracking: with `(a+)+` the steps double with every letter, and each `.*` multiplies them.

    Raises:
        ValueError: a pattern is not a regular expression, is too long, repeats a group, refers back to a group, or has
            too many repeats and alternatives; or there are too many patterns.
    """
    total = 0.0
    for field, value in fields.items():
        if any(word in field for word in _FIELDS):
            values = [value] if isinstance(value, str) else value if isinstance(value, list | set | dict) else []
            for pattern in (text for text in values if isinstance(text, str)):
                total += max(_LEAST, _steps(field, pattern))
                if total > _MOST:
                    raise ValueError(
                        f"{field}={short_repr(pattern)} could take too long to match, alone or with the other "
                        "patterns; list the modules' names, or use fewer repeats and alternatives."
                    )


def _steps(field: str, pattern: str) -> float:
    """Return the order of magnitude of the largest number of steps that matching a module's name can take."""
    if len(pattern) > LONGEST_TEXT:
        raise ValueError(
            f"{field} has a pattern of {len(pattern):,} characters; at most {LONGEST_TEXT:,} are allowed."
        )
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{field}={short_repr(pattern)} is not a regular expression ({error}).") from None
    if re.search(r"\\[1-9]|\(\?(?![:=!]|<[=!]|P<)", pattern):
        raise ValueError(
            f"{field}={short_repr(pattern)} refers back to a group or sets flags, which is refused in files."
        )
    # one letter stands for an escape or a set; lazy repeats count like greedy ones
    plain = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "c", pattern)
    plain = re.sub(r"([*+?}])[?+]", r"\1", plain)
    steps = 1.0
    while group := re.search(r"\((?:\?(?:[:=!]|<[=!]|P<\w+>))?([^()]*)\)", plain):
        if re.match(r"[*+{]", plain[group.end() :]):
            raise ValueError(
                f"{field}={short_repr(pattern)} repeats a group, which could run without end; list the names."
            )
        steps *= _choices(group[1])
        plain = plain[: group.start()] + "g" + plain[group.end() :]
    return steps * _choices(plain)


def _choices(text: str) -> float:
    """Return the number of ways in which a pattern without groups can be tried."""
    repeats = len(re.findall(r"[*+{]", text))
    return (1 + text.count("|")) * math.pow(2, text.count("?")) * math.pow(_PLACES, repeats)
