"""The work of the commands, one file each, imported when a command is given, since `--help` does not need it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arguments import words
    from .comparing import compare
    from .demonstrating import demo
    from .describing import describe
    from .evaluating import evaluate
    from .listing import recipes
    from .predicting import predict
    from .training import train

__all__ = ["compare", "demo", "describe", "evaluate", "predict", "recipes", "train", "words"]

_LAZY = {
    "compare": ".comparing",
    "demo": ".demonstrating",
    "describe": ".describing",
    "evaluate": ".evaluating",
    "predict": ".predicting",
    "recipes": ".listing",
    "train": ".training",
    "words": ".arguments",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
