"""Random batches for the tests of losses."""

from __future__ import annotations

import torch

from peft_ncgeo.losses import GeometryBatch

LABELS = (0, 2, 2, 1, 0, 2, 4)  # class 3 is absent, 1 and 4 have one sample


def random_batch(
    labels=LABELS, classes: int = 5, dim: int = 6, templates: int = 3, dtype=torch.float64, seed: int = 0
) -> GeometryBatch:
    """Every field that a loss may ask for; gradients reach all that the student makes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, grad: bool = False) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_(grad)

    b = len(labels)
    return GeometryBatch(
        image_features=draw(b, dim, grad=True),
        text_features=draw(classes, dim, grad=True),
        labels=torch.tensor(labels),
        multi_hot=(torch.arange(b)[:, None] * torch.arange(1, classes + 1) % 3 == 0).long(),
        logits=draw(b, classes, grad=True),
        logit_scale=torch.tensor(2.0, dtype=dtype),
        frozen_image_features=draw(b, dim),
        frozen_text_features=draw(classes, dim),
        teacher_logits=draw(b, classes),
        template_features=draw(classes, templates, dim, grad=True),
        classifier_weight=draw(classes, dim, grad=True),
        class_means=draw(classes, dim, grad=True),
        class_counts=torch.tensor([40, 20, 10, 5, 2, 1, 1, 1][:classes]),
        progress=0.9,
    )


def unit_rows(x):
    """Rows scaled to length 1, by hand."""
    return x / (x * x).sum(-1, keepdims=True) ** 0.5
