"""Loss of space alignment (SpA-Reg): classifier weights rotate towards class means."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..geometry.alignment import alignment
from .base import GeometryBatch, Regularizer


class SpaceAlignment(Regularizer):
    r"""SpA-Reg: each classifier row points along its centred class mean (our reading).

    .. math:: L = \frac{1}{|S|} \sum_{c \in S} \left(1 - \cos(w_c, \mu_c)\right), \quad
              \mu_c = m_c - \frac{1}{|C|} \sum_{c' \in C} m_{c'}

    over the classes C seen so far; S are the classes of C whose mu_c is not 0. If S is empty, the loss is 0, attached
    to the graph. `w_c` is the classifier's row, or the class's text feature for a CLIP-like model.

    | field | shape |
    |---|---|
    | class_means | (K, d), m_c; rows of nan: classes not seen yet |
    | classifier_weight | (K, d), or None |
    | text_features | (K, d), used if classifier_weight is None |

    Args:
        detach_means: True: only the weights get a gradient. False: class_means get one too; in the trainer they are
            `0.9 stored + 0.1 batch mean`, so features get a tenth of it.
        center: False: `mu_c = m_c`.
        weight, budget, name, step_size, max_step: see [`Regularizer`]. A negative weight misaligns, as in the paper's
            control experiment.

    Raises:
        ValueError: class_means is missing, values are not finite, or there are neither weights nor texts; in the
            trainer, also if the head is frozen and `detach_means` is True, since the loss could not move anything.

    Relations: [`~peft_ncgeo.training.SlerpAlignment`] and [`~peft_ncgeo.training.GradientProjection`] align
    without a loss, [`~peft_ncgeo.training.align_classifier`] after training.

    Reference: J. Wang, Z. Gao, Z. Xie, Space Alignment Matters, arXiv 2512.07844.

    Example: `GeometryTrainer(..., losses=[SpaceAlignment(weight=1.0)])`
    """

    default_name = "space_alignment"
    requires = ("class_means",)

    def __init__(
        self,
        detach_means: bool = True,
        center: bool = True,
        weight: float | Callable[[float], float] | None = None,
        budget: float | None = None,
        name: str | None = None,
        step_size: float = 0.3,
        max_step: float | None = None,
    ) -> None:
        super().__init__(weight, budget, name, step_size, max_step)
        self.detach_means, self.center = detach_means, center

    def bind(self, classifier: Any) -> None:
        if classifier is not None and self.detach_means and not classifier.weight.requires_grad:
            raise ValueError(
                f"{self.name} would move the classifier's weights, which are frozen; train the head "
                '(modules_to_save=["classifier"], for prototypes trainable=True), or pass detach_means=False.'
            )

    def forward(self, batch: GeometryBatch) -> Tensor:
        head = "text_features" if batch.classifier_weight is None else "classifier_weight"
        means, weights = batch.need("class_means", head)
        if self.detach_means and means.requires_grad and not weights.requires_grad and not self._warned:
            self._warned = True  # means have a gradient only in training
            warnings.warn(
                f"{self.name} moves nothing: neither texts nor means get a gradient; train the texts, or set "
                "detach_means=False.",
                stacklevel=2,
            )
        cosines = alignment(weights, means.detach() if self.detach_means else means, self.center)
        defined = ~cosines.isnan()
        return (1 - cosines).masked_fill(~defined, 0).sum() / defined.sum().clamp_min(1)
