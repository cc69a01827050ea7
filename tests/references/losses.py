"""Every loss in its main variants: its value, its metrics, and the gradient of each field that it moves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_ncgeo.losses import (
    LDAM,
    BalancedSoftmax,
    ClusterCollapse,
    CrossEntropy,
    GeometricDebiasing,
    GeometryBatch,
    LanguageCollapse,
    LogitAdjustment,
    ModalityIsomorphism,
    OTPreservation,
    PointwisePreservation,
    PrototypeImageContrast,
    PrototypeSupCon,
    Regularizer,
    RotationStabilization,
    SpaceAlignment,
)

from .numbers import CLASSES, DIM, LABELS, summary, wave

TEMPLATES = 3
TRAINED = ("image_features", "text_features", "logits", "template_features", "classifier_weight", "class_means")
# which k-means finds whatever it starts from
TWO_CLUSTERS = 0.3 * wave(CLASSES, DIM) + torch.eye(DIM, dtype=torch.float64)[torch.tensor([0, 3, 0, 3, 0])]


def batch(phase: float = 0.0) -> GeometryBatch:
    """Every field that a loss may ask for. Tuned features have drifted so far that transport crosses samples."""

    def draw(*shape: int, at: float, scale: float = 1.0) -> Tensor:
        return scale * wave(*shape, phase=phase + at)

    images, texts = draw(len(LABELS), DIM, at=1.0), draw(CLASSES, DIM, at=2.0)
    templates = draw(CLASSES, TEMPLATES, DIM, at=3.0)
    means = draw(CLASSES, DIM, at=4.0)
    means[3] = torch.nan  # not seen yet
    made = GeometryBatch(
        image_features=images + draw(len(LABELS), DIM, at=5.0, scale=0.8),
        text_features=texts + draw(CLASSES, DIM, at=6.0, scale=0.8),
        labels=torch.tensor(LABELS),
        logits=draw(len(LABELS), CLASSES, at=7.0, scale=3.0),
        logit_scale=torch.tensor(2.0, dtype=torch.float64),
        frozen_image_features=images,
        frozen_text_features=texts,
        template_features=templates + draw(CLASSES, TEMPLATES, DIM, at=8.0, scale=0.3),
        classifier_weight=draw(CLASSES, DIM, at=9.0),
        class_means=means,
        class_counts=torch.tensor([40, 20, 10, 5, 1]),
        progress=0.9,
    )
    return replace(made, **{name: getattr(made, name).requires_grad_() for name in TRAINED})


Case = tuple[str, Callable[[], Any], dict[str, Any]]  # name, what makes the loss, fields that differ from the batch's


def _cases() -> Iterator[Case]:
    def case(variant: str, make: Callable[..., Any], **arguments: Any) -> Case:
        return f"{make.__name__}({variant})", lambda: make(**arguments), {}

    for modality in ("joint", "image", "text", "separate"):
        for solver in ("exact", "entropic"):
            yield case(f"{modality}, {solver}", OTPreservation, weight=1.0, modality=modality, solver=solver)
    yield case("joint, epsilon 0.5", OTPreservation, weight=1.0, solver="entropic", epsilon=0.5)
    for solver in ("exact", "entropic"):
        yield case(f"joint, {solver}, memory 12", OTPreservation, weight=1.0, solver=solver, memory_size=12)
    yield case("separate, exact, memory 4", OTPreservation, weight=1.0, modality="separate", memory_size=4)
    yield case("published", PointwisePreservation, weight=1.0)
    yield case("mean", PointwisePreservation, weight=1.0, kl_reduction="mean")
    for part in ("text", "image", "prediction"):
        others = {f"{name}_weight": 0.0 for name in ("text", "image", "prediction") if name != part}
        yield case(part, PointwisePreservation, weight=1.0, **others)
    yield case("", RotationStabilization, weight=1.0)
    yield case("", LanguageCollapse, weight=1.0)
    for anchor in (False, True):
        yield case(f"anchor {anchor}", GeometricDebiasing, weight=1.0, anchor=anchor)
    yield case("mean", ModalityIsomorphism, weight=1.0)
    yield case("sinkhorn", ModalityIsomorphism, weight=1.0, method="sinkhorn")
    yield case("sinkhorn, epsilon 0.5", ModalityIsomorphism, weight=1.0, method="sinkhorn", epsilon=0.5)
    for reduction in ("mean", "sum"):
        yield case(f"default clusters, {reduction}", ClusterCollapse, weight=1.0, reduction=reduction)
        name, make, _ = case(
            f"2 clusters, {reduction}", ClusterCollapse, weight=1, num_clusters=2, reduction=reduction
        )
        yield name, make, {"frozen_text_features": TWO_CLUSTERS}
    for detach in (True, False):
        for center in (True, False):
            arguments = {"detach_means": detach, "center": center}
            yield case(f"detach {detach}, center {center}", SpaceAlignment, weight=1.0, **arguments)
    without_head = {"classifier_weight": None}
    yield "SpaceAlignment(texts)", lambda: SpaceAlignment(weight=1.0), without_head
    for copies in (0, 0.5, 100):
        prototypes = wave(CLASSES, DIM, phase=10.0)
        arguments = {"prototypes": prototypes, "copies": copies, "temperature": 0.2}
        yield case(f"fixed, {copies} copies", PrototypeSupCon, **arguments)
    yield case("of the head", PrototypeSupCon, copies=10, temperature=1.0)
    yield case("default", PrototypeImageContrast)
    yield case("temperature 0.5", PrototypeImageContrast, temperature=0.5)
    yield case("", CrossEntropy)
    yield case("", BalancedSoftmax)
    yield case("tau 1", LogitAdjustment)
    yield case("tau 0.5", LogitAdjustment, tau=0.5)
    yield case("default", LDAM)
    yield case("margin 0.3, scale 4", LDAM, max_margin=0.3, scale=4.0)
    yield case("re-weighted", LDAM, reweight_after=0.8)
    yield case("not re-weighted yet", LDAM, reweight_after=0.95)
    yield case("re-weighted, beta 0.9", LDAM, reweight_after=0.8, beta=0.9)
    yield "LDAM(linear head)", LDAM, {"logit_scale": None}


def _measured(loss: nn.Module, own: dict[str, Any]) -> Iterator[tuple[str, list[float]]]:
    """The value on a second batch: some terms remember the first."""
    loss(replace(batch(phase=0.3), **own))
    seen = replace(batch(), **own)
    value = loss(seen)
    value.backward()
    yield "value", summary(value)
    for field in fields(seen):
        tensor = getattr(seen, field.name)
        if isinstance(tensor, Tensor) and tensor.grad is not None:
            yield f"gradient of {field.name}", summary(tensor.grad)
    for name, metric in getattr(loss, "metrics", {}).items():
        yield name, summary(metric)
    if isinstance(loss, Regularizer) and not loss.constrained(value).equal(value):
        yield "constrained", summary(loss.constrained(value))


def _budgets() -> Iterator[tuple[str, list[float]]]:
    """Dual ascent: the multiplier after values above, far above and below the budget."""
    for name, arguments in {"default": {}, "step 0.1, at most 0.5": {"step_size": 0.1, "max_step": 0.5}}.items():
        loss = Regularizer(budget=0.05, **arguments)
        for step, value in enumerate((0.08, 0.5, 0.01), start=1):
            loss.update(value)
            yield f"Regularizer(budget, {name})/multiplier after {step} steps", summary(loss.multiplier)


def losses() -> dict[str, list[float]]:
    """Everything of this file by its name, `losses/<loss>(<variant>)/<what>`."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what a tiny batch cannot do
        for name, make, own in _cases():
            found |= {f"losses/{name}/{what}": numbers for what, numbers in _measured(make(), own)}
        found |= {f"losses/{name}": numbers for name, numbers in _budgets()}
    return found
