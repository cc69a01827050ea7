"""Sums over the micro-batches of an optimiser step, and means for the log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from accelerate.utils import reduce
from torch import Tensor

from ...losses import Regularizer


class StepPart(Protocol):
    """Object that keeps state from one micro-batch of a step to the next."""

    def forget_step(self) -> None: ...

    def end_step(self) -> None: ...


class WeightedMeans:
    """Weighted means of named scalars, kept as two sums for each name."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, float]] = {}

    def add(self, values: dict[str, Tensor], weight: float = 1.0) -> None:
        for name, value in values.items():
            value = weight * value.detach().to(torch.promote_types(value.dtype, torch.float32))
            total, weights = self._sums.get(name, (torch.zeros_like(value), 0.0))
            self._sums[name] = (total + value, weights + weight)

    def read(self) -> dict[str, Tensor]:
        """Return the means of the values added since the last read."""
        sums, self._sums = self._sums, {}
        return {name: total / weights for name, (total, weights) in sums.items()}


class Accumulation:
    """State that lasts over the micro-batches of an optimiser step.

    The trainer calls `begin` before a step, `add` with each micro-batch and `end` before the optimiser step. An
    interrupted step, for instance if memory ran out, leaves no state for the next one. A step's values are means over
    its images: each micro-batch is weighted by its share of the images.

    Args:
        losses: terms whose multipliers are updated by dual ascent at the end of each step.
        parts: other objects that keep state within a step.
    """

    def __init__(self, losses: Sequence[Regularizer], parts: Sequence[StepPart] = ()) -> None:
        self.losses, self.parts = losses, parts
        self._log = WeightedMeans()
        self.begin()

    def begin(self) -> None:
        """Start a step, and drop the values of an unfinished step."""
        self._noted, self._constrained = WeightedMeans(), WeightedMeans()
        for part in self.parts:
            part.forget_step()

    def add(self, noted: dict[str, Tensor], constrained: dict[str, Tensor], share: float) -> None:
        """Add a micro-batch.

        Args:
            noted: scalars for the log.
            constrained: values that budgets limit, by the names of the terms.
            share: the micro-batch's share of the step's images, 0 to 1.
        """
        self._noted.add(noted, share)
        self._constrained.add(constrained, share)

    def end(self) -> None:
        """Finish a step: update its parts, the multipliers and the log."""
        for part in self.parts:
            part.end_step()
        values = self._constrained.read()
        for loss in self.losses:
            if loss.name in values:
                loss.update(reduce(values[loss.name], "mean"))
        self._log.add(self._noted.read())

    def read_log(self) -> dict[str, float]:
        """Return the means over the steps that were finished since the last call."""
        return {name: float(value) for name, value in self._log.read().items()}
