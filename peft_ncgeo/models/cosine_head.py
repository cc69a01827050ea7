"""Classification head whose logits are scaled cosines."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CosineHead(nn.Module):
    r"""Head of features (B, d) that gives logits (B, K), in float32 or wider.

    .. math:: z_k = s \cos(f, w_k)

    The scale s is fixed. The rows of `weight` (K, d) may have any length. There is no bias.
    """

    bias = None

    def __init__(self, in_features: int, out_features: int, scale: float) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scale = in_features, out_features, scale
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            wide = torch.promote_types(torch.promote_types(features.dtype, self.weight.dtype), torch.float32)
            features, rows = F.normalize(features.to(wide), dim=-1), F.normalize(self.weight.to(wide), dim=-1)
            return self.scale * features @ rows.T

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scale={self.scale}"
