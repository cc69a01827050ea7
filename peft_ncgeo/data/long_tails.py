"""Imbalanced training sets: long tails and steps of class sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from datasets import Dataset

from ..validation import check_float, check_int, short_repr
from .checks import class_names
from .sampling import draw, label_array


def class_counts(dataset: Dataset, label_column: str = "label") -> np.ndarray:
    """Count the samples of each class: (K,) int64. Rows without a label (None or -1) are ignored.

    Raises:
        TypeError, ValueError: the column is missing or not a `ClassLabel`, or a label is outside the class names.
    """
    classes = len(class_names(dataset, label_column, "class_counts"))
    labels = label_array(dataset, label_column)
    return np.bincount(labels[labels >= 0], minlength=classes).astype(np.int64)


def realised_imbalance_factor(dataset: Dataset, label_column: str = "label") -> float:
    """Return `max_k n_k / min_k n_k` of the actual samples, to report together with the requested factor.

    Raises:
        ValueError: a class has no samples; the message gives its name.
    """
    counts = _counts_without_gaps(dataset, label_column)
    return float(counts.max() / counts.min())


def long_tailed(
    dataset: Dataset,
    tau: float | None = None,
    imbalance_factor: float | None = None,
    n_max: int | None = None,
    seed: int = 0,
    shuffle_classes: bool = False,
    label_column: str = "label",
) -> Dataset:
    """Make an exponential long tail: class k of K keeps `n_k` samples, by one of two rules.

    `tau`: `n_k = max(1, round(n_max * tau^(k/(K-1))))`, as in NPT and CPT; the default of `n_max` is 16.
    `imbalance_factor`: `n_k = max(1, int(n_max * (1/imbalance_factor)^(k/(K-1))))`, as in long-tailed image sets; the
    default of `n_max` is the size of the smallest class. Report [`realised_imbalance_factor`]: rounding changes it.

    Args:
        tau: share that the last class keeps, in (0, 1].
        imbalance_factor: size of the first class divided by that of the last class, at least 1.
        n_max: size of the largest class.
        seed: seed of the draw, which is without replacement. The same seed and rows give the same samples for any
            order and location of the rows, see [`few_shot`]; a larger `n_k` includes the samples of a smaller one.
        shuffle_classes: True: assign the counts to classes at random, by the seed. False: k is the label.

    Returns:
        The samples sorted by class, with the data set's format and transform. Every row is read once, and none is
        decoded: hashing takes about two seconds per gigabyte.

    Raises:
        TypeError: an argument is not a number.
        ValueError: both rules or neither are given, an argument is out of range, there are fewer than two classes, a
            class has fewer samples than `n_k`, or a file cannot be read.

    Example:

    >>> from datasets import ClassLabel
    >>> animals = Dataset.from_dict({"label": [0, 1, 2] * 16})
    >>> tail = long_tailed(animals.cast_column("label", ClassLabel(names=["cat", "dog", "panda"])), tau=0.25)
    >>> class_counts(tail).tolist(), realised_imbalance_factor(tail)
    ([16, 8, 4], 4.0)
    """
    whole: Callable[[float], int]
    if tau is not None and imbalance_factor is None:
        last = check_float("tau", tau, "above 0 and at most 1", lambda value: 0 < value <= 1)
        whole, n_max = round, 16 if n_max is None else n_max
    elif imbalance_factor is not None and tau is None:
        last, whole = 1 / imbalance("imbalance_factor", imbalance_factor), int
    else:
        raise ValueError("long_tailed needs exactly one of tau and imbalance_factor.")
    classes, n_max = _sizes(dataset, n_max, label_column, "long_tailed")
    counts = [whole(_tidy(n_max * last ** (k / (classes - 1)))) for k in range(classes)]
    return _draw_tail(dataset, counts, seed, shuffle_classes, label_column)


def step_imbalanced(
    dataset: Dataset,
    ratio: float,
    n_max: int | None = None,
    seed: int = 0,
    shuffle_classes: bool = False,
    label_column: str = "label",
) -> Dataset:
    """Make a step imbalance: `ceil(K/2)` classes keep `n_max` samples each, the others `max(1, int(n_max / ratio))`.

    Args:
        ratio: size of a large class divided by that of a small one, at least 1.
        n_max: size of the large classes. Default: the size of the smallest class.
        seed: seed of the draw; see [`long_tailed`], also for the cost and the order of the result.
        shuffle_classes: True: choose the large classes at random, by the seed. False: they have the lowest labels.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is out of range, there are fewer than two classes, or a class has too few samples.
    """
    ratio = imbalance("ratio", ratio)
    classes, n_max = _sizes(dataset, n_max, label_column, "step_imbalanced")
    large = math.ceil(classes / 2)
    counts = [n_max] * large + [int(_tidy(n_max / ratio))] * (classes - large)
    return _draw_tail(dataset, counts, seed, shuffle_classes, label_column)


def _draw_tail(dataset: Dataset, counts: Sequence[int], seed: int, shuffle: bool, label_column: str) -> Dataset:
    seed = check_int("seed", seed, least=0)
    counts = [max(1, count) for count in counts]
    if shuffle:
        # the third number keeps this stream apart from the classes' own: (seed, c) equals (seed, c, 0)
        counts = np.random.default_rng((seed, 0, 1)).permutation(counts).tolist()
    return draw(dataset, counts, seed, label_column, advice="lower n_max")


def imbalance(name: str, value: float) -> float:
    """Return a ratio of class sizes as a float; raise an error unless it is finite and at least 1."""
    return check_float(name, value, "a finite number of at least 1", lambda value: 1 <= value < math.inf)


def _tidy(number: float) -> float:
    """Remove floating-point errors, which would make `int` turn 4.999999999 into 4."""
    return round(number, 6)


def _sizes(dataset: Dataset, n_max: int | None, label_column: str, reader: str) -> tuple[int, int]:
    """Return the number of classes and the largest size: `n_max`, or the size of the smallest class if it is None."""
    names = class_names(dataset, label_column, reader)
    if len(names) < 2:
        raise ValueError(f"Column {label_column!r} has {len(names)} class; imbalance needs at least two.")
    if n_max is None:
        n_max = int(_counts_without_gaps(dataset, label_column).min())
    return len(names), check_int("n_max", n_max, least=1)


def _counts_without_gaps(dataset: Dataset, label_column: str) -> np.ndarray:
    names, counts = class_names(dataset, label_column, "an imbalance factor"), class_counts(dataset, label_column)
    if not counts.all():
        raise ValueError(f"Class {short_repr(names[counts.argmin()])} has no samples; leave it out of the ClassLabel.")
    return counts
