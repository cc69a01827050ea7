"""A support set of a closed form, on which published numbers of the heads are known, and ways to draw others."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_ncgeo.classifiers.heads import Support

from .support import draw

SCALE = 10.0


def rows(n: int, d: int, s: int) -> Tensor:
    """`((k^2 + 3k + s) mod 13 - 6) / 6` for k = 0, 1, ..., as (n, d)."""
    k = torch.arange(n * d)
    return (((k**2 + 3 * k + s) % 13 - 6).double() / 6).reshape(n, d)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


FEATURES, LABELS = unit(rows(6, 4, 1)), torch.tensor([0, 0, 1, 1, 2, 2])
TEXTS, QUERIES, NEW_TEXTS = unit(rows(3, 4, 5)), unit(rows(2, 4, 9)), unit(rows(2, 4, 11))
SUPPORT = Support(FEATURES[None], LABELS, TEXTS, SCALE)


def drawn_support(views: int = 3, labels=(0, 1, 2, 2, 1, 0, 0, 2, 1, 1), classes: int = 3, dim: int = 6) -> Support:
    """Raw float64 features of unlike lengths around a centre a class."""
    labels = torch.tensor(labels)
    centres = 0.8 * draw(classes, dim, seed=1)
    features = (centres[labels] + draw(views, len(labels), dim, seed=2)) * (1 + draw(len(labels), 1, seed=3).abs())
    return Support(features, labels, centres + 2 * draw(classes, dim, seed=4), SCALE)
