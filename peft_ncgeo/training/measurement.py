"""Results of passes over labelled sets, kept while the model does not change."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn

from ..metrics.set_summary import SetSummary
from ..models.adapters import AdapterSnapshot


class Result:
    """Result of a pass over a labelled set by the model in one state.

    Attributes:
        dataset: the set, as the caller passed it.
        snapshot: the adapters that were active, with all settings on which the result depends.
    """

    def __init__(self, dataset: Any, model: nn.Module, *settings: Any) -> None:
        self.dataset, self.snapshot = dataset, AdapterSnapshot(model, *settings)


class Measurement(Result):
    """Predictions and geometry on a set.

    Attributes:
        class_names: names of the classes, in the order of the logits.
        template: text around the class names; None for an image classifier.
        text_features: (K, d), unnormalized text features of the class names; None for an image classifier.
        summary: predictions and geometry, collected batch by batch; None if they are not collected.
        own: numbers that the user's `compute_metrics` returned, by name.
    """

    def __init__(
        self,
        dataset: Any,
        class_names: list[str],
        model: nn.Module,
        template: str | None,
        text_features: Tensor | None,
        summary: SetSummary | None,
        num_test_views: int,
    ) -> None:
        super().__init__(dataset, model, template, num_test_views)
        self.class_names, self.template = class_names, template
        self.text_features, self.summary = text_features, summary
        self.own: dict[str, float] = {}


class Embedding(Result):
    """Unnormalized features (N, d) and labels (N,) of a set."""

    def __init__(
        self, dataset: Any, model: nn.Module, features: np.ndarray, labels: np.ndarray, num_test_views: int
    ) -> None:
        super().__init__(dataset, model, num_test_views)
        self.features, self.labels = features, labels


class Reported(Result):
    """Report on a set, see [`~peft_ncgeo.reports.Report`]."""

    def __init__(self, dataset: Any, model: nn.Module, template: str | None, report: Any, num_test_views: int) -> None:
        super().__init__(dataset, model, template, num_test_views)
        self.report = report


Kind = TypeVar("Kind", bound=Result)


class Measurements:
    """Store of the last result of each kind on each set with adapters on, and with adapters off."""

    def __init__(self) -> None:
        self._kept: list[Result] = []

    def keep(self, new: Result) -> None:
        """Store a result in place of an earlier one of its kind."""

        def replaced(one: Result) -> bool:
            same = type(one) is type(new) and one.dataset is new.dataset
            return same and one.snapshot.switches == new.snapshot.switches

        self._kept = [*(one for one in self._kept if not replaced(one)), new]

    def find(self, kind: type[Kind], dataset: Any, model: nn.Module, *settings: Any) -> Kind | None:
        """Return the result of the model in its current state on a set, or None if it is not known."""
        of_set = (one for one in self._kept if isinstance(one, kind) and one.dataset is dataset)
        return next((one for one in of_set if one.snapshot.matches(model, *settings)), None)
