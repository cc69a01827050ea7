"""Loss of CoPA (NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..geometry.contrast import TEMPERATURE, check_temperature, prototype_image_contrast
from .base import GeometryBatch, Regularizer, class_indices


class PrototypeImageContrast(Regularizer):
    r"""CoPA's loss: CLIP's symmetric contrastive loss, with the prototype of each image's class in place of its text.

    With unit instances e, unit prototypes p and `s_{ic} = e_i \cdot p_c / \tau`,

    .. math:: L = \frac{1}{2N} \Big(\sum_i \log \sum_c n_c e^{s_{ic}} + \sum_c n_c \log \sum_i e^{s_{ic}}
              - 2 \sum_i s_{i y_i}\Big)

    where `n_c` is the number of samples of class c in the batch. This is the mean cross-entropy of the N x N logits
    and of their transpose; these matrices are never formed. It is at least `mean_i log n_{y_i}`, so a budget must be
    larger than that. Samples of a class whose row of class_means is nan are ignored; if no sample is left, the loss is
    0, attached to the graph.

    | field | shape |
    |---|---|
    | image_features | (B, d), the instances; normalised here |
    | labels | (B,), -1: ignored |
    | class_means | (K, d), the prototypes; normalised here; rows of nan: classes not seen yet |

    Instances and prototypes must be the outputs of their heads. The class means of [`GeometryTrainer`] are running
    means of the same features, `0.9 stored + 0.1 batch mean`: both share one head, and the prototypes get a tenth of
    their gradient. In an episode, prototypes have their own head, as the paper proposes: see `peft_ncgeo.adapt`.

    Args:
        temperature: tau, 1e-6 to 1e6; e^-2 by default.
        weight, budget, name, step_size, max_step: see [`Regularizer`]; default: weight 1.

    Raises:
        ValueError: a field is missing or not finite, temperature is out of range, or a label has no prototype.

    Relations: [`~peft_ncgeo.geometry.prototype_image_contrast`] is the formula, also for many episodes. Its first
    sum is [`BalancedSoftmax`] of the logits s with the batch's own counts, up to a constant.

    Reference: H. Tian et al., Mind the Gap Between Prototypes and Images in Cross-domain Finetuning, NeurIPS 2024,
    arXiv 2410.12474.

    Example: `GeometryTrainer(model, ..., losses=[PrototypeImageContrast(weight=0.1)])`
    """

    default_name = "prototype_image"
    requires = ("class_means",)

    def __init__(
        self,
        temperature: float = TEMPERATURE,
        weight: float | Callable[[float], float] | None = None,
        budget: float | None = None,
        name: str | None = None,
        step_size: float = 0.3,
        max_step: float | None = None,
    ) -> None:
        weight = 1.0 if weight is None and budget is None else weight
        super().__init__(weight, budget, name, step_size, max_step)
        self.temperature = check_temperature(temperature)

    def forward(self, batch: GeometryBatch) -> Tensor:
        features, labels, means = batch.need("image_features", "labels", "class_means")
        labels = class_indices(labels, len(means), lowest=-1, owner=self.name)
        seen = ~means.isnan().all(-1)
        labels = labels.where(seen[labels.clamp_min(0)], -1)
        return prototype_image_contrast(features, means, labels, self.temperature)
