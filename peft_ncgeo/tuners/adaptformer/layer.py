"""Bottleneck adapter at the layer norm before a block's MLP."""

from __future__ import annotations

import copy
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
        return self.base_layer(residual) if name is None else add_term(self.base_layer, residual, *self._parts(name))

    def term(self, residual: Tensor, name: str) -> Tensor:
        """Return the term that an adapter adds to the residual (B, L, d)."""
        return bottleneck(residual, *self._parts(name))

    def without_peft(self) -> nn.Module:
        """Return a copy of the layer in its current state, as a module that PEFT and optimisers do not change."""
        name = self.active_name
        return self.base_layer if name is None else AdaptedNorm(self.base_layer, *copy.deepcopy(self._parts(name)))

    def _parts(self, name: str) -> tuple[nn.Module, nn.Module, nn.Module, Tensor]:
        return (
            self.ncgeo_adaptformer_norm[name],
            self.ncgeo_adaptformer_down[name],
            self.ncgeo_adaptformer_up[name],
            self.ncgeo_adaptformer_scale[name],
        )


class AdaptedNorm(nn.Module):
    """Layer norm before a block's MLP with one adapter that is no longer trained; see [`AdaptFormerLayer`]."""

    scale: Tensor

    def __init__(self, base_layer: nn.Module, norm: nn.Module, down: nn.Module, up: nn.Module, scale: Tensor) -> None:
        super().__init__()
        self.base_layer, self.norm, self.down, self.up = base_layer, norm, down, up
        self.register_buffer("scale", scale.detach())
        for part in (norm, down, up):
            part.requires_grad_(False)

    def forward(self, residual: Tensor) -> Tensor:
        return add_term(self.base_layer, residual, self.norm, self.down, self.up, self.scale)


def bottleneck(residual: Tensor, norm: nn.Module, down: nn.Module, up: nn.Module, scale: Tensor) -> Tensor:
    """Return `s W_2 ReLU(W_1 LN_a(x) + b_1) + s b_2` (B, L, d), in float32 for any base dtype."""
    hidden = F.relu(down(norm(residual.to(scale.dtype))))
    return scale * up(hidden)


def add_term(
    base_layer: nn.Module, residual: Tensor, norm: nn.Module, down: nn.Module, up: nn.Module, scale: Tensor
) -> Tensor:
    """Add an adapter's term to the residual (B, L, d) in place, and return the base layer norm of the old one."""
    before = residual.clone()
    residual.add_(bottleneck(before, norm, down, up, scale).to(residual.dtype))
    return base_layer(before)
