"""Run a model with other modules at some places, while the model itself stays as it is for everybody else."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn


def substitute(model: nn.Module, modules: Mapping[str, nn.Module]) -> Any:
    """Return a model that differs from `model` at the places given, and shares everything else with it.

    The modules on the way to a place are copied, without what they hold: microseconds each, and no memory. Nothing is
    written on `model`, so other threads can run it meanwhile; weights are the same objects, so gradients arrive.

    Args:
        modules: dotted path in `model` -> what stands there. A module may hold the one that it stands for.
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
    """Return a module of its own that shares weights and children with `module`."""
    copy: Any = type(module).__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy._modules = dict(module._modules)
    forward = vars(module).get("forward")
    if isinstance(forward, partial) and "_old_forward" in vars(module):  # Accelerate's hook, bound to the original
        copy._old_forward = MethodType(type(module).forward, copy)
        copy.forward = partial(forward.func, copy)
    return copy


class Recorder(nn.Module):
    """Stands for a module in a [`substitute`] of a model, and keeps what enters and leaves it.

    One serves one pass.
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
        """Return the tensor under `entered` or `left`.

        Raises:
            ValueError: the model did not call the module, or called it more than once.
        """
        if self.calls != 1:
            raise ValueError(
                f"The model called its {type(self.module).__name__} {self.calls} times in a pass, so the feature "
                "there is not known; use a model that calls it once."
            )
        return getattr(self, what)
