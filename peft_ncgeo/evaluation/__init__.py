"""Evaluation: zero-shot classification and metrics."""

from .metrics import harmonic_mean
from .zero_shot import ZeroShotClassifier

__all__ = ["ZeroShotClassifier", "harmonic_mean"]
