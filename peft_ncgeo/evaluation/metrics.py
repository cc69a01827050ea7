"""Accuracies as pure functions."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Share of samples whose prediction is the label; both (N,)."""
    return float(np.mean(np.asarray(predictions) == np.asarray(labels)))


def balanced_accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Mean over the classes with samples of the share of each predicted right; both (N,)."""
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    return float(np.mean([np.mean(predictions[labels == c] == c) for c in np.unique(labels)]))


def harmonic_mean(base: float, new: float) -> float:
    """`H = 2 b n / (b + n)` of base and new accuracy; 0 where both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0
