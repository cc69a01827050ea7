"""Figures of results, one kind per file; they need matplotlib (`pip install peft_ncgeo[plot]`)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .alignment import plot_alignment
    from .confusion import plot_confusion
    from .curve import plot_curve
    from .gaps import plot_gaps
    from .relation import plot_relation
    from .reliability import plot_reliability
    from .settings import plot_settings

__all__ = [
    "plot_alignment",
    "plot_confusion",
    "plot_curve",
    "plot_gaps",
    "plot_relation",
    "plot_reliability",
    "plot_settings",
]

_LAZY = {
    "plot_alignment": ".alignment",
    "plot_confusion": ".confusion",
    "plot_curve": ".curve",
    "plot_gaps": ".gaps",
    "plot_relation": ".relation",
    "plot_reliability": ".reliability",
    "plot_settings": ".settings",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
