"""Features on the unit sphere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def unit(features: Tensor) -> Tensor:
    """Rows of `(..., d)` scaled to length 1, computed in float32 or wider whatever autocast says."""
    with torch.autocast(features.device.type, enabled=False):
        return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
