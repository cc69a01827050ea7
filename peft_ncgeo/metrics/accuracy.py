"""Accuracy metrics as pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from ..validation import check_float, one_line, short_repr


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Return the share of samples whose prediction equals the label; both are (N,) class indices, or both are names.

    Raises:
        ValueError: the shapes are wrong, or there are no samples.
        TypeError: entries are neither indices nor names.

    Example:

    >>> accuracy([0, 0, 0, 0], [0, 0, 0, 1]), balanced_accuracy([0, 0, 0, 0], [0, 0, 0, 1])
    (0.75, 0.5)
    """
    predictions, labels = _pairs(predictions, labels)
    return float(np.mean(predictions == labels))


def balanced_accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Return the mean accuracy of the classes with samples, each with the same weight; see [`accuracy`]."""
    predictions, labels = _pairs(predictions, labels)
    _, classes = np.unique(labels, return_inverse=True)
    return float(np.mean(np.bincount(classes, predictions == labels) / np.bincount(classes)))


def harmonic_mean(base: float, new: float) -> float:
    """Return `H = 2 b n / (b + n)` of base and new accuracy; 0 if both are 0.

    Raises:
        ValueError: a value is negative or not finite.
        TypeError: a value is not a number.

    Example:

    >>> round(harmonic_mean(0.8, 0.6), 4)
    0.6857
    """
    base, new = (
        check_float(name, value, "an accuracy of at least 0", lambda value: 0 <= value < math.inf)
        for name, value in (("base", base), ("new", new))
    )
    # this order avoids overflow, and underflow of products of tiny numbers
    return 2 * min(base, new) * (max(base, new) / (base + new)) if base + new else 0.0


def evaluate_groups(
    predictions: ArrayLike,
    labels: ArrayLike,
    class_counts: ArrayLike,
    thresholds: Sequence[float] | str = (20, 100),
) -> dict[str, float | None]:
    """Return the accuracy on classes with many, medium and few training samples; see [`class_groups`].

    Args:
        predictions: (N,) class indices.
        labels: (N,) class indices, 0 to K - 1.
        class_counts: (K,) numbers of *training* samples, as `peft_ncgeo.data.class_counts(train_set)` returns them.
        thresholds: (low, high), or "thirds".

    Returns:
        "many", "medium" and "few": the share, in 0..1, of correct predictions among the samples of the group's
        classes; None for a group without classes or without samples.

    Raises:
        ValueError: the shapes are wrong, a label is not a class index, or `class_groups` refuses the counts or
            thresholds.
        TypeError: predictions, labels or counts are not numbers.

    Example:

    >>> evaluate_groups(predictions=[0, 1, 1, 2], labels=[0, 1, 2, 2], class_counts=[150, 50, 5])
    {'many': 1.0, 'medium': 1.0, 'few': 0.5}
    """
    groups = class_groups(class_counts, thresholds)
    predictions, labels = _pairs(predictions, labels, empty=True)
    if not len(labels):
        return dict.fromkeys(groups)
    if labels.dtype.kind == "U":
        raise TypeError(f"labels must be class indices, got {labels[0]!r}.")
    classes = sum(map(len, groups.values()))
    unknown = labels[(labels < 0) | (labels >= classes)]
    if len(unknown):
        raise ValueError(f"Label {unknown[0]} is not an index of the {classes} classes in class_counts.")
    members = {group: np.isin(labels, indices) for group, indices in groups.items()}
    return {g: accuracy(predictions[m], labels[m]) if m.any() else None for g, m in members.items()}


def class_groups(class_counts: ArrayLike, thresholds: Sequence[float] | str = (20, 100)) -> dict[str, np.ndarray]:
    """Return the indices of the classes with many, medium and few training samples.

    With (low, high), many is `n > high`, medium is `low < n <= high` and few is `n <= low`. With "thirds", for tails
    whose classes are all small, classes are sorted by count (largest first, ties in the order of the labels) and
    divided into three groups of nearly equal size (the first groups are the larger ones, as in `np.array_split`).

    Args:
        class_counts: (K,) numbers of training samples.
        thresholds: (low, high), or "thirds".

    Raises:
        ValueError: counts do not have the shape (K,), are negative or not finite, or thresholds have another form.
        TypeError: counts are not numbers.
    """
    counts = _array("class_counts", class_counts)
    if counts.dtype.kind not in "iuf" and counts.size:
        raise TypeError(f"class_counts must be one number for each class, got {counts.dtype}.")
    counts = counts.astype(np.float64)
    if counts.ndim != 1 or not len(counts):
        raise ValueError(f"class_counts must be one number of at least 0 for each class, got shape {counts.shape}.")
    wrong = np.flatnonzero(~((counts >= 0) & (counts < np.inf)))
    if len(wrong):
        c = wrong[0]
        raise ValueError(
            f"class_counts must be one number of at least 0 for each class, but class_counts[{c}] is {counts[c]:g}."
        )
    if isinstance(thresholds, str) and thresholds == "thirds":
        many, medium, few = np.array_split(np.argsort(-counts, kind="stable"), 3)
        return {"many": many, "medium": medium, "few": few}
    low, high = _low_and_high(thresholds)
    parts = {"many": counts > high, "medium": (low < counts) & (counts <= high), "few": counts <= low}
    return {group: np.flatnonzero(part) for group, part in parts.items()}


def tail_thresholds(class_counts: ArrayLike) -> tuple[float, float] | str | None:
    """Return thresholds of [`class_groups`] that fit a long tail, or None if the classes have no tail.

    Classes have a tail if the largest has at least twice as many samples as the smallest. The thresholds are
    (20, 100), or "thirds" if no class has more than 100 samples.
    """
    counts = np.asarray(class_counts)
    if counts.max() < 2 * counts.min():
        return None
    return (20, 100) if counts.max() > 100 else "thirds"


def _low_and_high(thresholds: Any) -> tuple[float, float]:
    pair = list(thresholds) if isinstance(thresholds, (Sequence, np.ndarray, Tensor)) else []
    wanted = f'thresholds={short_repr(thresholds)} must be (low, high) with low < high, or "thirds".'
    try:
        low, high = (check_float("threshold", value, "a number", lambda _: True) for value in pair)
    except (TypeError, ValueError):
        raise ValueError(wanted) from None
    if not low < high:
        raise ValueError(wanted)
    return low, high


def _pairs(predictions: ArrayLike, labels: ArrayLike, empty: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return predictions and labels as (N,) arrays whose entries can be compared."""
    one, other = _array("predictions", predictions), _array("labels", labels)
    if one.ndim != 1 or one.shape != other.shape:
        raise ValueError(
            f"predictions and labels must both be (N,) class indices, got {one.shape} and {other.shape}; "
            "take the argmax of logits."
        )
    if not len(one) and not empty:
        raise ValueError("There are no samples; pass at least one prediction and its label.")
    for name, array in (("Prediction", one), ("Label", other)):
        wrong: Any = array[~np.isfinite(array) | (array != np.round(array))] if array.dtype.kind == "f" else []
        if len(wrong):
            raise ValueError(f"{name} {wrong[0]} must be a class index, a whole number.")
    if len(one) and not any(one.dtype.kind in kinds and other.dtype.kind in kinds for kinds in ("U", "iubf")):
        raise TypeError(
            f"predictions and labels must both be class indices or both be names, got {one.dtype} and {other.dtype}."
        )
    return one, other


def _array(name: str, values: Any) -> np.ndarray:
    try:
        array = np.asarray(values)
    except Exception as error:  # an array or tensor of any library may raise its own type
        raise TypeError(f"{name} must be an array of numbers: {one_line(error)}") from None
    words = array.dtype == object and all(isinstance(value, str) for value in array.flat)
    return array.astype(str) if words else array  # pandas keeps names as objects
