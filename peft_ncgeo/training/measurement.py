"""Results of evaluations, kept for a model card while the model does not change."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from torch import Tensor, nn

from ..metrics.set_summary import MultiLabelSummary, SetSummary
from ..models.adapters import AdapterSnapshot


class Measurement:
    """Results of one pass over a labelled set.

    Attributes:
        dataset: the set, as the caller passed it.
        class_names: its names, in the order of the logits.
        template: text around its class names; None for an image classifier.
        text_features: (K, d), raw, of its class names; None for an image classifier.
        snapshot: the adapters that were active, with the template and the number of views of an image.
        summary: predictions and geometry, added batch by batch; None if they are not collected.
    """

    def __init__(
        self,
        dataset: Any,
        class_names: list[str],
        model: nn.Module,
        template: str | None,
        text_features: Tensor | None,
        collect: bool,
        num_test_views: int,
        multi_label: bool = False,
    ) -> None:
        self.dataset, self.class_names = dataset, class_names
        self.template, self.text_features = template, text_features
        self.snapshot = AdapterSnapshot(model, template, num_test_views)
        kind = MultiLabelSummary if multi_label else SetSummary
        self.summary = kind() if collect else None


class Measurements:
    """Store of the last measurement of each set with adapters on, and with adapters off."""

    def __init__(self) -> None:
        self._kept: list[Measurement] = []

    def keep(self, new: Measurement) -> None:
        """Store a measurement in place of an earlier one of its kind."""
        self._kept = [
            one
            for one in self._kept
            if one.dataset is not new.dataset or one.snapshot.switches != new.snapshot.switches
        ]
        self._kept.append(new)

    def find(
        self, dataset: Dataset, model: nn.Module, template: str | None, num_test_views: int
    ) -> Measurement | None:
        """Return the measurement of a set by the model in its present state; None if there is none."""
        of_set = (one for one in self._kept if one.dataset is dataset)
        return next((one for one in of_set if one.snapshot.matches(model, template, num_test_views)), None)
