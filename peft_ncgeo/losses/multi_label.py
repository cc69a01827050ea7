"""Binary cross-entropy over the classes, for images with any number of labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..geometry.checks import refuse_unless
from ..validation import check_bool, check_float, check_non_negative, short_repr
from .base import GeometryBatch, finite_value


class _Focus:
    """Weights of ASL, by default those of the paper's experiments."""

    def __init__(self, gamma_neg: float = 4.0, gamma_pos: float = 0.0, clip: float = 0.05) -> None:
        self.gamma_neg = check_non_negative("gamma_neg", gamma_neg)
        self.gamma_pos = check_non_negative("gamma_pos", gamma_pos)
        self.clip = check_float("clip", clip, "at least 0 and below 1", lambda margin: 0 <= margin < 1)

    def weighted(self, logits: Tensor, of_present: Tensor, of_absent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the terms (B, K) of labels 1 and of labels 0, in a form with a finite gradient for every logit.

        Args:
            of_present, of_absent: log p and log(1 - p), (B, K).
        """
        focused = (self.gamma_pos * of_absent).exp() * of_present
        if not self.clip:
            return focused, (self.gamma_neg * of_present).exp() * of_absent
        shifted = logits.sigmoid() - self.clip
        inside = shifted > 0
        shifted = shifted.where(inside, torch.full_like(shifted, 0.5))  # powers of 0 may have an infinite slope
        others = shifted**self.gamma_neg * torch.log1p(-shifted)
        return focused, others.where(inside, torch.zeros_like(others))


class MultiLabelLoss(nn.Module):
    r"""Binary cross-entropy of each class, for images with any number of labels: a mean over images and classes.

    With the logits z, the probabilities :math:`p = \sigma(z)` and the labels y, 0 or 1,

    .. math:: L = -\frac{1}{B K} \sum_i \sum_k \big( w_k y_{ik} \log p_{ik} + (1 - y_{ik}) \log (1 - p_{ik}) \big)

    and with `asymmetric=True` the asymmetric loss (ASL), which ignores easy negatives,

    .. math:: L = -\frac{1}{B K} \sum_i \sum_k \big( w_k y_{ik} (1 - p_{ik})^{\gamma_+} \log p_{ik}
              + (1 - y_{ik}) q_{ik}^{\gamma_-} \log (1 - q_{ik}) \big), \quad q = \max(p - m, 0)

    | field | shape |
    |---|---|
    | logits | (B, K); for CLIP `exp(logit_scale) * cos(f_i, g_k) + logit_bias` |
    | multi_hot | (B, K), 0 or 1 |

    CLIP has no bias, and its logits are so far above 0 that every probability is 1. `GeometryTrainer` adds a bias, see
    `logit_bias` of [`~peft_ncgeo.GeometryTrainingArguments`].

    Args:
        asymmetric: True for ASL.
        gamma_neg, gamma_pos: exponents of ASL for negatives and positives. Default: 4 and 0, as in the paper.
        clip: margin m of ASL. Default: 0.05, as in the paper.
        pos_weight: w, one number, or one number for each class. Default: 1.

    Raises:
        ValueError: a field is missing or not finite (the message names it), `multi_hot` holds other numbers than 0 and
            1, an option is out of range, an option of ASL is given without `asymmetric=True`, or there are not K
            weights.
        FloatingPointError: the value is not finite although logits are.

    Relations: without ASL and for one weight, it is `torch.nn.BCEWithLogitsLoss`. The code of ASL's authors, and that
    of `timm`, return a sum, not a mean.

    Reference: T. Ridnik, E. Ben-Baruch et al., Asymmetric Loss For Multi-Label Classification, ICCV 2021, arXiv
    2009.14119.

    Example: `GeometryTrainer(..., classification_loss=MultiLabelLoss(asymmetric=True))`
    """

    name = "multi_label"
    requires: tuple[str, ...] = ("multi_hot",)
    reads_labels = False  # of one label an image

    def __init__(
        self,
        asymmetric: bool = False,
        gamma_neg: float | None = None,
        gamma_pos: float | None = None,
        clip: float | None = None,
        pos_weight: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.asymmetric = check_bool("asymmetric", asymmetric)
        given: dict[str, Any] = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip}
        if not self.asymmetric and (names := [name for name, value in given.items() if value is not None]):
            raise ValueError(f"{names[0]}={short_repr(given[names[0]])} is one of ASL's; pass asymmetric=True too.")
        self._focus: _Focus | None = None
        if self.asymmetric:
            self._focus = _Focus(**{name: value for name, value in given.items() if value is not None})
        self.gamma_neg = self._focus and self._focus.gamma_neg
        self.gamma_pos = self._focus and self._focus.gamma_pos
        self.clip = self._focus and self._focus.clip
        self.pos_weight = None if pos_weight is None else _weights(pos_weight)

    def forward(self, batch: GeometryBatch) -> Tensor:
        logits, labels = batch.need("logits", "multi_hot")
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        message = "multi_hot must hold 0 and 1 only, got {} and {}."
        refuse_unless(((labels == 0) | (labels == 1)).all(), ValueError, message, labels.min(), labels.max())
        of_present, of_absent = F.logsigmoid(logits), F.logsigmoid(-logits)
        if self._focus is not None:
            of_present, of_absent = self._focus.weighted(logits, of_present, of_absent)
        terms = torch.where(labels == 1, self._weighted(of_present), of_absent)
        return finite_value(self.name, -terms.mean())

    def _weighted(self, of_present: Tensor) -> Tensor:
        if self.pos_weight is None:
            return of_present
        weights = of_present.new_tensor(self.pos_weight)
        if weights.numel() not in (1, of_present.shape[1]):
            raise ValueError(
                f"pos_weight has {weights.numel()} numbers for {of_present.shape[1]} classes; give one for each class."
            )
        return weights * of_present


def _weights(given: Any) -> float | list[float]:
    """Return one weight or a list of weights; check that each is a finite number of at least 0."""
    if not isinstance(given, Sequence | np.ndarray | Tensor) or isinstance(given, str):
        return check_non_negative("pos_weight", given)
    return [check_non_negative(f"pos_weight[{k}]", weight) for k, weight in enumerate(given)]
