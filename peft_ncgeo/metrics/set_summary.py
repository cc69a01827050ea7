"""Predictions of a model on one labelled set, and the geometry of its features."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import metrics
from .accuracy import accuracy, balanced_accuracy, evaluate_groups
from .feature_geometry import FeatureGeometry


class SetSummary:
    """Summary of a pass over a labelled set, collected batch by batch.

    Attributes:
        geometry: geometry of the features, known after [`compute`].
    """

    def __init__(self) -> None:
        self.geometry = FeatureGeometry(nc4=False)
        self._predicted: list[Tensor] = []
        self._labels: list[Tensor] = []

    @property
    def size(self) -> int:
        """Number of images so far."""
        return sum(map(len, self._labels))

    def update(self, features: Tensor, predicted: Tensor, labels: Tensor, classes: int, reads_text: bool) -> None:
        """Add a batch: raw features (B, d), predicted classes (B,) and labels (B,)."""
        self._predicted.append(predicted.cpu())
        self._labels.append(labels.cpu())
        self.geometry.update(features, labels, classes, reads_text)

    def compute(
        self,
        text: Tensor | None,
        head: Any = None,
        class_counts: Any = None,
        thresholds: Any = None,
    ) -> dict[str, float | None]:
        """Return accuracies in 0..1 and the geometry of the features; a value that is not finite becomes None.

        Args:
            text, head: see [`FeatureGeometry.compute`].
            class_counts, thresholds: see [`evaluate_groups`]; without thresholds there are no group accuracies.
        """
        predicted, labels = (torch.cat(parts).numpy() for parts in (self._predicted, self._labels))
        found: dict[str, float | None] = {
            "accuracy": accuracy(predicted, labels),
            "balanced_accuracy": balanced_accuracy(predicted, labels),
            **finite(self.geometry.compute(text, head)),
        }
        if thresholds is not None:
            found.update(evaluate_groups(predicted, labels, class_counts, thresholds))
        return found


class MultiLabelSummary(SetSummary):
    """Summary of a pass over images with any number of labels, of which no geometry is measured."""

    def update(self, features: Tensor, predicted: Tensor, labels: Tensor, classes: int, reads_text: bool) -> None:
        """Add a batch: probabilities (B, K) of single classes, and labels (B, K)."""
        self._predicted.append(predicted.float().cpu())
        self._labels.append(labels.cpu())

    def compute(
        self, text: Tensor | None, head: Any = None, class_counts: Any = None, thresholds: Any = None
    ) -> dict[str, float | None]:
        """Return the metrics of [`~peft_ncgeo.metrics.multi_label.multi_label_scores`]."""
        probabilities, labels = (torch.cat(parts).numpy() for parts in (self._predicted, self._labels))
        return finite(metrics.multi_label_scores(probabilities, labels))


def finite(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Return the metrics as plain numbers, with None for nan and infinity, which JSON does not have."""
    return {key: float(value) if np.isfinite(value) else None for key, value in metrics.items()}
