"""Moving averages of each class's features during training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...geometry.checks import refuse_unless

MOMENTUM = 0.9


class ClassMeans:
    """Exponential moving average of every class's mean feature, `m_c <- 0.9 m_c + 0.1 batch mean`.

    The row of a class is nan until its first batch, whose mean it then takes. A batch holds all images of one
    optimiser step: all micro-batches and, since features are gathered, all processes. The averages are part of a
    checkpoint.
    """

    name = "class_means"

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._means = torch.zeros(num_classes, 0)
        self.forget_step()

    def forget_step(self) -> None:
        """Drop the micro-batches added since the last finished step."""
        self._step: tuple[Tensor, Tensor] | None = None  # sums (K, d) and counts (K,) of its micro-batches so far

    @property
    def means(self) -> Tensor:
        """Class means (K, d) including all added micro-batches; rows of nan for classes not seen yet."""
        return self._means if self._step is None else self._blend(*self._step)

    def update(self, features: Tensor, labels: Tensor) -> Tensor:
        """Add a micro-batch and return the new means (K, d), attached to the graph of `features` (B, d).

        Raises:
            ValueError: features are not finite.
        """
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        message = "image_features has non-finite values; class means do not change."
        refuse_unless(features.isfinite().all(), ValueError, message)
        if self._means.shape[1] == 0:
            self._means = features.new_full((self.num_classes, features.shape[1]), math.nan)
        self._means = self._means.to(features.device)
        # not index_add, whose order of addition on a GPU differs between processes that must agree
        members = (labels[:, None] == torch.arange(self.num_classes, device=labels.device)).to(features.dtype)
        sums, counts = members.T @ features, members.sum(0)
        if self._step is not None:
            sums, counts = self._step[0] + sums, self._step[1] + counts
        self._step = sums.detach(), counts
        return self._blend(sums, counts)

    def end_step(self) -> None:
        """Finish a step: add all its micro-batches to the averages."""
        self._means = self.means
        self.forget_step()

    def _blend(self, sums: Tensor, counts: Tensor) -> Tensor:
        batch = sums / counts[:, None].clamp_min(1)
        known, present = ~self._means.isnan(), (counts > 0)[:, None]
        blended = torch.where(known, MOMENTUM * self._means.nan_to_num() + (1 - MOMENTUM) * batch, batch)
        return torch.where(present, blended, self._means)

    def state_dict(self) -> dict[str, Tensor]:
        return {"means": self._means}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        if len(state_dict["means"]) != self.num_classes:
            raise RuntimeError(
                f"it holds {len(state_dict['means'])} classes, but the data set has {self.num_classes}."
            )
        self._means = state_dict["means"]
        self.forget_step()
