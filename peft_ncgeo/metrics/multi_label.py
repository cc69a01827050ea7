"""Metrics of predictions for images with any number of labels, computed by scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from pandas import DataFrame
from sklearn.metrics import average_precision_score, f1_score, precision_recall_fscore_support

from ..validation import check_float


def multi_label_scores(probabilities: ArrayLike, labels: ArrayLike, threshold: float = 0.5) -> dict[str, float]:
    """Return mean average precision, and precision, recall and F1 at a threshold.

    - `map`: mean over classes of `average_precision_score`; it does not depend on the threshold.
    - `macro_f1`, `macro_precision`, `macro_recall`: means over classes; 0 for a class that is never predicted.
    - `micro_f1`: F1 over all images and classes together.
    - `left_out`: number of classes without an image in the set. Means over classes leave them out; if no class has an
      image, the means are nan.

    Args:
        probabilities: (N, K); for `map` alone, any scores with the right order.
        labels: (N, K), 0 or 1.
        threshold: smallest probability at which a class is predicted.

    Raises:
        ValueError: the shapes are wrong, there are no images, labels are not 0 or 1, or probabilities are not finite.

    Example:

    >>> scores = multi_label_scores([[0.9, 0.2], [0.6, 0.3]], [[1, 0], [0, 0]])
    >>> scores["map"], round(scores["macro_f1"], 4), scores["left_out"]
    (1.0, 0.6667, 1.0)
    """
    table = per_class_scores(probabilities, labels, threshold=threshold)
    probabilities, labels = _checked(probabilities, labels)
    seen = table[table["support"] > 0]
    means = seen[["average_precision", "f1", "precision", "recall"]].mean()
    micro = f1_score(labels, probabilities >= threshold, average="micro", zero_division=0)
    return {
        "map": float(means["average_precision"]),
        "micro_f1": float(micro),
        **{f"macro_{name}": float(means[name]) for name in ("f1", "precision", "recall")},
        "left_out": float(len(table) - len(seen)),
    }


def per_class_scores(
    probabilities: ArrayLike,
    labels: ArrayLike,
    class_names: Sequence[str] | None = None,
    threshold: float = 0.5,
) -> DataFrame:
    """Return a table of each class's average precision, precision, recall and F1, and its number of images, `support`.

    The average precision of a class without an image is nan. See [`multi_label_scores`] for arguments and errors.

    Args:
        class_names: K names, the table's index.
    """
    threshold = check_float("threshold", threshold)
    scores, truth = _checked(probabilities, labels)
    if class_names is not None and len(class_names) != truth.shape[1]:
        raise ValueError(
            f"There are {len(class_names)} class_names for {truth.shape[1]} classes; give one for each class."
        )
    precision, recall, f1, support = precision_recall_fscore_support(
        truth, scores >= threshold, average=None, zero_division=0
    )
    found = [
        average_precision_score(y, score) if y.any() else np.nan for y, score in zip(truth.T, scores.T, strict=True)
    ]
    columns = {"average_precision": found, "precision": precision, "recall": recall, "f1": f1, "support": support}
    return DataFrame(columns, index=None if class_names is None else list(class_names))


def _checked(probabilities: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities as a float64 array (N, K), and labels as an array (N, K) of 0 and 1."""
    scores, truth = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    if scores.ndim != 2 or scores.shape != truth.shape or not scores.size:
        raise ValueError(
            f"probabilities and labels must both be (N, K), with at least one image, got {scores.shape} and "
            f"{truth.shape}."
        )
    if not np.isin(truth, (0, 1)).all():
        raise ValueError("labels must be 0 or 1 for each image and class.")
    if not np.isfinite(scores).all():
        raise ValueError("probabilities must be finite.")
    return scores, truth.astype(np.int64)
