"""Class texts cut off from their tower, so that their whole gradient can be changed before it goes on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class TextLeaf:
    """Stands between the text tower and the losses during one optimiser step.

    Losses of all micro-batches leave their gradient on a leaf; at the last one it is changed and sent through the text
    tower once. Each process computes the loss of the batch of all processes, so the leaf's gradient is the same
    everywhere and DDP's mean over processes leaves it so.
    """

    def __init__(self) -> None:
        self._text: Tensor | None = None
        self._leaf: Tensor | None = None
        self._gradient: Tensor | None = None

    def cut(self, text: Tensor) -> Tensor:
        """The texts (K, d) as losses are to see them.

        Raises:
            ValueError: the texts are not trained, so there is no gradient to change.
        """
        if not text.requires_grad:
            raise ValueError(
                "GradientProjection changes the gradient of class texts, but no text parameter is trained."
            )
        self._text, self._leaf = text, text.detach().requires_grad_()
        return self._leaf

    def collect(self) -> None:
        """Take up the gradient of a micro-batch, after its backward pass."""
        assert self._leaf is not None  # a forward pass came first
        gradient = torch.zeros_like(self._leaf) if self._leaf.grad is None else self._leaf.grad
        self._gradient = gradient if self._gradient is None else self._gradient + gradient

    def send(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Send `change(gradient, texts)` through the text tower, with what the last micro-batch's pass kept."""
        assert self._text is not None
        assert self._gradient is not None
        self._text.backward(change(self._gradient, self._text.detach()).to(self._text.dtype))
        self._text = self._leaf = self._gradient = None
