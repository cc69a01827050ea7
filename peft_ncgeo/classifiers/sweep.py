"""Results of a sweep over fractions, and the best fraction on validation images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..metrics.accuracy import accuracy, balanced_accuracy
from ..validation import short_repr

METRICS = ("balanced_accuracy", "accuracy")
FEW = 5  # validation images of a class, below which its accuracy says little


class Sweep(list[dict[str, float]]):
    """Rows of a sweep, one for each fraction, and the best of them.

    Attributes:
        metric: measure that chooses `best`: "balanced_accuracy" or "accuracy".
        class_counts: (K,), number of validation images of each class.

    Warns: if a class has fewer than 5 validation images.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, float]],
        metric: str,
        class_counts: Sequence[int],
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(rows)
        self.metric, self.class_counts = check_metric(metric), list(class_counts)
        few = [k for k, count in enumerate(self.class_counts) if count < FEW]
        if self and few:
            k = min(few, key=self.class_counts.__getitem__)
            name = short_repr(class_names[k]) if class_names else str(k)
            warnings.warn(
                f"The fraction {self.fraction:g} was chosen on {self.class_counts[k]} validation images of class "
                f"{name} ({len(few)} of {len(self.class_counts)} classes have fewer than {FEW}), so another fraction "
                "may be better; hold out more images of each class.",
                stacklevel=3,
            )

    @property
    def best(self) -> dict[str, float]:
        """Row with the highest `metric`; among equal rows, the one with the smallest fraction."""
        return max(self, key=lambda row: (row[self.metric], -row["fraction"]))

    @property
    def fraction(self) -> float:
        """Fraction of the best row."""
        return self.best["fraction"]

    @property
    def basis(self) -> str:
        """Text on how `fraction` was chosen: the metric, and the number of validation images per class."""
        low, high = min(self.class_counts), max(self.class_counts)
        images = f"{low}" if low == high else f"{low} to {high}"
        return f"chosen by {self.metric.replace('_', ' ')} on {images} validation images a class"

    def __repr__(self) -> str:
        return f"Sweep(fraction={self.fraction:g}, {self.basis}, {list(self)})" if self else "Sweep([])"


def check_metric(metric: Any) -> str:
    """Return the metric; raise a ValueError if a sweep cannot choose by it."""
    if metric not in METRICS:
        raise ValueError(f"metric={short_repr(metric)} must be one of {', '.join(map(repr, METRICS))}.")
    return str(metric)


def read_fraction(fraction: float | Sweep) -> tuple[float, str]:
    """Return a fraction, and text on how a sweep chose it (empty if a number was given).

    Raises:
        ValueError: the fraction is not in 0..1, or the sweep has no rows.
    """
    if not isinstance(fraction, Sweep):
        return check_fractions([fraction])[0], ""
    if not fraction:
        raise ValueError("The sweep has no fractions to choose from; sweep at least one.")
    return fraction.fraction, fraction.basis


def check_fractions(fractions: Any) -> list[float]:
    """Return fractions as a list; raise a ValueError if one is not in 0..1."""
    fractions = list(fractions)
    for fraction in fractions:
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction={fraction} must be 0 to 1.")
    return fractions


def score(predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """Return `accuracy` and `balanced_accuracy` of predicted classes (N,)."""
    balanced = balanced_accuracy(predicted.numpy(), labels.numpy())
    return {"accuracy": accuracy(predicted, labels), "balanced_accuracy": balanced}


def count_classes(labels: Tensor, num_classes: int) -> list[int]:
    """Return the number of images of each of K classes."""
    counts: list[int] = np.bincount(labels.numpy(), minlength=num_classes).tolist()
    return counts
