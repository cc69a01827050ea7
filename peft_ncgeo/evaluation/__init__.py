"""Evaluation: zero-shot classification and metrics."""

from .base_new import evaluate_base_new
from .few_shot import FewShotClassifier
from .metrics import evaluate_groups, harmonic_mean
from .zero_shot import ZeroShotClassifier

__all__ = ["FewShotClassifier", "ZeroShotClassifier", "evaluate_base_new", "evaluate_groups", "harmonic_mean"]
