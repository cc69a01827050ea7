"""Long tails and steps: training sets whose classes differ in size by a stated rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from datasets import Dataset

from ..validation import check_float, check_int, short_repr
from .checks import class_names
from .sampling import draw, label_array


def class_counts(dataset: Dataset, label_column: str = "label") -> np.ndarray:
    """Number of samples of each class: (K,) int64. Rows without a label (None or -1) are left out."""
    classes = len(class_names(dataset, label_column))
    labels = label_array(dataset, label_column)
    return np.bincount(labels[labels >= 0], minlength=classes).astype(np.int64)


def realised_imbalance_factor(dataset: Dataset, label_column: str = "label") -> float:
    """`max_k n_k / min_k n_k` of the samples that are there, the number to report beside the one asked for.

    Raises:
        ValueError: a class without samples, named.
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
    """An exponential tail: class k of K keeps `n_k` samples, by one of two rules.

    `tau`: `n_k = max(1, round(n_max * tau^(k/(K-1))))`, as NPT and CPT do; `n_max` is 16 unless given.
    `imbalance_factor`: `n_k = max(1, int(n_max * (1/imbalance_factor)^(k/(K-1))))`, as long-tailed image sets do;
    `n_max` is the size of the smallest class unless given. Report [`realised_imbalance_factor`]: rounding moves it.

    Args:
        tau: share that the last class keeps, in (0, 1].
        imbalance_factor: first class's size over the last one's, at least 1.
        n_max: size of the largest class.
        seed: draws the samples, without replacement. The same seed and rows give the same samples in whatever order
            the rows come, and wherever they lie, see [`few_shot`]; those of a smaller `n_k` are among those of a
            larger one.
        shuffle_classes: let the seed decide which class gets which count. Else k is the label.

    Returns:
        The samples sorted by class; format and transform stay. Every row is read once, none decoded: hashing takes
        about two seconds a gigabyte.

    Raises:
        TypeError: an argument that is no number.
        ValueError: both rules or neither, an argument out of range, fewer than two classes, a class with fewer
            samples than `n_k`, named, or a file that cannot be read.

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
    classes, n_max = _sizes(dataset, n_max, label_column)
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
    """A step: the first `ceil(K/2)` classes keep `n_max` samples each, the rest `max(1, int(n_max / ratio))`.

    Args:
        ratio: size of a large class over that of a small one, at least 1.
        n_max: size of the large classes. Default: the size of the smallest class.
        seed: draws the samples; see [`long_tailed`], also for the cost and the order of what comes back.
        shuffle_classes: let the seed decide which classes are large. Else those of the lowest labels.

    Raises:
        TypeError: an argument that is no number.
        ValueError: an argument out of range, fewer than two classes, or a class with too few samples, named.
    """
    ratio = imbalance("ratio", ratio)
    classes, n_max = _sizes(dataset, n_max, label_column)
    large = math.ceil(classes / 2)
    counts = [n_max] * large + [int(_tidy(n_max / ratio))] * (classes - large)
    return _draw_tail(dataset, counts, seed, shuffle_classes, label_column)


def _draw_tail(dataset: Dataset, counts: Sequence[int], seed: int, shuffle: bool, label_column: str) -> Dataset:
    seed = check_int("seed", seed, least=0)
    counts = [max(1, count) for count in counts]
    if shuffle:
        # the third number keeps this stream apart from the classes' own: (seed, c) equals (seed, c, 0)
        counts = np.random.default_rng((seed, 0, 1)).permutation(counts).tolist()
    return draw(dataset, counts, seed, label_column, mend="lower n_max")


def imbalance(name: str, value: float) -> float:
    """A number of at least 1, the size of a class over that of another; refused by name where it is none."""
    return check_float(name, value, "a finite number of at least 1", lambda value: 1 <= value < math.inf)


def _tidy(number: float) -> float:
    """Without the error of floating point, which would let `int` turn 4.999999999 into 4."""
    return round(number, 6)


def _sizes(dataset: Dataset, n_max: int | None, label_column: str) -> tuple[int, int]:
    """Number of classes, and size of the largest: `n_max`, or where it is None that of the smallest class."""
    names = class_names(dataset, label_column)
    if len(names) < 2:
        raise ValueError(f"Column {label_column!r} has {len(names)} class; imbalance needs at least two.")
    if n_max is None:
        n_max = int(_counts_without_gaps(dataset, label_column).min())
    return len(names), check_int("n_max", n_max, least=1)


def _counts_without_gaps(dataset: Dataset, label_column: str) -> np.ndarray:
    names, counts = class_names(dataset, label_column), class_counts(dataset, label_column)
    if not counts.all():
        raise ValueError(f"Class {short_repr(names[counts.argmin()])} has no samples; leave it out of the ClassLabel.")
    return counts
