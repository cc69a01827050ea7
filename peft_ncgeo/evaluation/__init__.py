"""Classifiers and metrics under the names of version 0.1.0."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..classifiers.base_new import evaluate_base_new
from ..classifiers.few_shot import FewShotClassifier
from ..classifiers.zero_shot import ZeroShotClassifier
from ..metrics.accuracy import evaluate_groups, harmonic_mean
from ..metrics.hub_metrics import metric_path

if TYPE_CHECKING:
    from ..classifiers.trained import TrainedClassifier
    from ..metrics.hub_metrics.group_accuracy.group_accuracy import GroupAccuracyMetric
    from ..metrics.hub_metrics.neural_collapse.neural_collapse import NeuralCollapseMetric

__all__ = [
    "FewShotClassifier",
    "GroupAccuracyMetric",
    "NeuralCollapseMetric",
    "TrainedClassifier",
    "ZeroShotClassifier",
    "evaluate_base_new",
    "evaluate_groups",
    "harmonic_mean",
    "metric_path",
]

_LAZY = {
    "GroupAccuracyMetric": "..metrics.hub_metrics.group_accuracy.group_accuracy",
    "NeuralCollapseMetric": "..metrics.hub_metrics.neural_collapse.neural_collapse",
    "TrainedClassifier": "..classifiers.trained",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
