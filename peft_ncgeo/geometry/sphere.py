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
