"""Metrics of predictions and features: pure functions, and modules for the `evaluate` library."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .multi_label import multi_label_scores, per_class_scores
    from .probe import fit_probe

__all__ = ["fit_probe", "multi_label_scores", "per_class_scores"]

# scikit-learn comes with the first use
_LAZY = {"fit_probe": ".probe", "multi_label_scores": ".multi_label", "per_class_scores": ".multi_label"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
