"""Rows of the table that `check_gpu.py` prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Row:
    """Result of a check. `good` is None where there is no verdict; `notes` go to the JSON file alone."""

    check: str
    result: str
    limit: str = ""
    good: bool | None = None
    seconds: float = 0.0
    notes: Any = None


def limited(check: str, value: float, limit: float, unit: str) -> Row:
    """Return a row that is good if the value is at most the limit."""
    return Row(check, f"{value:.2g} {unit}", f"at most {limit:g}", value <= limit)


def markdown(rows: list[Row]) -> str:
    verdicts = {True: "good", False: "**failed**", None: "-"}
    lines = ["| check | result | limit | verdict | seconds |", "| --- | --- | --- | --- | ---: |"]
    for row in rows:
        cells = (row.check, row.result, row.limit, verdicts[row.good], f"{row.seconds:.1f}")
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)
