"""Accuracies as pure functions."""

from __future__ import annotations

from collections.abc import Sequence

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


def evaluate_groups(
    predictions: ArrayLike,
    labels: ArrayLike,
    class_counts: ArrayLike,
    thresholds: Sequence[float] | str = (20, 100),
) -> dict[str, float | None]:
    """Accuracy on classes with many, medium and few training samples; see [`class_groups`].

    Args:
        predictions: (N,) class indices.
        labels: (N,) class indices, 0 to K - 1.
        class_counts: (K,) numbers of *training* samples, as `peft_ncgeo.data.class_counts(train_set)` gives them.
        thresholds: (low, high), or "thirds".

    Returns:
        "many", "medium" and "few": the share, in 0..1, of the samples of the group's classes predicted right; None
        for a group without classes or without samples.

    Raises:
        ValueError: other shapes, a label that is no class index, or what `class_groups` refuses.

    Example:

    >>> round(harmonic_mean(0.8, 0.6), 4)
    0.6857

    Example:

    >>> evaluate_groups(predictions=[0, 1, 1, 2], labels=[0, 1, 2, 2], class_counts=[150, 50, 5])
    {'many': 1.0, 'medium': 1.0, 'few': 0.5}

    Example:

    >>> accuracy([0, 0, 0, 0], [0, 0, 0, 1]), balanced_accuracy([0, 0, 0, 0], [0, 0, 0, 1])
    (0.75, 0.5)
    """
    groups = class_groups(class_counts, thresholds)
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.ndim != 1 or predictions.shape != labels.shape:
        raise ValueError(
            f"predictions and labels must both be (N,) class indices, got {predictions.shape} and {labels.shape}; "
            "take the argmax of logits."
        )
    classes = sum(map(len, groups.values()))
    unknown = labels[~np.isin(labels, np.arange(classes))]
    if len(unknown):
        raise ValueError(f"Label {unknown[0]} is no index of the {classes} classes that class_counts counts.")
    members = {group: np.isin(labels, indices) for group, indices in groups.items()}
    return {g: accuracy(predictions[m], labels[m]) if m.any() else None for g, m in members.items()}


def class_groups(class_counts: ArrayLike, thresholds: Sequence[float] | str = (20, 100)) -> dict[str, np.ndarray]:
    """Indices of the classes with many, medium and few training samples.

    With (low, high): many is `n > high`, medium `low < n <= high`, few `n <= low`. With "thirds", for tails that are
    short everywhere: the classes by count, largest first and ties in the order of the labels, in three groups as
    equal as possible (the first ones are the larger, as in `np.array_split`).

    Args:
        class_counts: (K,) numbers of training samples.

    Raises:
        ValueError: counts that are not (K,) or negative, or thresholds that are neither.
    """
    counts = np.asarray(class_counts, dtype=np.float64)
    if counts.ndim != 1 or not len(counts) or not (counts >= 0).all():
        raise ValueError(f"class_counts must be one number of at least 0 for each class, got {counts.tolist()}.")
    if isinstance(thresholds, str) and thresholds == "thirds":
        many, medium, few = np.array_split(np.argsort(-counts, kind="stable"), 3)
        return {"many": many, "medium": medium, "few": few}
    if isinstance(thresholds, str) or len(thresholds) != 2 or not thresholds[0] < thresholds[1]:
        raise ValueError(f'thresholds={thresholds!r} must be (low, high) with low < high, or "thirds".')
    low, high = thresholds
    parts = {"many": counts > high, "medium": (low < counts) & (counts <= high), "few": counts <= low}
    return {group: np.flatnonzero(part) for group, part in parts.items()}
