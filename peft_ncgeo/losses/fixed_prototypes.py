"""Contrastive loss with fixed prototypes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..geometry.checks import check_finite, check_shape, numbers
from ..geometry.contrast import check_temperature
from ..geometry.sphere import l2_normalize
from ..validation import check_non_negative
from .base import GeometryBatch, Regularizer, class_indices

if TYPE_CHECKING:  # numpy 1.26 does not import it by itself
    from numpy.typing import ArrayLike


class PrototypeSupCon(Regularizer):
    r"""Supervised contrastive loss with `n_w` copies of each class prototype in every batch.

    With unit embeddings h and unit prototypes w, for every anchor i

    .. math:: l_i = \log\Big(\sum_{l \ne i} e^{h_i \cdot h_l / \tau} + n_w \sum_c e^{h_i \cdot w_c / \tau}\Big)
              - \frac{\sum_{j \ne i, y_j = y_i} h_i \cdot h_j + n_w\, h_i \cdot w_{y_i}}{\tau (n_{y_i} - 1 + n_w)}

    where `n_{y_i}` is the number of samples of the anchor's class in the batch; the loss is the mean of l_i. Anchors
    without positives (no prototypes and no other sample of their class) are ignored; if no anchor is left, the loss is
    0, attached to the graph. Time and memory are O(B^2 + BK) for any n_w, since copies are counted, not made.

    | field | shape |
    |---|---|
    | image_features | (B, d), embeddings; normalised here |
    | labels | (B,) |
    | classifier_weight | (K, d), the model's prototypes; used if `prototypes` is None |

    Args:
        prototypes: (K, d), fixed; normalised here. None: those of a [`~peft_ncgeo.PrototypeConfig`] head, fixed or
            trained.
        copies: n_w, 0 or more, fractions allowed; 0 is the supervised contrastive loss without prototypes. None: the
            head's `prototypes_per_class`.
        temperature: tau, 1e-6 to 1e6. None: the head's temperature.
        weight, budget, name, step_size, max_step: see [`Regularizer`]; default: weight 1.

    Raises:
        ValueError: a field is missing or not finite; copies or temperature is out of range, or is neither given nor
            known from a prototype head; or a label has no prototype.

    Relations: as n_w grows, `l_i - log n_w` goes to [`CrossEntropy`] of the logits `h_i . w_c / tau`.

    Reference: J. Gill, V. Vakilian, C. Thrampoulidis, arXiv 2310.00893; P. Khosla et al., Supervised Contrastive
    Learning, NeurIPS 2020, arXiv 2004.11362.

    Example: `GeometryTrainer(model, ..., losses=[PrototypeSupCon()], classification_loss=None)`
    """

    default_name = "prototype_supcon"

    def __init__(
        self,
        prototypes: ArrayLike | Tensor | None = None,
        copies: float | None = None,
        temperature: float | None = None,
        weight: float | Callable[[float], float] | None = None,
        budget: float | None = None,
        name: str | None = None,
        step_size: float = 0.3,
        max_step: float | None = None,
    ) -> None:
        weight = 1.0 if weight is None and budget is None else weight
        super().__init__(weight, budget, name, step_size, max_step)
        if copies is not None:
            copies = check_non_negative("copies", copies)
        if temperature is not None:
            temperature = check_temperature(temperature)
        self.copies, self.temperature = copies, temperature
        self._head: Any = None
        self.prototypes: Tensor | None
        if prototypes is not None:
            prototypes = numbers("prototypes", prototypes)
            check_shape("prototypes", prototypes, "K", "d")
            check_finite("prototypes", prototypes)
        self.register_buffer("prototypes", None if prototypes is None else l2_normalize(prototypes.detach()))
        self.requires = () if prototypes is not None else ("classifier_weight",)

    def bind(self, classifier: Any) -> None:
        self._head = [classifier]  # in a list, so that it does not become a submodule
        self._setting("copies")
        self._setting("temperature")

    def _setting(self, name: str) -> float:
        """Return the given value of a setting, or the head's if none was given."""
        value = getattr(self, name)
        value = getattr(self._head[0] if self._head else None, name, None) if value is None else value
        if value is None:
            raise ValueError(f"{self.name}: give {name}, or train a model with a PrototypeConfig that has it.")
        return value

    def forward(self, batch: GeometryBatch) -> Tensor:
        copies, temperature = self._setting("copies"), self._setting("temperature")
        if self.prototypes is None:
            features, labels, prototypes = batch.need("image_features", "labels", "classifier_weight")
        else:
            (features, labels), prototypes = batch.need("image_features", "labels"), self.prototypes
            if prototypes.shape[1] != features.shape[1]:
                raise ValueError(
                    f"{self.name}: image_features have width {features.shape[1]}, but the prototypes "
                    f"{prototypes.shape[1]}."
                )
        labels = class_indices(labels, len(prototypes), owner=self.name)
        with torch.autocast(features.device.type, enabled=False):
            h = l2_normalize(features)
            w = l2_normalize(prototypes).to(h)
            samples, classes = h @ h.T / temperature, h @ w.T / temperature  # (B, B), (B, K)
        own = torch.eye(len(h), dtype=torch.bool, device=h.device)
        others = samples.masked_fill(own, -math.inf)
        if copies:
            others = torch.cat([others, classes + math.log(copies)], dim=1)
        positives = (labels[:, None] == labels) & ~own
        near = (samples * positives).sum(1) + copies * classes.gather(1, labels[:, None]).squeeze(1)
        count = positives.sum(1).to(h) + copies  # may be a fraction, in h's dtype
        kept = count > 0
        others = others.masked_fill(~kept[:, None], 0)  # a row of -inf has a gradient of nan
        values = others.logsumexp(1) - near / count.where(kept, 1)
        return values.masked_fill(~kept, 0).sum() / kept.sum().clamp_min(1)
