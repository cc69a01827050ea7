"""Writes the reference values.

    python -m tests.references.write                   what is new comes in, what nothing makes any more goes
    python -m tests.references.write losses/LDAM       and what begins so may have moved

Where another number moved, nothing is written: a change of a published formula is to be named.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .geometry import geometry
from .losses import losses
from .presets import presets

FILE = Path(__file__).parent / "reference_values.json"
TOLERANCE = 1e-6  # absolute, and relative to what is smaller than 1
ROUNDING = 1e-9  # what a small number may be off by, whatever its size

Values = dict[str, list[float]]


def made() -> Values:
    """Everything as this version computes it, by its name."""
    return losses() | geometry() | presets()


def stored(file: Path = FILE) -> Values:
    return json.loads(file.read_text())


def differs(new: list[float], old: list[float]) -> bool:
    """Return True if a number moved; nan differs from everything."""
    if len(new) != len(old):
        return True
    return not all(abs(a - b) <= max(TOLERANCE * min(1.0, abs(b)), ROUNDING) for a, b in zip(new, old, strict=True))


def moved(new: Values, old: Values) -> dict[str, str]:
    """Return the values that are in both and differ: name -> a line that says so."""
    both = [name for name in old if name in new and differs(new[name], old[name])]
    return {name: f"{name} moved from {_shown(old[name])} to {_shown(new[name])}" for name in both}


def _shown(numbers: list[float]) -> str:
    return str(numbers[0] if len(numbers) == 1 else numbers)


def write(new: Values, file: Path = FILE, may_move: Sequence[str] = ()) -> list[str]:
    """Write the file and say what changed in it.

    Raises:
        ValueError: a number moved whose name begins with none of `may_move`.
    """
    old = stored(file) if file.exists() else {}
    changes = moved(new, old)
    refused = [line for name, line in changes.items() if not name.startswith(tuple(may_move))]
    if refused:
        raise ValueError("Nothing was written; name what may move.\n" + "\n".join(refused))
    lines = list(changes.values())
    lines += [f"{name} is new" for name in new if name not in old]
    lines += [f"{name} is gone" for name in old if name not in new]
    # what did not move keeps its digits, so that a diff shows what did
    rows = {name: old[name] if name in old and name not in changes else numbers for name, numbers in new.items()}
    text = ",\n".join(f"{json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows))
    file.write_text("{\n" + text + "\n}\n")
    return lines


if __name__ == "__main__":
    try:
        print("\n".join(write(made(), may_move=sys.argv[1:])) or "Nothing changed.")
    except ValueError as error:
        raise SystemExit(str(error)) from None
