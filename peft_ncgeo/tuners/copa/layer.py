"""Heads after a model's pooled feature, and residual maps inside the model."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from ...models.substitution import shallow_copy
from ...models.towers import channels_last
from ..tuner_layer import TunerLayer

RESIDUAL_START = 1e-4  # times the identity, as in TSA


class CoPALayer(TunerLayer):
    """Wrapped pooling module with Theta_I and Theta_P; Theta_I transforms its output while an adapter is active."""

    adapter_layer_names: tuple[str, ...] = ("ncgeo_copa_image_head", "ncgeo_copa_prototype_head")
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, width: int) -> None:
        super().__init__(base_layer)
        self.width = width
        self.ncgeo_copa_image_head = nn.ParameterDict()
        self.ncgeo_copa_prototype_head = nn.ParameterDict()

    def update_layer(self, adapter_name: str, shared: bool, device: torch.device | None, inference_mode: bool) -> None:
        """Add an adapter whose heads are the identity; if they are shared, only the image head exists."""
        self.ncgeo_copa_image_head[adapter_name] = nn.Parameter(torch.eye(self.width))
        if not shared:
            self.ncgeo_copa_prototype_head[adapter_name] = nn.Parameter(torch.eye(self.width))
        self._move_adapter_to_device_of_base_layer(adapter_name, device)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @property
    def heads(self) -> tuple[nn.Parameter, nn.Parameter] | None:
        """Heads Theta_I and Theta_P (d, d) of the active adapter, the same object if shared; or None."""
        name = self.active_name
        if name is None:
            return None
        image = self.ncgeo_copa_image_head[name]
        return image, self.ncgeo_copa_prototype_head.get(name, image)

    @torch.no_grad()
    def set_heads(self, image: Tensor, prototype: Tensor) -> None:
        """Copy trained heads into the active adapter; for a shared head, both must be equal."""
        for mine, given in zip(self.heads or (), (image, prototype), strict=True):
            mine.copy_(given)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.transform(self.base_layer(*args, **kwargs))

    def transform(self, features: Tensor) -> Tensor:
        """Return features times Theta_I, or unchanged if no adapter is active."""
        if self.heads is None:
            return features
        image = self.heads[0]
        rows = channels_last(features, self.width)
        return (rows.to(image.dtype) @ image).to(features.dtype).view(features.shape)


class CoPAInputLayer(CoPALayer):
    """Wrapped module whose input is the pooled feature: while an adapter is active, Theta_I transforms this input."""

    def forward(self, features: Tensor) -> Any:
        return self.base_layer(self.transform(features))


class Residual(TunerLayer):
    """Wrapped module f with a residual map A, used while an adapter is active: `f(h) + h A`."""

    adapter_layer_names: tuple[str, ...] = ("ncgeo_copa_residual",)
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.ncgeo_copa_residual = nn.ParameterDict()

    def start(self) -> Tensor:
        """Return the initial map."""
        raise NotImplementedError

    def add(self, hidden_states: Tensor, weight: Tensor) -> Tensor:
        """Return the term that the map adds to the output."""
        raise NotImplementedError

    def update_layer(self, adapter_name: str, device: torch.device | None, inference_mode: bool) -> None:
        """Add an adapter with the initial map."""
        self.ncgeo_copa_residual[adapter_name] = nn.Parameter(self.start())
        self._move_adapter_to_device_of_base_layer(adapter_name, device)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @property
    def weight(self) -> nn.Parameter:
        """Map of the active adapter."""
        assert self.active_name is not None
        return self.ncgeo_copa_residual[self.active_name]

    @torch.no_grad()
    def restart(self) -> None:
        """Reset the active adapter's map to its initial value."""
        self.weight.copy_(self.start())

    def with_weight(self, weight: Tensor | None) -> Residual:
        """Return a copy that wraps the same module with this weight as its active map; None: without an active map."""
        copy: Residual = shallow_copy(self)
        copy._disable_adapters, copy._active_adapter = False, []
        if weight is not None:
            copy._active_adapter = ["own"]
            copy._modules["ncgeo_copa_residual"] = nn.ParameterDict({"own": nn.Parameter(weight, False)})
        return copy

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(hidden_states, *args, **kwargs)
        if self.active_name is None:
            return output
        weight = self.weight
        first = output[0] if isinstance(output, tuple) else output
        first = first + self.add(hidden_states.to(weight.dtype), weight).to(first.dtype)
        return (first, *output[1:]) if isinstance(output, tuple) else first


class ResidualLinear(Residual):
    """Linear residual map (d, d) of a transformer's attention or MLP."""

    def __init__(self, base_layer: nn.Module, width: int) -> None:
        super().__init__(base_layer)
        self.width = width

    def start(self) -> Tensor:
        return RESIDUAL_START * torch.eye(self.width)

    def add(self, hidden_states: Tensor, weight: Tensor) -> Tensor:
        return hidden_states @ weight


class ResidualConvolution(Residual):
    """Residual 1x1 convolution (out, in, 1, 1) with the stride of the wrapped convolution."""

    @property
    def convolution(self) -> Any:
        """Convolution of the base model, inside adapters of other kinds."""
        inner: Any = self.base_layer
        return inner.get_base_layer() if isinstance(inner, BaseTunerLayer) else inner

    def start(self) -> Tensor:
        return RESIDUAL_START * torch.eye(self.convolution.out_channels, self.convolution.in_channels)[..., None, None]

    def add(self, hidden_states: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(hidden_states, weight, stride=self.convolution.stride)
