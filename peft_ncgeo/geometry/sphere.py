"""Features on the unit sphere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def unit(features: Tensor) -> Tensor:
    """Rows of `(..., d)` scaled to length 1, computed in float32 or wider whatever autocast says."""
    with torch.autocast(features.device.type, enabled=False):
        return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def cosine_logits(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's logits `s * cos(f_i, g_k)`, `s = exp(logit_scale)`: (B, d) and (K, d) to (B, K), in float32 or wider."""
    with torch.autocast(image.device.type, enabled=False):
        image, text = unit(image), unit(text)
        return logit_scale.to(image.dtype).exp() * image @ text.T


def modality_gap(a: Tensor, b: Tensor) -> Tensor:
    """Distance between the centres of two sets of features on the sphere, `||mean_i a^_i - mean_j b^_j||_2`.

    Args:
        a, b: raw features `(n, d)` and `(m, d)`, images and texts for instance; normalised here.

    Returns:
        A scalar in 0..2, in float32 or wider.

    Reference: W. Liang et al., Mind the Gap, NeurIPS 2022, arXiv 2203.02053.
    """
    return torch.linalg.vector_norm(unit(a).mean(0) - unit(b).mean(0))
