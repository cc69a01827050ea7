"""What evaluations have found, kept for a model card as long as the model is the one that they saw."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from torch import Tensor, nn

from ..metrics.set_summary import SetSummary
from ..models.adapters import AdapterSnapshot


class Measurement:
    """One pass over a labelled set.

    Attributes:
        dataset: as the caller gave it.
        template: text around its class names; None for an image classifier.
        text_features: (K, d), raw, of its class names; None for an image classifier.
        snapshot: the adapters that were on.
        summary: predictions and geometry, filled batch by batch.
    """

    def __init__(self, dataset: Any, model: nn.Module, template: str | None, text_features: Tensor | None) -> None:
        self.dataset, self.template, self.text_features = dataset, template, text_features
        self.snapshot = AdapterSnapshot(model, template)
        self.summary = SetSummary()


class Measurements:
    """The last measurement of each set with adapters on, and with adapters off."""

    def __init__(self) -> None:
        self._kept: list[Measurement] = []

    def keep(self, new: Measurement) -> None:
        """Remember a measurement in place of an earlier one of its kind."""
        self._kept = [
            one
            for one in self._kept
            if one.dataset is not new.dataset or one.snapshot.switches != new.snapshot.switches
        ]
        self._kept.append(new)

    def find(self, dataset: Dataset, model: nn.Module, template: str | None) -> Measurement | None:
        """Return what the model, as it is now, did on a set; None where that is not known."""
        of_set = (one for one in self._kept if one.dataset is dataset)
        return next((one for one in of_set if one.snapshot.matches(model, template)), None)
