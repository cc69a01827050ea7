"""Export by torch, where it can export Transformers' own model of the same class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from .conftest import pixels


def export(model: nn.Module, own: nn.Module, *args: Any, **options: Any) -> Any:
    """The exported module of `model`; skips the test if this torch cannot export `own`, a plain model."""
    try:
        torch.export.export(own, (pixels(3),))
    except torch._dynamo.exc.Unsupported:
        pytest.skip(f"torch {torch.__version__} cannot export Transformers' own {type(own).__name__}")
    return torch.export.export(model, *args, **options).module()
