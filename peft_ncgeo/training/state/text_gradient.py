"""A place between the text tower and the losses where the whole gradient of the class texts can be changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class TextGradient:
    """Collects the texts' gradient over the micro-batches of a step, and lets the sum, or what is made of it, through
    at the last one.

    Before that nothing passes, so one pass of the text tower serves all micro-batches of a step. Each process computes
    the loss of the batch of all processes, so what arrives here is the same everywhere, and DDP's mean over processes
    leaves it so.

    Args:
        changes: each maps gradient and texts, both (K, d), to the gradient that goes on into the text tower.
        classes: K. Further rows, of student templates, pass as they are.
    """

    def __init__(self, changes: Sequence[Callable[[Tensor, Tensor], Tensor]], classes: int) -> None:
        self.changes, self.classes = changes, classes
        self.forget_step()

    def forget_step(self) -> None:
        """Forget what an unfinished step has collected."""
        self.collected: Tensor | None = None

    end_step = forget_step  # all of it has gone on into the text tower

    def watch(self, text: Tensor, is_last: bool) -> Tensor:
        """The texts (K, d) as losses are to see them; `is_last` says whether the optimiser steps after this pass.

        Raises:
            ValueError: the texts are not trained, so there is no gradient to change.
        """
        if not torch.is_grad_enabled() or not text.requires_grad:
            if self.changes and torch.is_grad_enabled():
                raise ValueError("GradientProjection changes the gradient of texts, but no text parameter is trained.")
            return text
        if is_last:
            return _Watched.apply(text, self)
        leaf = text.detach().requires_grad_()
        leaf.register_hook(self.collect)
        return leaf

    def collect(self, gradient: Tensor) -> None:
        """Add what a micro-batch sends."""
        self.collected = gradient if self.collected is None else self.collected + gradient

    def change(self, gradient: Tensor, texts: Tensor) -> Tensor:
        """The gradient ((1 + T) K, d) that goes on."""
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
