"""Heads that read no texts: two simple baselines of few-shot tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ... import metrics
from ...geometry.heads import class_prototypes
from ...geometry.sphere import l2_normalize
from ...validation import check_positive
from .base import LinearHead, State, Support, as_state


@dataclass(frozen=True)
class NearestClassMean(LinearHead):
    """Nearest class mean: `argmax_c cos(x, mu_c)` with the mean mu_c of a class's unit features.

    Every class has one mean, whatever its number of images. Images are not augmented. Texts are not read, so new class
    names are refused.
    """

    num_views: ClassVar[int] = 0
    reads_texts: ClassVar[bool] = False

    def fit(self, support: Support) -> tuple[State, dict[str, float]]:
        x, labels = _samples(support)
        means = l2_normalize(class_prototypes(x, labels, len(support.texts)))
        return as_state(means, weight=support.scale * means, bias=means.new_zeros(len(means))), {}


@dataclass(frozen=True)
class LinearProbe(LinearHead):
    """Linear probe: scikit-learn's logistic regression on unit features, with the same weight for each class.

    Images are not augmented. Texts are not read, so new class names are refused.

    Args:
        C: inverse of the penalty's strength. Default: the value among 0.3, 3, 30, 300 and 3,000 with the best balanced
            accuracy in three-fold cross-validation on the support images, if each class has three images and there are
            at most 5,000 in all; else 30.
    """

    C: float | None = None

    num_views: ClassVar[int] = 0
    reads_texts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.C is not None:
            check_positive("C", self.C)

    def fit(self, support: Support) -> tuple[State, dict[str, float]]:
        x, labels = _samples(support)
        probe, _ = metrics.fit_probe(x.numpy(), labels.numpy(), self.C)
        weight, bias = torch.from_numpy(probe.coef_), torch.from_numpy(probe.intercept_)
        if len(weight) == 1:  # of two classes the first has the logit 0
            weight, bias = (torch.cat([torch.zeros_like(part), part]) for part in (weight, bias))
        return as_state(x, weight=weight, bias=bias), {"C": float(probe.C)}


def _samples(support: Support) -> tuple[Tensor, Tensor]:
    """Return each view as a separate sample in float64, so that no prediction depends on rounding."""
    return support._replace(features=support.features.double()).samples()
