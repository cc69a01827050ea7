"""Leave-one-out accuracy of support images, before and after adapting, from cached features."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ..classifiers.heads import FeatureHead, Support
from ..classifiers.heads.leave_one_out import AFTER, BEFORE, images_with_others
from ..geometry.heads import Heads, class_prototypes

FOLDS = 5


def folds(labels: Tensor) -> Iterator[Tensor]:
    """Yield the indices of images to leave out together: one of each class, or a fifth if a class has more than five.

    An image that is alone in its class is never left out, so each class keeps an image.

    Args:
        labels: (N,).
    """
    ranks = torch.zeros_like(labels)
    for c in labels.unique():
        ranks[labels == c] = torch.arange(int((labels == c).sum()), device=labels.device)
    asked = images_with_others(labels)
    for fold in range(FOLDS):
        left = asked[ranks[asked] % FOLDS == fold]
        if len(left):
            yield left


def left_out_accuracy(labels: Tensor, classify: Callable[[Tensor, Tensor], Tensor]) -> float | None:
    """Return the share of images classified correctly by a fit without them; None if no class has two images.

    Args:
        labels: (N,).
        classify: function that takes the indices of the images to learn from, and the indices (M,) of the images to
            classify, and returns the scores (M, K) of the latter.
    """
    right, asked, numbers = 0, 0, torch.arange(len(labels), device=labels.device)
    for left in folds(labels):
        kept = numbers[~torch.isin(numbers, left)]
        right += int((classify(kept, left).argmax(-1) == labels[left]).sum())
        asked += len(left)
    return right / asked if asked else None


def prototype_accuracies(
    features: Tensor, labels: Tensor, classes: int, fit: Callable[[Tensor, Tensor], Heads] | None
) -> dict[str, float]:
    """Return the accuracy of images that are left out, by the nearest prototype of the others.

    Args:
        features: (N, d) of the support images, before the heads.
        labels: (N,), 0..K - 1.
        classes: K.
        fit: function of features and labels that returns trained heads; None if training needs more than features.
    """
    moments: dict[str, Callable[[Tensor, Tensor], Heads] | None] = {BEFORE: lambda x, y: Heads.identity(x), AFTER: fit}
    found = {}
    for moment, make in moments.items():
        if make is None:
            continue

        def classify(kept: Tensor, left: Tensor, make: Any = make) -> Tensor:
            x, y = features[kept], labels[kept]
            return make(x, y).scores(features[left], class_prototypes(x, y, classes))

        found[moment] = left_out_accuracy(labels, classify)
    return {moment: share for moment, share in found.items() if share is not None}


def head_accuracies(head: FeatureHead, support: Support, metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the accuracy on the first view of left-out images, by the texts alone and by a fitted head.

    If `metrics` already has the accuracy of the head, the head is not fitted again. Otherwise it is fitted without the
    left-out images, with the settings chosen on the whole support set.

    Args:
        metrics: what [`FeatureHead.fit`] returned.
    """
    chosen = {f.name for f in fields(head) if f.name in metrics and getattr(head, f.name) is None}  # type: ignore[arg-type]
    settled: Any = replace(head, **{name: metrics[name] for name in chosen})  # type: ignore[type-var]

    def classify(kept: Tensor, left: Tensor) -> Tensor:
        part = support._replace(features=support.features[:, kept], labels=support.labels[kept])
        return settled.logits(settled.fit(part)[0], support.features[0, left])

    found = {BEFORE: left_out_accuracy(support.labels, lambda _, left: support.text_logits(support.features[0, left]))}
    if AFTER not in metrics:
        try:
            found[AFTER] = left_out_accuracy(support.labels, classify)
        except ValueError:  # too few images are left for this method
            found[AFTER] = None
    return {moment: share for moment, share in found.items() if share is not None}


def warn_if_worse(metrics: Mapping[str, float]) -> None:
    """Warn if adapting lowered the leave-one-out accuracy of the support images."""
    before, after = metrics.get(BEFORE), metrics.get(AFTER)
    if before is not None and after is not None and after < before:
        warnings.warn(
            f"Adapting lowered the leave-one-out accuracy of the support images from {100 * before:.1f} % to "
            f"{100 * after:.1f} %; take more images or another head, or other settings of this head (for CoPA fewer "
            "steps or a smaller lr).",
            stacklevel=4,
        )
