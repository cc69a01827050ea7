"""Reports on the quality of a classifier: scores of each class, confusions, calibration, and simple baselines."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .baselines import linear_probe, nearest_class_mean
    from .calibration import Calibration, expected_calibration_error, fit_temperature, reliability
    from .classification import classification_report, macro_f1, report_of_predictions, scale_temperature
    from .report import Report

__all__ = [
    "Calibration",
    "Report",
    "classification_report",
    "expected_calibration_error",
    "fit_temperature",
    "linear_probe",
    "macro_f1",
    "nearest_class_mean",
    "reliability",
    "report_of_predictions",
    "scale_temperature",
]

_LAZY = {
    "Calibration": ".calibration",
    "Report": ".report",
    "classification_report": ".classification",
    "expected_calibration_error": ".calibration",
    "fit_temperature": ".calibration",
    "linear_probe": ".baselines",
    "macro_f1": ".classification",
    "nearest_class_mean": ".baselines",
    "reliability": ".calibration",
    "report_of_predictions": ".classification",
    "scale_temperature": ".classification",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
