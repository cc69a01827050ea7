"""Moving averages of each class's features while training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOMENTUM = 0.9


class ClassMeans:
    """Exponential moving average of every class's mean feature, `m_c <- 0.9 m_c + 0.1 batch mean`.

    A class's first batch mean is taken as it is; until then its row is nan. A batch is what one optimiser step sees:
    all micro-batches and, since features are gathered, all processes. Part of a checkpoint.
    """

    name = "class_means"

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._means = torch.zeros(num_classes, 0)
        self._forget_step()

    def _forget_step(self) -> None:
        self._sums: Tensor | None = None  # of this step's micro-batches so far
        self._counts: Tensor | None = None

    @property
    def means(self) -> Tensor:
        """(K, d) after the last finished step; rows of nan: classes not seen yet."""
        return self._means

    def update(self, features: Tensor, labels: Tensor) -> Tensor:
        """Take in a micro-batch and give the means with it, (K, d), attached to the graph of `features` (B, d).

        Raises:
            ValueError: features are not finite.
        """
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        if not torch.isfinite(features).all():
            raise ValueError("image_features has non-finite values; class means stay as they were.")
        if self._means.shape[1] == 0:
            self._means = features.new_full((self.num_classes, features.shape[1]), math.nan)
        self._means = self._means.to(features.device)
        sums = features.new_zeros(self._means.shape).index_add(0, labels, features)
        counts = torch.bincount(labels, minlength=self.num_classes).to(features.dtype)
        if self._sums is not None and self._counts is not None:
            sums, counts = self._sums + sums, self._counts + counts
        self._sums, self._counts = sums.detach(), counts
        return self._blend(sums, counts)

    def commit(self) -> None:
        """End an optimiser step."""
        if self._sums is not None and self._counts is not None:
            self._means = self._blend(self._sums, self._counts)
        self._forget_step()

    def _blend(self, sums: Tensor, counts: Tensor) -> Tensor:
        batch = sums / counts[:, None].clamp_min(1)
        known, present = ~self._means.isnan(), (counts > 0)[:, None]
        blended = torch.where(known, MOMENTUM * self._means.nan_to_num() + (1 - MOMENTUM) * batch, batch)
        return torch.where(present, blended, self._means)

    def state_dict(self) -> dict[str, Tensor]:
        return {"means": self._means}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        self._means = state_dict["means"]
        self._forget_step()
