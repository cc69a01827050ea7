"""LP++: a linear probe with a learned weight of the text for each class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...geometry.sphere import l2_normalize
from ...validation import check_bool, check_int
from .base import LinearHead, State, Support, as_state

_MOMENTUM, _EVERY, _START = 0.9, 10, 250.0


@dataclass(frozen=True)
class LPPlusPlus(LinearHead):
    r"""LP++: logits `x^ . (w_c + alpha_c t^_c) + b_c`, trained with the cross-entropy of the whole support set.

    The cosines are not scaled, and no setting is chosen: the step sizes follow from the features. With F the unit
    features (N, d), w and b take steps of `4 N / lambda_max(F'F)` with momentum, and every 10th step alpha takes one
    of `N / (4 max_c sum_i (f_i . t_c)^2)`. w_c starts at the sum of the class's features, alpha at 250 times the mean
    similarity of images and their own texts, b at 0 (the authors' code: random).

    Each view counts as an image. The weights after the last step are used; the authors' code takes those of the best
    step on a validation set. New class names are refused.

    Args:
        iterations: number of steps of w and b.
        published_sum: step alpha along the sum of all its gradients since the first step, as the authors' code does,
            which never sets them to zero. Default: step along the present gradient.

    Reference: Y. Huang et al., CVPR 2024, arXiv 2404.02285.
    """

    iterations: int = 300
    published_sum: bool = False

    num_views: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_int("iterations", self.iterations, least=0)
        check_bool("published_sum", self.published_sum)

    def fit(self, support: Support) -> tuple[State, dict[str, float]]:
        x, labels = support.samples()
        texts = l2_normalize(support.texts)
        similarity = x @ texts.T
        weight = torch.zeros_like(texts).index_add(0, labels, x).requires_grad_()
        bias = x.new_zeros(len(texts), requires_grad=True)
        own = similarity.gather(1, labels[:, None]).mean()
        alpha = (_START * own).repeat(len(texts)).requires_grad_()
        steps = step_sizes(x, similarity)
        optimizer = torch.optim.SGD([weight, bias], lr=steps[0], momentum=_MOMENTUM)
        gradient = torch.zeros_like(alpha)
        for i in range(1, self.iterations + 1):
            optimizer.zero_grad()
            alpha.grad = None
            F.cross_entropy(x @ weight.T + alpha * similarity + bias, labels).backward()
            optimizer.step()
            assert alpha.grad is not None  # backward made it
            gradient = gradient + alpha.grad if self.published_sum else alpha.grad
            if i % _EVERY == 0:
                with torch.no_grad():
                    alpha -= steps[1] * gradient
        return as_state(x, weight=weight + alpha[:, None] * texts, bias=bias), {}


def step_sizes(features: Tensor, similarity: Tensor) -> tuple[float, float]:
    """Return LP++'s step sizes of w and alpha, for unit features (N, d) and their cosines (N, K) with the texts."""
    n = len(features)
    return 4 * n / float(torch.linalg.matrix_norm(features, 2)) ** 2, n / (4 * float(similarity.square().sum(0).max()))
