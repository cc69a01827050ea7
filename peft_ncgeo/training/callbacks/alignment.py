"""Space alignment without a loss: callbacks that rotate a classifier's weights or project their gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...geometry.alignment import project_gradient, rotate_towards_means, slerp_fraction
from ...geometry.checks import DeferredChecks
from ..state.class_means import ClassMeans


class _Alignment(TrainerCallback):
    """Callback that needs class means and, for an image classifier, its trained linear head."""

    requires = ("class_means",)
    _means: ClassMeans | None = None
    _head: Any = None

    def bind(self, head: Any, means: ClassMeans, reads_text: bool) -> None:
        """Set head and class means; the trainer calls this before each training run.

        Args:
            head: the head of an image classifier if it is one linear layer, else None.
            means: the trainer's class means.
            reads_text: True if class texts take the place of a head's weights.

        Raises:
            ValueError: there are no weights that this callback can change.
        """
        self._head, self._means = head, means
        if not reads_text and not (
            isinstance(getattr(head, "weight", None), nn.Parameter) and head.weight.requires_grad
        ):
            raise ValueError(
                f"{type(self).__name__} changes the classifier's weights, but the head is not one trained linear "
                'layer; name the head in modules_to_save, for example modules_to_save=["classifier"].'
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._means is None:
            raise ValueError(
                f"{type(self).__name__} needs GeometryTrainer, which keeps class means; pass it there as a callback."
            )


class SlerpAlignment(_Alignment):
    r"""SpA-SLERP callback: after each step it rotates every misaligned row of the head towards its class mean.

    At step t of T, a row with `cos(w_c, mu_c) <= threshold` rotates, with its length kept, by this fraction of the
    angle:

    .. math:: 1 - (1 - \alpha r_t)^{34000 / T}, \quad r_t = (1 - \cos(\pi t / T)) / 2

    The exponent is our reading: the effects of the steps multiply, and the published alpha is for 34,000 steps. `mu_c`
    is the moving average of class c's features, minus the mean of these averages over all classes seen. Rows of
    classes not seen yet, rows of length 0, and rows parallel to their mean do not change.

    Class texts of a CLIP-like model are not weights, so they cannot be rotated during training; use
    [`~peft_ncgeo.training.align_classifier`] afterwards.

    Args:
        alpha: 0 to 1; 0.002 in the paper.
        threshold: rows with a greater cosine do not change; 0.95 in the paper.
        center: False uses class means without subtracting their mean, as in the authors' code.

    Raises:
        ValueError: a value is out of range; or, when training starts, the head is not one trained linear layer.

    Reference: J. Wang, Z. Gao, Z. Xie, Space Alignment Matters, arXiv 2512.07844.

    Example: `GeometryTrainer(..., callbacks=[SlerpAlignment(alpha=0.002)])`
    """

    def __init__(self, alpha: float = 0.002, threshold: float = 0.95, center: bool = True) -> None:
        slerp_fraction(0, 1, alpha)  # checks alpha
        if not -1 <= threshold <= 1:
            raise ValueError(f"threshold={threshold} must be a cosine, -1 to 1.")
        self.alpha, self.threshold, self.center = alpha, threshold, center

    def bind(self, head: Any, means: ClassMeans, reads_text: bool) -> None:
        if reads_text:
            raise ValueError(
                "SlerpAlignment rotates a head's weights; class texts are computed from words. Rotate them after "
                "training with align_classifier."
            )
        super().bind(head, means, reads_text)

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._means is not None  # set by bind
        fraction = slerp_fraction(state.global_step, state.max_steps, self.alpha)  # global_step starts at 0 here
        weight = self._head.weight
        with DeferredChecks():  # never read: the trainer checks the features behind class means
            weight.copy_(rotate_towards_means(weight, self._means.means, fraction, self.threshold, self.center))


class GradientProjection(_Alignment):
    r"""SpA-Proj callback: it removes from each row's gradient the part that rotates the row away from its class mean.

    Let w and mu have length 1, g be the gradient of row c, `g_t = g - <g, w> w` and `d = unit(mu - <mu, w> w)`. If
    `<g_t, d> > 0`, then `g_t <- g_t - <g_t, d> d`. The row's gradient becomes `(1 - gamma) g_t + gamma g`, so the part
    along w is scaled by gamma, as in the authors' code. "Away" refers to a step of gradient descent; Adam's step may
    differ.

    For a head, the callback changes the gradient summed over all processes and micro-batches. For a CLIP-like model,
    it changes this gradient of the class texts before it enters the text tower (under gradient accumulation, in the
    backward pass of the last micro-batch).

    Args:
        gamma: 0 (projected only) to 1 (unchanged); 0.6 in the paper.
        center: False uses class means without subtracting their mean.

    Raises:
        ValueError: gamma is out of range; or, when training starts, the head is not one trained linear layer.

    Reference: J. Wang, Z. Gao, Z. Xie, Space Alignment Matters, arXiv 2512.07844.

    Example: `GeometryTrainer(..., callbacks=[GradientProjection(gamma=0.6)])`
    """

    def __init__(self, gamma: float = 0.6, center: bool = True) -> None:
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma={gamma} must be 0 to 1.")
        self.gamma, self.center = gamma, center

    @torch.no_grad()
    def project(self, gradient: Tensor, weights: Tensor) -> Tensor:
        """Return the gradient (K, d) that replaces `gradient`, for classifier weights (K, d)."""
        assert self._means is not None  # set by bind
        with DeferredChecks():  # never read, see above
            return project_gradient(gradient, weights, self._means.means, self.gamma, self.center)

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._head is not None and self._head.weight.grad is not None:
            weight = self._head.weight
            weight.grad.copy_(self.project(weight.grad, weight))
