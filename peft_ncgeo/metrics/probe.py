"""Linear probe: scikit-learn's logistic regression on unit features, with its one setting chosen on them."""

from __future__ import annotations

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold

# Unit features are short: C=0.3 on CLIP's own features, of length 10, is C=30 on these.
GRID, DEFAULT_C = (0.3, 3.0, 30.0, 300.0, 3000.0), 30.0
_FOLDS, _MOST_IMAGES, _STEPS = 3, 5000, 1000


def fit_probe(features: np.ndarray, labels: np.ndarray, c: float | None = None) -> tuple[LogisticRegression, str]:
    """Return logistic regression on unit features, with the same weight for each class, and a sentence on its making.

    Args:
        features: (N, d), of length 1.
        labels: (N,) class indices.
        c: C. Default: the one of 0.3, 3, 30, 300 and 3,000 with the best balanced accuracy in three-fold
            cross-validation (the smallest of equally good ones), if each class has three images or more and there are
            at most 5,000 images in all; else 30.

    Raises:
        ValueError: the labels are of one class.
    """
    fewest = int(np.unique(labels, return_counts=True)[1].min())
    probe = LogisticRegression(C=DEFAULT_C if c is None else c, class_weight="balanced", max_iter=_STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # told in the sentence
        if c is None and fewest >= _FOLDS and len(features) <= _MOST_IMAGES:
            folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=0)
            search = GridSearchCV(probe, {"C": list(GRID)}, scoring="balanced_accuracy", cv=folds)
            probe = search.fit(features, labels).best_estimator_
            how = f"chosen by {_FOLDS}-fold cross-validation on the training images"
        else:
            probe.fit(features, labels)
            few = f"a class has fewer than {_FOLDS} images" if fewest < _FOLDS else ""
            reason = few or f"there are more than {_MOST_IMAGES:,} images"
            how = f"not chosen, since {reason}" if c is None else "as given"
    ended = "" if max(probe.n_iter_) < _STEPS else f"; it had not converged after {_STEPS} steps"
    return probe, f"The linear probe has C={probe.C:g} ({how}){ended}."
