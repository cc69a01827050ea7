"""Models with prototypes, for the tests of the method."""

from __future__ import annotations

import torch
from peft import get_peft_model

from ..cases import PROMPTS, prototypes
from ..conftest import pixels, tiny_vit_classifier


def points(classes: int = 5, dim: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(classes, dim, generator=torch.Generator().manual_seed(seed))


def adapted(config=None, base=None, seed: int = 1):
    """A model far from its start."""
    torch.manual_seed(seed)
    model = get_peft_model(base or tiny_vit_classifier(), config or prototypes(**PROMPTS))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def logits(model) -> torch.Tensor:
    return model(pixel_values=pixels()).logits
