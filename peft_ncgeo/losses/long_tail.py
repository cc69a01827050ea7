"""Classification losses: cross-entropies over adjusted logits, to which the trainer adds the regularisers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..geometry.checks import refuse_unless
from ..validation import check_float, check_non_negative
from .base import GeometryBatch, class_indices, finite_value


class CrossEntropy(nn.Module):
    """Cross-entropy over the classes, `-1/B sum_i log softmax_k(logits_ik)[y_i]`.

    | field | shape |
    |---|---|
    | logits | (B, K); for CLIP `exp(logit_scale) * cos(f_i, g_k)` |
    | labels | (B,) |
    | targets | (B, K), used if images are mixed: `-1/B sum_ik targets_ik log softmax_k(logits_ik)` |

    Args:
        label_smoothing: share of the target that is spread evenly over all classes, 0 to 1.

    Raises:
        ValueError: a field is missing or not finite (the message names it), labels are outside 0..K-1, or
            `label_smoothing` is out of range.
        FloatingPointError: the value is not finite although logits are.

    Example: `GeometryTrainer(..., classification_loss=CrossEntropy())`, which is the default.
    """

    name = "ce"
    requires: tuple[str, ...] = ()
    reads_targets: bool = True

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        wanted = "a share of the target, 0 to 1"
        self.label_smoothing = check_float("label_smoothing", label_smoothing, wanted, lambda share: 0 <= share <= 1)

    def forward(self, batch: GeometryBatch) -> Tensor:
        logits, targets = batch.need("logits", "labels" if batch.targets is None else "targets")
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # PyTorch would ignore labels of -100
        targets = class_indices(targets, logits.shape[1]) if batch.targets is None else targets.to(logits.dtype)
        weights = self.class_weights(batch)
        value = F.cross_entropy(self.adjusted(logits, batch), targets, weights, label_smoothing=self.label_smoothing)
        return finite_value(self.name, value)

    def adjusted(self, logits: Tensor, batch: GeometryBatch) -> Tensor:
        """Return the adjusted logits (B, K), the input of the softmax."""
        return logits

    def class_weights(self, batch: GeometryBatch) -> Tensor | None:
        """Return weights (K,) of the classes for a weighted mean over the batch; None: equal weights."""
        return None


class LogitAdjustment(CrossEntropy):
    r"""Logit-adjusted cross-entropy `CE(logits_k + tau log pi_k)`; pi are the classes' shares of the training set.

    The classifier that minimizes it is optimal for balanced test data: in training, rare classes must win by a margin.

    | field | shape |
    |---|---|
    | logits | (B, K) |
    | labels | (B,) |
    | class_counts | (K,), training samples of each class |

    Args:
        tau: strength; 1 is the Fisher-consistent choice, 0 is plain cross-entropy.

    Raises:
        ValueError: a field is missing or not finite (the message names it), or a class has no training samples.

    Reference: A. K. Menon et al., Long-tail learning via logit adjustment, ICLR 2021, arXiv 2007.07314.

    Example: `GeometryTrainer(..., classification_loss=LogitAdjustment())`
    """

    name = "logit_adjustment"
    requires = ("class_counts",)

    def __init__(self, tau: float = 1.0) -> None:
        super().__init__()
        self.tau = check_float("tau", tau, "finite")

    def adjusted(self, logits: Tensor, batch: GeometryBatch) -> Tensor:
        counts = _counts(batch, logits)
        adjustment = self.tau * (counts / counts.sum()).log()
        message = "tau={} times the log shares of class_counts is not finite; lower tau."
        refuse_unless(adjustment.isfinite().all(), ValueError, message, self.tau)
        return logits + adjustment


class BalancedSoftmax(LogitAdjustment):
    r"""Balanced softmax: `-1/B sum_i log( n_{y_i} e^{z_i,y_i} / sum_k n_k e^{z_ik} )`.

    It equals [`LogitAdjustment`] at `tau=1`, with the same fields and errors.

    Reference: J. Ren et al., Balanced Meta-Softmax for Long-Tailed Visual Recognition, NeurIPS 2020, arXiv 2007.10740.

    Example: `GeometryTrainer(..., classification_loss=BalancedSoftmax())`
    """

    name = "balanced_softmax"

    def __init__(self) -> None:
        super().__init__(tau=1.0)


class LDAM(CrossEntropy):
    r"""Label-distribution-aware margins: the true class's logit is lowered by a margin that grows as n_c falls.

    .. math:: L = CE(z_{ik} - s \, \Delta_{y_i} [k = y_i]), \quad \Delta_c \propto n_c^{-1/4}, \max_c \Delta_c = m

    | field | shape |
    |---|---|
    | logits | (B, K) |
    | labels | (B,) |
    | class_counts | (K,), training samples of each class |
    | logit_scale | (), if the logits are scaled cosines |

    With deferred re-weighting (LDAM-DRW), the last part of training weights classes by their effective number of
    samples, `(1 - beta) / (1 - beta^{n_c})`.

    Args:
        max_margin: m, a cosine if logits are scaled cosines.
        scale: s. Default: `exp(logit_scale)` if the batch has a `logit_scale`, so that margins are margins of the
            cosine, as in the paper; 1 for a linear head (our reading).
        reweight_after: share of training after which classes are weighted, 0 to 1; the paper's is 0.8. None: never.
        beta: beta of the effective number, in [0, 1).

    Raises:
        ValueError: a field is missing or not finite (the message names it), a class has no training samples, or a
            margin, scale, share or beta is out of range.

    Reference: K. Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS 2019,
    arXiv 1906.07413.

    Example: `GeometryTrainer(..., classification_loss=LDAM(max_margin=0.3))`
    """

    name = "ldam"
    reads_targets = False  # a margin is that of one class
    requires: tuple[str, ...] = ("class_counts",)

    def __init__(
        self,
        max_margin: float = 0.5,
        scale: float | None = None,
        reweight_after: float | None = None,
        beta: float = 0.9999,
    ) -> None:
        super().__init__()
        self.max_margin = check_non_negative("max_margin", max_margin)
        self.scale = None if scale is None else check_non_negative("scale", scale)
        self.reweight_after = reweight_after
        if reweight_after is not None:
            wanted = "a share of training, 0 to 1"
            self.reweight_after = check_float("reweight_after", reweight_after, wanted, lambda value: 0 <= value <= 1)
        self.beta = check_float("beta", beta, "at least 0 and below 1", lambda value: 0 <= value < 1)
        if reweight_after is not None:
            self.requires = (*self.requires, "progress")

    def class_weights(self, batch: GeometryBatch) -> Tensor | None:
        if self.reweight_after is None or batch.need("progress")[0] < self.reweight_after:
            return None
        (logits,) = batch.need("logits")
        counts = _counts(batch, logits).double()  # 1 - beta^n loses 4 digits in float32, more for beta near 1
        rest = counts.new_tensor(self.beta - 1)
        weights = rest / torch.expm1(counts * rest.log1p())
        return weights.to(torch.promote_types(logits.dtype, torch.float32))

    def adjusted(self, logits: Tensor, batch: GeometryBatch) -> Tensor:
        margins = _counts(batch, logits) ** -0.25
        margins = margins * (self.max_margin / margins.max())
        scale: Tensor | float = 1.0
        if self.scale is not None:
            scale = self.scale
        elif batch.logit_scale is not None:
            scale = batch.need("logit_scale")[0].detach().to(logits).exp()
        (labels,) = batch.need("labels")
        own = labels[:, None] == torch.arange(logits.shape[1], device=labels.device)
        return logits - own * (scale * margins)


def _counts(batch: GeometryBatch, logits: Tensor) -> Tensor:
    (counts,) = batch.need("class_counts")
    if len(counts) != logits.shape[1]:
        raise ValueError(f"class_counts must be {logits.shape[1]} numbers, one for each class, got {len(counts)}.")
    absent = counts < 1
    message = "Class {} has no training samples in class_counts."
    refuse_unless(~absent.any(), ValueError, message, absent.int().argmax())
    counts = counts.to(torch.promote_types(logits.dtype, torch.float32))
    refuse_unless(counts.sum().isfinite(), ValueError, "class_counts are too large: their sum is not finite.")
    return counts
