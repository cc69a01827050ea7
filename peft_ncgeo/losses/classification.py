"""Classification terms: what the trainer adds the regularisers to."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .base import GeometryBatch


class CrossEntropy(nn.Module):
    """Cross-entropy over the classes, `-1/B sum_i log softmax_k(logits_ik)[y_i]`.

    | field | shape |
    |---|---|
    | logits | (B, K); for CLIP `exp(logit_scale) * cos(f_i, g_k)` |
    | labels | (B,) |

    Raises:
        ValueError: naming the field, where one is missing or not finite.

    Example: `GeometryTrainer(..., classification_loss=CrossEntropy())`, which is the default.
    """

    name = "ce"

    def forward(self, batch: GeometryBatch) -> Tensor:
        logits, labels = batch.need("logits", "labels")
        return F.cross_entropy(logits, labels)
