"""CLAP: a linear probe with a penalty on its distance from the texts, larger for classes that the texts know."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...geometry.sphere import l2_normalize
from ...validation import check_int, check_non_negative, check_positive
from .base import LinearHead, State, Support, as_state

_BATCH, _MOMENTUM, _WARMUP_LR = 256, 0.9, 1e-5


@dataclass(frozen=True)
class CLAP(LinearHead):
    r"""CLAP: cross-entropy of `s x^ . w^_c`, plus `1/K sum_c lambda_c ||w_c - t_c||^2`.

    w starts at the texts t, not normalised. lambda_c is the mean zero-shot probability of the true class over the
    class's images and views: classes that the texts classify well have a larger penalty.

    Training: SGD with momentum 0.9, batches of 256, and a cosine schedule after one epoch at 1e-5. Each epoch draws as
    many views as there are images. The weights of the last epoch are used. lambda does not change: the paper's outer
    steps do not run in the authors' experiments. New class names are refused.

    Args:
        penalty: factor of all lambda_c; 0 is the paper's baseline ZS-LP.
        epochs, lr: number of epochs and learning rate of the training.

    Reference: J. Silva-Rodriguez et al., CVPR 2024, arXiv 2312.12730.
    """

    penalty: float = 1.0
    epochs: int = 300
    lr: float = 0.1

    num_views: ClassVar[int] = 20
    smallest_crop: ClassVar[float] = 0.08

    def __post_init__(self) -> None:
        check_non_negative("penalty", self.penalty)
        check_int("epochs", self.epochs, least=0)
        check_positive("lr", self.lr)

    def fit(self, support: Support) -> tuple[State, dict[str, float]]:
        x, labels = support.samples()
        count, texts = support.features.shape[1], support.texts
        held = self.penalty * multipliers(support)
        weight = texts.clone().requires_grad_()
        draws = torch.Generator().manual_seed(support.seed)
        optimizer = torch.optim.SGD([weight], lr=self.lr, momentum=_MOMENTUM)
        for epoch in range(self.epochs):
            cosine = self.lr * (1 + math.cos(math.pi * (epoch - 1) / self.epochs)) / 2
            optimizer.param_groups[0]["lr"] = cosine if epoch else _WARMUP_LR
            for batch in torch.randperm(len(x), generator=draws)[:count].split(_BATCH):
                optimizer.zero_grad()
                logits = support.scale * x[batch] @ l2_normalize(weight).T
                (F.cross_entropy(logits, labels[batch]) + distance(weight, texts, held)).backward()
                optimizer.step()
        state = as_state(x, weight=support.scale * l2_normalize(weight), bias=x.new_zeros(len(texts)))
        return state, {"penalty": float(distance(weight, texts, held).detach())}


def multipliers(support: Support) -> Tensor:
    """Return lambda (K,), the mean zero-shot probability of the true class over each class's views."""
    x, labels = support.samples()
    sure = support.text_logits(x).softmax(-1).gather(1, labels[:, None]).flatten()
    return sure.new_zeros(len(support.texts)).index_add(0, labels, sure) / torch.bincount(labels)


def distance(weight: Tensor, texts: Tensor, multipliers: Tensor) -> Tensor:
    """Return the penalty `1/K sum_c lambda_c ||w_c - t_c||^2` of weights and texts (K, d)."""
    return (multipliers * (weight - texts).square().sum(-1)).mean()
