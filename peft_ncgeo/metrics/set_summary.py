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

    Args:
        keep: True: also keep the unnormalized features (N, d) and the logits (N, K) of all images, on the CPU.

    Attributes:
        geometry: geometry of the features, known after [`compute`].
    """

    def __init__(self, keep: bool = False) -> None:
        self.geometry, self.keep = FeatureGeometry(nc4=False), keep
        self._rows: dict[str, list[Tensor]] = {}

    @property
    def size(self) -> int:
        """Number of images so far."""
        return sum(map(len, self._rows.get("labels", [])))

    def update(
        self,
        features: Tensor,
        predicted: Tensor,
        confidences: Tensor,
        labels: Tensor,
        classes: int,
        reads_text: bool,
        logits: Tensor | None = None,
    ) -> None:
        """Add a batch: unnormalized features (B, d), predicted classes (B,), their probabilities (B,) and labels (B,).

        Args:
            classes: K, the number of classes.
            logits: (B, K), if they are kept.
        """
        rows = {"predicted": predicted, "confidences": confidences, "labels": labels}
        if self.keep and logits is not None:
            rows |= {"features": features.flatten(1).float(), "logits": logits.float()}
        self._add(rows)
        self.geometry.update(features, labels, classes, reads_text)

    def _add(self, rows: dict[str, Tensor]) -> None:
        for name, value in rows.items():
            self._rows.setdefault(name, []).append(value.cpu())

    def rows(self, name: str) -> np.ndarray:
        """Return the collected values with a row for each image: "predicted", "confidences", "labels".

        With `keep`, there are also "features" and "logits".
        """
        return torch.cat(self._rows[name]).numpy()

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
        predicted, labels = self.rows("predicted"), self.rows("labels")
        found: dict[str, float | None] = {
            "accuracy": accuracy(predicted, labels),
            "balanced_accuracy": balanced_accuracy(predicted, labels),
            **finite(self.geometry.compute(text, head)),
        }
        if thresholds is not None:
            found.update(evaluate_groups(predicted, labels, class_counts, thresholds))
        return found


class MultiLabelSummary(SetSummary):
    """Summary of a pass over images with any number of labels, without a geometry."""

    def update(
        self, features: Tensor, predicted: Tensor, confidences: Tensor, labels: Tensor, *others: Any, **more: Any
    ) -> None:
        """Add a batch: the probabilities (B, K) of single classes as `confidences`, and labels (B, K)."""
        self._add({"confidences": confidences.float(), "labels": labels})

    def compute(
        self, text: Tensor | None, head: Any = None, class_counts: Any = None, thresholds: Any = None
    ) -> dict[str, float | None]:
        """Return the metrics of [`~peft_ncgeo.metrics.multi_label.multi_label_scores`]."""
        return finite(metrics.multi_label_scores(self.rows("confidences"), self.rows("labels")))


def finite(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Return the metrics as plain numbers, with None for nan and infinity, which JSON does not have."""
    return {key: float(value) if np.isfinite(value) else None for key, value in metrics.items()}
