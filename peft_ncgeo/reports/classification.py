"""Reports on classifications, from probabilities or from predictions alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import softmax
from sklearn.metrics import f1_score, precision_recall_fscore_support

from ..metrics.accuracy import accuracy, balanced_accuracy, evaluate_groups, tail_thresholds
from ..validation import short_repr
from .calibration import (
    BINS,
    Calibration,
    check_labels,
    fit_temperature,
    log_probabilities,
    reliability,
)
from .report import Report


def classification_report(
    probabilities: ArrayLike,
    labels: ArrayLike,
    class_names: Sequence[str],
    class_counts: ArrayLike | None = None,
    *,
    validation: tuple[ArrayLike, ArrayLike] | None = None,
    num_bins: int = BINS,
) -> Report:
    """Return scores of each class, confusions and calibration of a classifier on labelled images.

    Args:
        probabilities: (N, K), or logits: rows in 0..1 that sum to 1 are probabilities, a matrix with a number outside
            0..1 holds logits, and other numbers are refused.
        labels: (N,) class indices.
        class_names: K names.
        class_counts: (K,) numbers of training images, for many / medium / few, see
            [`~peft_ncgeo.metrics.accuracy.tail_thresholds`].
        validation: probabilities or logits, and labels, of other images, to fit a temperature on; see
            [`~peft_ncgeo.reports.fit_temperature`].
        num_bins: number of bins of the calibration error.

    Raises:
        ValueError: shapes or values do not fit; the message names them.

    Example:

    >>> report = classification_report([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], [0, 1, 1], ["cat", "dog"])
    >>> report.per_class["f1"].round(2).to_dict()
    {'cat': 0.67, 'dog': 0.67}
    >>> round(report.accuracy, 4), round(report.calibration.before.error, 4)
    (0.6667, 0.3)
    """
    scores = log_probabilities(probabilities)
    own = check_labels(labels, scores)
    fitted = None
    if validation is not None:
        others = log_probabilities(validation[0])
        if others.shape[-1] != scores.shape[1]:
            raise ValueError(f"The validation scores {others.shape} must have {scores.shape[1]} columns.")
        same = others.shape == scores.shape and np.array_equal(others, scores)
        fitted = others, validation[1], "the images of this report themselves" if same else "validation images"
    predicted, confidence = scores.argmax(1), np.exp(scores.max(1))
    report = report_of_predictions(predicted, confidence, own, class_names, class_counts, num_bins=num_bins)
    return report if fitted is None else scale_temperature(report, scores, *fitted)


def report_of_predictions(
    predicted: ArrayLike,
    confidences: ArrayLike,
    labels: ArrayLike,
    class_names: Sequence[str],
    class_counts: ArrayLike | None = None,
    *,
    num_bins: int = BINS,
) -> Report:
    """Return a report from predicted classes (N,), their probabilities (N,) and labels (N,).

    Scores of a class are scikit-learn's: precision is 0 for a class that is never predicted, recall and F1 are 0 for a
    class without images. `macro_f1` is the mean F1 of the classes that are among labels or predictions.

    Args:
        class_names, class_counts, num_bins: see [`classification_report`].

    Raises:
        ValueError: shapes or values do not fit; the message names them.
    """
    names = list(class_names)
    found, own = np.asarray(predicted), np.asarray(labels)
    for what, values in (("prediction", found), ("label", own)):
        wrong = values[~np.isin(values, np.arange(len(names)))]
        if len(wrong):
            raise ValueError(f"The {what} {short_repr(wrong[0])} is not an index of the {len(names)} class_names.")
    share = accuracy(found, own)
    calibration = Calibration(reliability(confidences, found == own, num_bins))
    indices = np.arange(len(names))
    precision, recall, f1, _ = precision_recall_fscore_support(own, found, labels=indices, zero_division=0)
    support = np.bincount(own.astype(np.int64), minlength=len(names))  # scikit-learn's are floats if all are wrong
    scores = {"precision": precision, "recall": recall, "f1": f1, "support": support}
    thresholds, groups = None, None
    if class_counts is not None:
        counts = np.asarray(class_counts)
        if counts.shape != (len(names),):
            raise ValueError(f"class_counts must be one number for each of {len(names)} classes, got {counts.shape}.")
        scores["training_images"], thresholds = counts, tail_thresholds(counts)
        groups = None if thresholds is None else evaluate_groups(found, own, counts, thresholds)
    return Report(
        class_names=names,
        predicted=found.astype(np.int64),
        labels=own.astype(np.int64),
        per_class=pd.DataFrame(scores, index=pd.Index(names, name="class")),
        accuracy=share,
        balanced_accuracy=balanced_accuracy(found, own),
        macro_f1=macro_f1(found, own),
        calibration=calibration,
        groups=groups,
        thresholds=thresholds,
    )


def macro_f1(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Return the mean F1 of the classes that are among labels or predictions."""
    return float(f1_score(np.asarray(labels), np.asarray(predicted), average="macro", zero_division=0))


def scale_temperature(
    report: Report, scores: np.ndarray, others: np.ndarray, labels: ArrayLike, fitted_on: str
) -> Report:
    """Return a report with its calibration after temperature scaling, or with a note if there is no best temperature.

    Args:
        scores: logits (N, K) of the report's images.
        others, labels: logits (M, K) and labels (M,) of images to fit the temperature on.
        fitted_on: phrase for these images.
    """
    own = check_labels(labels, others)
    before = report.calibration.before
    try:
        temperature = fit_temperature(others, own)
    except ValueError as error:
        return replace(report, notes=(*report.notes, f"No temperature was fitted on {fitted_on}: {error}"))
    sure = softmax(scores / temperature, axis=1).max(1)
    after = reliability(sure, report.predicted == report.labels, len(before.bins))
    return replace(report, calibration=Calibration(before, after, temperature, fitted_on))
