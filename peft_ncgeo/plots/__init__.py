"""Figures of results, one kind in each file; needs matplotlib (`pip install peft_ncgeo[plot]`)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .alignment import plot_alignment
    from .curve import plot_curve
    from .gaps import plot_gaps
    from .relation import plot_relation

__all__ = ["plot_alignment", "plot_curve", "plot_gaps", "plot_relation"]

_LAZY = {"plot_alignment": ".alignment", "plot_curve": ".curve", "plot_gaps": ".gaps", "plot_relation": ".relation"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
