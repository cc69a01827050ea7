"""Point between text tower and losses where the full gradient of the class texts can be changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class TextGradient:
    """Sum of the texts' gradient over the micro-batches of a step, changed and passed on at the last micro-batch.

    No gradient enters the text tower before that, so one pass of it serves all micro-batches of a step. Each process
    computes the loss of the batch of all processes, so the gradient here is the same on every process, and DDP's mean
    over processes does not change it.

    Args:
        changes: functions from gradient and texts, both (K, d), to the gradient for the text tower.
        classes: K, the number of classes. Further rows, from student templates, pass unchanged.
    """

    def __init__(self, changes: Sequence[Callable[[Tensor, Tensor], Tensor]], classes: int) -> None:
        self.changes, self.classes = changes, classes
        self.forget_step()

    def forget_step(self) -> None:
        """Drop the sum of an unfinished step."""
        self.collected: Tensor | None = None

    end_step = forget_step  # the whole sum has entered the text tower

    def watch(self, text: Tensor, is_last: bool) -> Tensor:
        """Return the texts (K, d) that losses read; `is_last` is True if an optimiser step follows this pass.

        Raises:
            ValueError: the texts are not trained, so there is no gradient to change.
        """
        if not torch.is_grad_enabled() or not text.requires_grad:
            if self.changes and torch.is_grad_enabled():
                raise ValueError(
                    "GradientProjection changes the gradient of texts, but no text parameter is trained; leave it out."
                )
            return text
        if is_last:
            return _Watched.apply(text, self)
        leaf = text.detach().requires_grad_()
        leaf.register_hook(self.collect)
        return leaf

    def collect(self, gradient: Tensor) -> None:
        """Add the gradient of a micro-batch."""
        self.collected = gradient if self.collected is None else self.collected + gradient

    def change(self, gradient: Tensor, texts: Tensor) -> Tensor:
        """Return the changed gradient ((1 + T) K, d)."""
        own = gradient[: self.classes]
        for change in self.changes:
            own = change(own, texts[: self.classes])
        return torch.cat([own, gradient[self.classes :].to(own)])


class _Watched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, text: Tensor, gradient: TextGradient) -> Tensor:
        ctx.gradient = gradient
        ctx.save_for_backward(text.detach())
        return text.view_as(text)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        gradient, (arrived,) = ctx.gradient, grad_outputs
        gradient.collect(arrived)
        total, gradient.collected = gradient.collected, None
        return gradient.change(total, *ctx.saved_tensors).to(arrived.dtype), None
