"""Every loss and its gradients: float32 on the device against float64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial

import torch
from torch import Tensor, nn

from peft_ncgeo import losses
from peft_ncgeo.losses import GeometryBatch, OTPreservation, Regularizer

from .rows import Row, limited

# Settings of losses that are not checked with their defaults and weight 1
SETTINGS: dict[str, Callable[[], nn.Module]] = {
    "LogitAdjustment": partial(losses.LogitAdjustment, tau=0.5),
    "LDAM": partial(losses.LDAM, max_margin=0.3, scale=4.0, reweight_after=0.8),
    "MultiLabelLoss": losses.MultiLabelLoss,
    "MultiLabelLoss, asymmetric": partial(losses.MultiLabelLoss, asymmetric=True),
    "OTPreservation, exact": partial(OTPreservation, weight=1.0),
    "OTPreservation, entropic": partial(OTPreservation, weight=1.0, solver="entropic", epsilon=0.5),
    "Distillation": partial(losses.Distillation, weight=1.0, temperature=2.0),
    "ClusterCollapse": partial(losses.ClusterCollapse, weight=1.0, num_clusters=2),
    "GeometricDebiasing": partial(losses.GeometricDebiasing, weight=1.0, anchor=True),
    "ModalityIsomorphism, mean": partial(losses.ModalityIsomorphism, weight=1.0),
    "ModalityIsomorphism, sinkhorn": partial(losses.ModalityIsomorphism, weight=1.0, method="sinkhorn", epsilon=0.5),
    "SpaceAlignment": partial(losses.SpaceAlignment, weight=1.0, detach_means=False),
    "PrototypeSupCon": partial(losses.PrototypeSupCon, copies=10, temperature=1.0),
}
LOSS_LIMIT = 1e-4  # of the largest entry


def check_losses(device: torch.device) -> Iterator[Row]:
    """Compare each loss and its gradients in float32 on the device with float64 on the CPU."""
    for name, make in (default_settings() | SETTINGS).items():
        exact = value_and_gradients(make, torch.device("cpu"), torch.float64)
        found = value_and_gradients(make, device, torch.float32)
        worst = max(share(found[key], exact[key]) for key in exact) if found.keys() == exact.keys() else float("inf")
        yield limited(f"loss and gradients: {name}", worst, LOSS_LIMIT, "of the largest entry")


def default_settings() -> dict[str, Callable[[], nn.Module]]:
    """Return the losses without settings of their own above, with their defaults and weight 1."""
    others = {"GeometryBatch", "Regularizer"} | {name.split(",")[0] for name in SETTINGS}
    found = {name: getattr(losses, name) for name in losses.__all__ if name not in others}
    return {n: partial(loss, weight=1.0) if issubclass(loss, Regularizer) else loss for n, loss in found.items()}


def value_and_gradients(make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    batch, loss = random_batch(device, dtype), make().to(device)
    value = loss(batch)
    value.backward()
    given = {field.name: getattr(batch, field.name) for field in fields(batch)}
    found = {name: x.grad for name, x in given.items() if isinstance(x, Tensor) and x.grad is not None}
    return {key: x.detach().cpu().double() for key, x in {"value": value, **found}.items()}


def random_batch(device: torch.device, dtype: torch.dtype) -> GeometryBatch:
    """Return a batch of 12 images, 5 classes, 3 templates and 16 dimensions with every field that a loss may read."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    images, texts, means = draw(12, 16), draw(5, 16), draw(5, 16)
    means[3] = torch.nan  # not seen yet
    trained = {
        "image_features": images + 0.8 * draw(12, 16),
        "text_features": texts + 0.8 * draw(5, 16),
        "logits": 3 * draw(12, 5),
        "template_features": texts[:, None] + 0.3 * draw(5, 3, 16),
        "classifier_weight": draw(5, 16),
        "class_means": means,
    }
    fixed = {
        "logit_scale": torch.tensor(2.0, dtype=torch.float64),
        "frozen_image_features": images,
        "frozen_text_features": texts,
        "teacher_logits": 3 * draw(12, 5),
    }
    return GeometryBatch(
        **{name: value.to(device, dtype).requires_grad_() for name, value in trained.items()},
        **{name: value.to(device, dtype) for name, value in fixed.items()},
        labels=(torch.arange(12) % 5).to(device),
        multi_hot=(torch.arange(60).view(12, 5) % 4 == 0).long().to(device),
        class_counts=torch.tensor([40, 20, 10, 5, 1], device=device),
        progress=0.9,
    )


def share(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest entry."""
    largest = expected.nan_to_num().abs().amax()
    return float((found - expected).nan_to_num().abs().amax() / largest.clamp_min(1e-3))
