"""Accuracy on classes with many, medium and few training samples, as a metric for `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike

from peft_ncgeo.metrics.accuracy import accuracy, balanced_accuracy, evaluate_groups

_DESCRIPTION = """
Accuracy of a classifier trained on a long tail, by the number n_c of *training* samples of each class c: many is
n_c > high, medium low < n_c <= high and few n_c <= low, with (low, high) = (20, 100). A group's accuracy is the share
of the samples of its classes that are predicted right. Beside them: the share of all samples, and the mean over
classes of the share of each.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `int`): Predicted class of each sample, (N,); arrays and tensors are taken too.
    references (`list` of `int`): Class labels, (N,), 0 to K - 1.
    class_counts (`list` of `int`): Number of training samples of each class, (K,).
    thresholds (`tuple` of two numbers, or "thirds"): (low, high); or "thirds", for tails whose classes are all small:
        classes are sorted by count, largest first, and divided into three groups of nearly equal size. Defaults to
        (20, 100).

Returns:
    many (`float` or `None`): Accuracy on classes with many training samples, 0 to 1. None, here and in the next two,
        for a group without classes or without samples.
    medium (`float` or `None`): The same for medium.
    few (`float` or `None`): The same for few.
    accuracy (`float`): Share of all samples predicted right, 0 to 1.
    balanced_accuracy (`float`): Mean over the classes with samples of the share of each predicted right, 0 to 1.

Raises:
    ValueError: A label that is not in 0 to K - 1, class_counts that are not (K,) or negative, other thresholds, or no
        samples.

Examples:

    >>> import evaluate
    >>> from peft_ncgeo.evaluation import metric_path
    >>> metric = evaluate.load(metric_path("group_accuracy"))
    >>> results = metric.compute(
    ...     predictions=[0, 0, 0, 1, 1, 0], references=[0, 0, 0, 1, 2, 2], class_counts=[500, 60, 5]
    ... )
    >>> print({name: round(value, 3) for name, value in results.items()})
    {'many': 1.0, 'medium': 1.0, 'few': 0.0, 'accuracy': 0.667, 'balanced_accuracy': 0.667}
"""

_CITATION = """\
@inproceedings{liu2019large,
  title={Large-Scale Long-Tailed Recognition in an Open World},
  author={Liu, Ziwei and Miao, Zhongqi and Zhan, Xiaohang and Wang, Jiayun and Gong, Boqing and Yu, Stella X.},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  pages={2537--2546},
  year={2019}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class GroupAccuracyMetric(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
            reference_urls=["https://arxiv.org/abs/1904.05160"],
            format="numpy",
        )

    def _compute(
        self,
        predictions: np.ndarray,
        references: np.ndarray,
        class_counts: ArrayLike,
        thresholds: Sequence[float] | str = (20, 100),
    ) -> dict[str, float | None]:
        if not len(references):
            raise ValueError("There are no samples; pass at least one prediction and its label.")
        groups = evaluate_groups(predictions, references, class_counts, thresholds)
        overall = {
            "accuracy": accuracy(predictions, references),
            "balanced_accuracy": balanced_accuracy(predictions, references),
        }
        return {**groups, **overall}
