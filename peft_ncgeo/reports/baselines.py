"""Cheap baselines: classifiers on frozen features of the training images."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold

# Unit features are short: C=0.3 on CLIP's own features, of length 10, is C=30 on these.
GRID, DEFAULT_C = (0.3, 3.0, 30.0, 300.0, 3000.0), 30.0
_FOLDS, _MOST_IMAGES, _STEPS = 3, 5000, 1000


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
    x, own = _unit(features), np.asarray(labels)
    fewest = int(np.unique(own, return_counts=True)[1].min())
    probe = LogisticRegression(C=DEFAULT_C, class_weight="balanced", max_iter=_STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # told in the note
        if fewest >= _FOLDS and len(x) <= _MOST_IMAGES:
            folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=0)
            search = GridSearchCV(probe, {"C": list(GRID)}, scoring="balanced_accuracy", cv=folds)
            probe = search.fit(x, own).best_estimator_
            how = f"chosen by {_FOLDS}-fold cross-validation on the training images"
        else:
            few = fewest < _FOLDS
            reason = (
                f"a class has fewer than {_FOLDS} images" if few else f"there are more than {_MOST_IMAGES:,} images"
            )
            how = f"not chosen, since {reason}"
            probe.fit(x, own)
    ended = "" if max(probe.n_iter_) < _STEPS else f"; it had not converged after {_STEPS} steps"
    return Probe(probe.predict(_unit(queries)), f"The linear probe has C={probe.C:g} ({how}){ended}.")


def _unit(features: ArrayLike) -> np.ndarray:
    x = np.asarray(features, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.finfo(np.float64).tiny)
