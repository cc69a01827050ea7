"""Linear heads for images and prototypes, and class prototypes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_labels
from .sphere import l2_normalize


class Heads(NamedTuple):
    """Heads Theta_I for images and Theta_P for prototypes, each (..., d, d); a shared head is in both fields."""

    image: Tensor
    prototype: Tensor

    @classmethod
    def identity(cls, features: Tensor, shared: bool = False) -> Heads:
        """Return identity heads for features (..., N, d), one pair for each leading index."""
        shape = (*features.shape[:-2], features.shape[-1], features.shape[-1])
        image = torch.eye(shape[-1], dtype=features.dtype, device=features.device).expand(shape).clone()
        return cls(image, image if shared else image.clone())

    def embed(self, features: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
        """Return `e = unit(x Theta_I)` (..., N, d) and `p = unit(P Theta_P)` (..., K, d)."""
        return l2_normalize(features @ self.image), l2_normalize(prototypes @ self.prototype)

    def scores(self, features: Tensor, prototypes: Tensor) -> Tensor:
        """Return `cos(x Theta_I, P_c Theta_P)` (..., N, K); the largest score gives the predicted class."""
        e, p = self.embed(features, prototypes)
        return e @ p.mT


def class_prototypes(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return the mean feature of every class: features (..., N, d) and labels (..., N) to (..., K, d).

    Labels of -1 are padding. The prototype of a class without samples is 0. Sums are formed in float32 or wider.

    Raises:
        ValueError: a label is outside -1..K-1.
    """
    check_labels(labels, num_classes, lowest=-1)
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    members = (labels[..., None] == torch.arange(num_classes, device=labels.device)).to(wide)
    return (members.mT @ wide / members.sum(-2).clamp_min(1)[..., None]).to(features.dtype)
