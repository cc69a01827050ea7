"""Distillation from a teacher's class probabilities, as PromptKD trains (CVPR 2024)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..validation import check_positive
from .base import GeometryBatch, Regularizer


class Distillation(Regularizer):
    r"""Kullback-Leibler divergence of the student's class probabilities from those of another model.

    .. math:: L = \frac{\tau^2}{B K} \sum_i \mathrm{KL}\big(\mathrm{softmax}(t_i / \tau) \,\|\,
              \mathrm{softmax}(z_i / \tau)\big)

    with the teacher's logits t and the student's z. The mean is over images *and classes*, as in the published code
    and formula, so the weight of a sample is `weight / K`: choose a larger weight for more classes. Labels are not
    read.

    | field | shape |
    |---|---|
    | logits, teacher_logits | (B, K) |

    Args:
        temperature: tau.
        weight, budget, name, step_size, max_step: see [`Regularizer`]. Default: weight 1000, the paper's; for FGVC
            Aircraft, Flowers and DTD the paper uses 200.

    Raises:
        ValueError: the temperature is not positive, or a field is missing or not finite; the message names it.

    Relations: the last term of [`PointwisePreservation`] with `kl_reduction="mean"` is this divergence from the frozen
    model instead of a teacher, at temperature 1.

    Reference: Z. Li et al., PromptKD: Unsupervised Prompt Distillation for Vision-Language Models, CVPR 2024, arXiv
    2403.02781.

    Example: `GeometryTrainer(..., teacher=larger_clip, classification_loss=None, losses=[Distillation()])`
    """

    default_name = "distillation"
    requires = ("teacher_logits",)
    reads_labels = False

    def __init__(
        self,
        temperature: float = 1.0,
        weight: float | Callable[[float], float] | None = None,
        budget: float | None = None,
        name: str | None = None,
        step_size: float = 0.3,
        max_step: float | None = None,
    ) -> None:
        weight = 1000.0 if weight is None and budget is None else weight
        super().__init__(weight, budget, name, step_size, max_step)
        self.temperature = check_positive("temperature", temperature)

    def forward(self, batch: GeometryBatch) -> Tensor:
        student, teacher = batch.need("logits", "teacher_logits")
        dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        p, q = ((logits.to(dtype) / self.temperature).log_softmax(-1) for logits in (student, teacher))
        return self.temperature**2 / p.numel() * F.kl_div(p, q, reduction="sum", log_target=True)
