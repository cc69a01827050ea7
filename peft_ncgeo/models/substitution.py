"""Copies of a model with some modules replaced; the model itself does not change."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn


def substitute(model: nn.Module, modules: Mapping[str, nn.Module]) -> Any:
    """Return a copy of `model` with some modules replaced; the copy shares everything else with it.

    The parents of a replaced module are copied without their weights, which takes microseconds and no memory. `model`
    is not changed, so other threads can run it at the same time. Weights are the same objects, so gradients reach
    them.

    Args:
        modules: dotted path in `model` -> replacement. A replacement may hold the module that it replaces.
    """
    view = shallow_copy(model)
    copies = {"": view}
    for path, module in modules.items():
        *parents, last = path.split(".")
        owner, place = view, ""
        for name in parents:
            place = f"{place}.{name}" if place else name
            if place not in copies:
                copies[place] = shallow_copy(owner.get_submodule(name))
                owner._modules[name] = copies[place]
            owner = copies[place]
        owner._modules[last] = module
    return view


def shallow_copy(module: nn.Module) -> Any:
    """Return a new module that shares weights and children with `module`."""
    copy: Any = type(module).__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy._modules = dict(module._modules)
    forward = vars(module).get("forward")
    if isinstance(forward, partial) and "_old_forward" in vars(module):  # Accelerate's hook, bound to the original
        copy._old_forward = MethodType(type(module).forward, copy)
        copy.forward = partial(forward.func, copy)
    return copy


class Recorder(nn.Module):
    """Replacement for a module in [`substitute`] that records the module's input and output.

    Use a new one for each pass.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls = 0
        self.entered: Any = None
        self.left: Any = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.entered = args[0] if args else next(iter(kwargs.values()), None)
        self.left = self.module(*args, **kwargs)
        return self.left

    def only(self, what: str) -> Tensor:
        """Return the attribute `entered` or `left`.

        Raises:
            ValueError: the model did not call the module exactly once.
        """
        if self.calls != 1:
            raise ValueError(
                f"The model called its {type(self.module).__name__} {self.calls} times in a pass, so its feature is "
                "not known; use a model that calls it once."
            )
        return getattr(self, what)
