"""Calibration: expected calibration error, reliability bins, and temperature scaling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import log_softmax, softmax

from ..validation import check_int

BINS = 15


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy.

    Attributes:
        error: the expected calibration error, 0..1.
        bins: one row per bin: `lowest` and `highest` confidence, the number of `images`, and their mean `confidence`
            and `accuracy`, which are nan in an empty bin.
    """

    error: float
    bins: pd.DataFrame


@dataclass(frozen=True)
class Calibration:
    """Calibration of a model, before and (if there were images to fit a temperature on) after temperature scaling.

    Attributes:
        before: calibration of the model's own probabilities.
        after: calibration of `softmax(logits / temperature)`, or None.
        temperature: see [`fit_temperature`], or None.
        fitted_on: phrase for the images that the temperature was fitted on.
    """

    before: Reliability
    after: Reliability | None = None
    temperature: float | None = None
    fitted_on: str = ""


def reliability(confidences: ArrayLike, right: ArrayLike, num_bins: int = BINS) -> Reliability:
    r"""Return confidence against accuracy in B bins of equal width, and the expected calibration error.

    .. math:: ECE = \sum_b \frac{n_b}{N} |acc_b - conf_b|

    Bin b holds the n_b images whose confidence (the largest probability) is in `((b - 1) / B, b / B]`; `conf_b` is
    their mean confidence and `acc_b` the share of correct predictions. A confidence of 0 belongs to the first bin.

    Args:
        confidences: (N,) in 0..1.
        right: (N,), True where the prediction equals the label.
        num_bins: B.

    Raises:
        ValueError: the shapes are wrong, there are no images, or a confidence is out of range.

    Reference: C. Guo, G. Pleiss, Y. Sun, K. Weinberger, On Calibration of Modern Neural Networks, ICML 2017,
    arXiv 1706.04599.
    """
    num_bins = check_int("num_bins", num_bins, least=1)
    sure, hits = np.asarray(confidences, np.float64), np.asarray(right).astype(np.float64)
    if sure.ndim != 1 or sure.shape != hits.shape or not len(sure):
        raise ValueError(f"confidences and right must both be (N,), N at least 1, got {sure.shape} and {hits.shape}.")
    if not ((sure >= 0) & (sure <= 1 + 1e-6)).all():
        raise ValueError("A confidence is not in 0..1; pass the largest probability of each image.")
    edges = np.linspace(0, 1, num_bins + 1)
    places = np.digitize(sure, edges[1:-1], right=True)
    images = np.bincount(places, minlength=num_bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin
        confidence = np.bincount(places, sure, num_bins) / images
        accuracy = np.bincount(places, hits, num_bins) / images
    bins = pd.DataFrame(
        {
            "lowest": edges[:-1],
            "highest": edges[1:],
            "images": images,
            "confidence": confidence,
            "accuracy": accuracy,
        }
    )
    return Reliability(float(np.nansum(images / len(sure) * np.abs(accuracy - confidence))), bins)


def expected_calibration_error(confidences: ArrayLike, right: ArrayLike, num_bins: int = BINS) -> float:
    """Return the expected calibration error, see [`reliability`]."""
    return reliability(confidences, right, num_bins).error


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    r"""Return the temperature T that makes the labels most likely: it minimises the mean of `-log softmax(z / T)_y`.

    The loss is convex in `1 / T`, so it has one minimum; there the mean logit under the probabilities equals the mean
    logit of the labels. Use images that were used neither for training nor for the report. Predictions do not change.

    Args:
        logits: (N, K), or logarithms of probabilities.
        labels: (N,) class indices.

    Raises:
        ValueError: shapes or values are wrong, every label has the largest logit (T would be 0), or the logits of the
            labels are on average not larger than those of other classes (T would be infinite).

    Reference: see [`reliability`].

    Example:

    >>> logits = [[6.0, 0.0], [6.0, 0.0], [6.0, 0.0], [0.0, 6.0]]
    >>> round(fit_temperature(logits, [0, 0, 1, 1]), 4)  # three of four are right: 6 / log(3)
    5.4614
    """
    z = np.asarray(logits, np.float64)
    own = check_labels(labels, z)
    own_logit = np.take_along_axis(z, own[:, None], 1)[:, 0]
    if (own_logit == z.max(1)).all():
        raise ValueError(
            "Every image is classified correctly, so there is no best temperature (it would be 0); fit it on more "
            "images."
        )
    if own_logit.mean() <= z.mean():
        raise ValueError(
            "The logits of the labels are on average not larger than those of other classes, so there is no best "
            "temperature (it would be infinite); check the labels and the order of the classes."
        )

    def slope(inverse: float) -> float:
        return float((softmax(inverse * z, axis=1) * z).sum(1).mean() - own_logit.mean())

    high = 1 / max(float(z.std()), 1e-12)
    while slope(high) <= 0:
        high *= 2
    return 1 / brentq(slope, 0, high, xtol=1e-14 * high, rtol=1e-12)


def check_labels(labels: Any, scores: np.ndarray) -> np.ndarray:
    """Return labels (N,) as int64, checked against finite scores (N, K).

    Raises:
        ValueError: the shapes are wrong, there are no images, a score is not finite, or a label is not a class index.
    """
    own = np.asarray(labels)
    if scores.ndim != 2 or own.shape != scores.shape[:1] or not scores.size:
        raise ValueError(f"Scores must be (N, K) with labels (N,), got {scores.shape} and {own.shape}.")
    if not np.isfinite(scores).all():
        raise ValueError(f"The scores of image {int(np.argmin(np.isfinite(scores).all(1)))} are not finite.")
    wrong = np.flatnonzero(~np.isin(own, np.arange(scores.shape[1])))
    if len(wrong):
        raise ValueError(
            f"Label {own[wrong[0]]} of image {wrong[0]} must be a class index, 0 to {scores.shape[1] - 1}."
        )
    return own.astype(np.int64)


def log_probabilities(scores: ArrayLike) -> np.ndarray:
    """Return the logarithms (N, K) of the probabilities in each row, given probabilities or logits.

    Rows in 0..1 that sum to 1 are probabilities; a matrix with a number outside 0..1 holds logits.

    Raises:
        ValueError: all numbers are in 0..1, but the rows do not sum to 1, so it is not clear which of the two they
            are.
    """
    z = np.asarray(scores, np.float64)
    if z.ndim == 2 and z.size and ((z >= 0) & (z <= 1 + 1e-6)).all():
        total = z.sum(1)
        if not np.allclose(total, 1, atol=1e-3):
            raise ValueError(
                f"All scores are in 0..1, but row {int(np.argmax(np.abs(total - 1)))} does not sum to 1: pass "
                "probabilities that do, or logits."
            )
        return np.log(np.maximum(z / total[:, None], np.finfo(np.float64).tiny))
    return log_softmax(z, axis=-1) if z.ndim == 2 and z.size else z
