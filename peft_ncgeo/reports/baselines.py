"""Cheap baselines: classifiers on frozen features of the training images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..metrics.probe import fit_probe


class Probe(NamedTuple):
    """Predictions (M,) of a linear probe, and a sentence on how it was made."""

    predicted: np.ndarray
    note: str


def nearest_class_mean(features: ArrayLike, labels: ArrayLike, queries: ArrayLike) -> np.ndarray:
    """Return for each query the class (M,) whose mean has the largest cosine with it: `argmax_c cos(x, mu_c)`.

    `mu_c` is the mean of the class's unit features. A class without features is never predicted.

    Args:
        features: (N, d) of labelled images.
        labels: (N,) class indices.
        queries: (M, d).
    """
    x, own = _unit(features), np.asarray(labels)
    classes = np.unique(own)
    means = np.stack([x[own == c].mean(0) for c in classes])
    return classes[(_unit(queries) @ _unit(means).T).argmax(1)]


def linear_probe(features: ArrayLike, labels: ArrayLike, queries: ArrayLike) -> Probe:
    """Return the predictions of scikit-learn's logistic regression on unit features, with equal weights of classes.

    If each class has three images or more and there are at most 5,000 images, C is chosen from 0.3, 3, 30, 300 and
    3,000 by balanced accuracy in three-fold cross-validation on the labelled images (the smallest C among ties); else
    C is 30. A class without features is never predicted.

    Args:
        features, labels, queries: see [`nearest_class_mean`].

    Raises:
        ValueError: all labels are of one class.
    """
    probe, note = fit_probe(_unit(features), np.asarray(labels))
    return Probe(probe.predict(_unit(queries)), note)


def _unit(features: ArrayLike) -> np.ndarray:
    x = np.asarray(features, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.finfo(np.float64).tiny)
