"""Regular expressions that others wrote: those that could run without end are refused."""

from __future__ import annotations

import math
import re
from typing import Any

from ..validation import LONGEST_TEXT, shown

_MOST = 2**20  # steps for one name, of all patterns together: a few hundredths of a second
_LEAST = 2**10  # steps that a pattern is worth at least, since it has to be compiled
_PLACES = 2**5  # where a repeat may end inside a module's name
# What PEFT reads as patterns of module names, whether or not it is one; in a mapping, its keys.
_FIELDS = ("modules", "pattern", "layers", "parameters")


def check_patterns(fields: dict[str, Any]) -> None:
    """Refuse patterns among a PEFT config's fields that could take for ever to match.

    Python looks for a match by trial: `(a+)+` doubles its steps with every letter, and each `.*` multiplies them.

    Raises:
        ValueError: a pattern that is none, is too long, repeats a group or reads one again, has too many repeats and
            alternatives; or too many of them.
    """
    total = 0.0
    for field, value in fields.items():
        if any(word in field for word in _FIELDS):
            values = [value] if isinstance(value, str) else value if isinstance(value, list | set | dict) else []
            for pattern in (text for text in values if isinstance(text, str)):
                total += max(_LEAST, _steps(field, pattern))
                if total > _MOST:
                    raise ValueError(
                        f"{field}={shown(pattern)} could take too long to match, alone or with the other patterns; "
                        "list the modules' names, or use fewer repeats and alternatives."
                    )


def _steps(field: str, pattern: str) -> float:
    """Return the most steps that matching a module's name can take, to an order of magnitude."""
    if len(pattern) > LONGEST_TEXT:
        raise ValueError(f"{field} has a pattern of {len(pattern):,} characters; at most {LONGEST_TEXT:,} are read.")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{field}={shown(pattern)} is no regular expression ({error}).") from None
    if re.search(r"\\[1-9]|\(\?(?![:=!]|<[=!]|P<)", pattern):
        raise ValueError(f"{field}={shown(pattern)} reads a group again or sets flags, which is not read from files.")
    # one letter for an escape and for a set; how eagerly a repeat is taken changes no count
    plain = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "c", pattern)
    plain = re.sub(r"([*+?}])[?+]", r"\1", plain)
    steps = 1.0
    while group := re.search(r"\((?:\?(?:[:=!]|<[=!]|P<\w+>))?([^()]*)\)", plain):
        if re.match(r"[*+{]", plain[group.end() :]):
            raise ValueError(f"{field}={shown(pattern)} repeats a group, which may have no end; list the names.")
        steps *= _choices(group[1])
        plain = plain[: group.start()] + "g" + plain[group.end() :]
    return steps * _choices(plain)


def _choices(text: str) -> float:
    """Return in how many ways a text without groups can be tried."""
    repeats = len(re.findall(r"[*+{]", text))
    return (1 + text.count("|")) * math.pow(2, text.count("?")) * math.pow(_PLACES, repeats)
