"""Loss of PromptSRC: point-wise consistency with the frozen model."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from ..geometry.sphere import cosine_logits, l2_normalize
from ..validation import check_float
from .base import GeometryBatch, Regularizer


class PointwisePreservation(Regularizer):
    r"""PromptSRC's three consistency terms: texts, images and predictions stay close to those of the frozen model.

    .. math:: L = w_t \, \mathrm{mean}|\hat g - \hat g^0| + w_i \, \mathrm{mean}|\hat f - \hat f^0|
              + w_p \, \mathrm{KL}(p^0 \| p)

    The first two are means over all entries of normalised features; p and p0 are the softmax of the tuned and the
    frozen logits at the same logit scale.

    | field | shape |
    |---|---|
    | image_features, frozen_image_features | (B, d) |
    | text_features, frozen_text_features | (K, d) |
    | logit_scale | () |

    Args:
        weight, budget, name, step_size, max_step: see [`Regularizer`]. The paper's weight is 1.
        text_weight: w_t.
        image_weight: w_i.
        prediction_weight: w_p.
        kl_reduction: "batchmean" divides the KL by B, as in the paper; "mean" by B * K, as in its code.

    Raises:
        ValueError: `kl_reduction` is unknown, or a field is missing or not finite; the message names it.

    Relations: with `frozen_templates` of the training arguments, the frozen texts are the mean over templates (60 in
    the paper). PromptSRC's third part, averaging prompts over epochs, is [`~peft_ncgeo.training.PromptAveraging`].

    Reference: M. U. Khattak et al., Self-regulating Prompts: Foundational Model Adaptation without Forgetting, ICCV
    2023, arXiv 2307.06948.

    Example: `GeometryTrainer(..., losses=[PointwisePreservation(weight=1.0)])`
    """

    default_name = "pointwise"
    requires = ("frozen_image_features", "frozen_text_features", "logit_scale")
    reads_labels = False

    def __init__(
        self,
        weight: float | Callable[[float], float] | None = None,
        budget: float | None = None,
        text_weight: float = 25.0,
        image_weight: float = 10.0,
        prediction_weight: float = 1.0,
        kl_reduction: str = "batchmean",
        name: str | None = None,
        step_size: float = 0.3,
        max_step: float | None = None,
    ) -> None:
        super().__init__(weight, budget, name, step_size, max_step)
        if kl_reduction not in ("batchmean", "mean"):
            raise ValueError(f"kl_reduction={kl_reduction!r} must be 'batchmean' or 'mean'.")
        self.text_weight = check_float("text_weight", text_weight, "finite")
        self.image_weight = check_float("image_weight", image_weight, "finite")
        self.prediction_weight = check_float("prediction_weight", prediction_weight, "finite")
        self.kl_reduction = kl_reduction

    def forward(self, batch: GeometryBatch) -> Tensor:
        image, frozen_image, text, frozen_text, scale = batch.need(
            "image_features", "frozen_image_features", "text_features", "frozen_text_features", "logit_scale"
        )
        text_term = (l2_normalize(text) - l2_normalize(frozen_text)).abs().mean()
        image_term = (l2_normalize(image) - l2_normalize(frozen_image)).abs().mean()
        prediction = cosine_logits(image, text, scale).log_softmax(-1)
        target = cosine_logits(frozen_image, frozen_text, scale).log_softmax(-1)
        divisor = len(prediction) if self.kl_reduction == "batchmean" else prediction.numel()
        prediction_term = F.kl_div(prediction, target, reduction="sum", log_target=True) / divisor
        return self.text_weight * text_term + self.image_weight * image_term + self.prediction_weight * prediction_term
