"""Bottleneck adapter at the layer norm before a block's MLP."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..tuner_layer import TunerLayer


class AdaptFormerLayer(TunerLayer):
    """Wrapped layer norm before a block's MLP, which adds an adapter's term to its own input, the residual.

    The block computes `x + MLP(LN(x))`, and x is the tensor that enters this module. So a term that is added to x in
    place is added to the block's output, in every family, and not changed by layer scale or drop path. The norm and
    the adapter read x before the change. Each pass changes only its own x. PyTorch allows no full backward hook here.
    """

    # all on one level: PEFT removes the adapter's name only from keys of this depth
    adapter_layer_names: tuple[str, ...] = (
        "ncgeo_adaptformer_norm",
        "ncgeo_adaptformer_down",
        "ncgeo_adaptformer_up",
        "ncgeo_adaptformer_scale",
    )
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, width: int) -> None:
        super().__init__(base_layer)
        self.width = width
        self.ncgeo_adaptformer_norm = nn.ModuleDict()
        self.ncgeo_adaptformer_down = nn.ModuleDict()
        self.ncgeo_adaptformer_up = nn.ModuleDict()
        self.ncgeo_adaptformer_scale = nn.ParameterDict()

    def update_layer(self, adapter_name: str, bottleneck_dim: int, inference_mode: bool) -> None:
        """Add an adapter whose term is 0."""
        down, up = nn.Linear(self.width, bottleneck_dim), nn.Linear(bottleneck_dim, self.width)
        nn.init.kaiming_normal_(down.weight, a=math.sqrt(5))
        for start in (down.bias, up.weight, up.bias):
            nn.init.zeros_(start)
        self.ncgeo_adaptformer_norm[adapter_name] = nn.LayerNorm(self.width)
        self.ncgeo_adaptformer_down[adapter_name] = down
        self.ncgeo_adaptformer_up[adapter_name] = up
        self.ncgeo_adaptformer_scale[adapter_name] = nn.Parameter(torch.ones(1))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, residual: Tensor) -> Tensor:
        name = self.active_name
        if name is None:
            return self.base_layer(residual)
        before = residual.clone()
        residual.add_(self.term(before, name).to(residual.dtype))
        return self.base_layer(before)

    def term(self, residual: Tensor, name: str) -> Tensor:
        """Return the term that an adapter adds to the residual (B, L, d)."""
        scale = self.ncgeo_adaptformer_scale[name]
        hidden = self.ncgeo_adaptformer_norm[name](residual.to(scale.dtype))  # float32 for any base dtype
        hidden = F.relu(self.ncgeo_adaptformer_down[name](hidden))
        return scale * self.ncgeo_adaptformer_up[name](hidden)
