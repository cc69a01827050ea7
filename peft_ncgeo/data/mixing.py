"""Mixing of training images with one another: mixup and CutMix."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
from torch import Tensor

from ..validation import check_positive


class Mixing(ABC):
    """Base of mixup and CutMix, which mix each image of a batch with another image: it keeps a share lambda of itself.

    Pass one to [`GeometryTrainer`] as its `data_collator`: images are collated as always, and in every micro-batch of
    training, over all processes, each image is mixed with another image of the micro-batch, drawn by seed and step.
    Images are not mixed in evaluation. Losses read the share of each class in an image (`GeometryBatch.targets`) in
    place of one label.

    Args:
        alpha: parameter of the distribution Beta(alpha, alpha) of lambda, > 0.

    Raises:
        ValueError: alpha is not positive and finite.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = check_positive("alpha", alpha)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(alpha={self.alpha:g})"

    def draw(self, rng: np.random.Generator) -> tuple[float, float, float]:
        """Draw lambda and a position in the image, given as shares of its height and width."""
        return float(rng.beta(self.alpha, self.alpha)), rng.random(), rng.random()

    @abstractmethod
    def mix(self, images: Tensor, others: Tensor, drawn: tuple[float, float, float]) -> tuple[Tensor, float]:
        """Return images (B, C, H, W) mixed with others of this shape, and the share that each image keeps."""


class MixUp(Mixing):
    r"""Mixup: `lambda x_i + (1 - lambda) x_j`, with one `lambda ~ Beta(alpha, alpha)` for a batch.

    Targets are mixed in the same way, `lambda y_i + (1 - lambda) y_j`.

    Args:
        alpha: > 0; the paper's is 0.2 on ImageNet, 1 on CIFAR.

    Reference: H. Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018, arXiv 1710.09412.

    Example: `GeometryTrainer(..., data_collator=MixUp(alpha=0.2))`
    """

    def __init__(self, alpha: float = 0.2) -> None:
        super().__init__(alpha)

    def mix(self, images: Tensor, others: Tensor, drawn: tuple[float, float, float]) -> tuple[Tensor, float]:
        share = drawn[0]
        return share * images + (1 - share) * others, share


class CutMix(Mixing):
    r"""CutMix: a box of each image is filled with the same box of another image; one box for a batch.

    The box has `1 - lambda` of the area, with `lambda ~ Beta(alpha, alpha)`, and its centre is anywhere in the image.
    It is cut off at the borders of the image; targets are mixed by the area that it really has.

    Args:
        alpha: > 0; the paper's is 1.

    Reference: S. Yun et al., CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features,
    ICCV 2019, arXiv 1905.04899.

    Example: `GeometryTrainer(..., data_collator=CutMix(alpha=1.0))`
    """

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__(alpha)

    def mix(self, images: Tensor, others: Tensor, drawn: tuple[float, float, float]) -> tuple[Tensor, float]:
        height, width = images.shape[-2:]
        side = math.sqrt(1 - drawn[0])
        (top, bottom), (left, right) = (
            _side(int(place * length), int(side * length), length)
            for place, length in zip(drawn[1:], (height, width), strict=True)
        )
        mixed = images.clone()
        mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
        return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _side(centre: int, size: int, length: int) -> tuple[int, int]:
    """Return start and end of a box's side, inside the image."""
    return max(centre - size // 2, 0), min(centre + size // 2, length)
