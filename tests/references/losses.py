"""Every loss in its main variants: its value, its metrics, and the gradient of each field that it moves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_ncgeo.losses import (
    LDAM,
    ClusterCollapse,
    GeometryBatch,
    LogitAdjustment,
    ModalityIsomorphism,
    OTPreservation,
    PointwisePreservation,
    PrototypeImageContrast,
    PrototypeSupCon,
    Regularizer,
    SpaceAlignment,
)

from ..cases import FORMULAS
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
        multi_hot=(draw(len(LABELS), CLASSES, at=12.0) > 0.3).long(),
        logits=draw(len(LABELS), CLASSES, at=7.0, scale=3.0),
        logit_scale=torch.tensor(2.0, dtype=torch.float64),
        frozen_image_features=images,
        frozen_text_features=texts,
        teacher_logits=draw(len(LABELS), CLASSES, at=11.0, scale=3.0),
        template_features=templates + draw(CLASSES, TEMPLATES, DIM, at=8.0, scale=0.3),
        classifier_weight=draw(CLASSES, DIM, at=9.0),
        class_means=means,
        class_counts=torch.tensor([40, 20, 10, 5, 1]),
        progress=0.9,
    )
    return replace(made, **{name: getattr(made, name).requires_grad_() for name in TRAINED})


# Fields that differ from the batch's.
OWN: dict[str, dict[str, Any]] = {
    "ClusterCollapse(2 clusters, mean)": {"frozen_text_features": TWO_CLUSTERS},
    "ClusterCollapse(2 clusters, sum)": {"frozen_text_features": TWO_CLUSTERS},
    "SpaceAlignment(texts)": {"classifier_weight": None},
    "LDAM(linear head)": {"logit_scale": None},
}


def _settings() -> Iterator[tuple[str, type[nn.Module], dict[str, Any]]]:
    """Settings of the losses beside those of `cases.py`: how they differ, the class and its arguments."""
    for modality in ("joint", "image", "text", "separate"):
        for solver in ("exact", "entropic"):
            yield f"{modality}, {solver}", OTPreservation, {"modality": modality, "solver": solver}
    for solver in ("exact", "entropic"):
        yield f"joint, {solver}, memory 12", OTPreservation, {"solver": solver, "memory_size": 12}
    yield "separate, exact, memory 4", OTPreservation, {"modality": "separate", "memory_size": 4}
    for part in ("text", "image", "prediction"):
        others = {f"{name}_weight": 0.0 for name in ("text", "image", "prediction") if name != part}
        yield part, PointwisePreservation, others
    yield "sinkhorn", ModalityIsomorphism, {"method": "sinkhorn"}
    yield "default clusters, sum", ClusterCollapse, {"reduction": "sum"}
    yield "2 clusters, mean", ClusterCollapse, {"num_clusters": 2, "reduction": "mean"}
    yield "detach True, center False", SpaceAlignment, {"center": False}
    yield "detach False, center True", SpaceAlignment, {"detach_means": False}
    yield "texts", SpaceAlignment, {}
    for copies in (0, 0.5, 100):
        arguments = {"prototypes": wave(CLASSES, DIM, phase=10.0), "copies": copies, "temperature": 0.2}
        yield f"fixed, {copies} copies", PrototypeSupCon, arguments
    yield "temperature 0.5", PrototypeImageContrast, {"temperature": 0.5}
    yield "tau 1", LogitAdjustment, {}
    yield "default", LDAM, {}
    yield "not re-weighted yet", LDAM, {"reweight_after": 0.95}
    yield "re-weighted, beta 0.9", LDAM, {"reweight_after": 0.8, "beta": 0.9}
    yield "linear head", LDAM, {}


def _cases() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    yield from FORMULAS.items()
    for variant, cls, arguments in _settings():
        weight = {"weight": 1.0} if issubclass(cls, Regularizer) else {}
        yield f"{cls.__name__}({variant})", partial(cls, **weight, **arguments)


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
        for name, make in _cases():
            measured = _measured(make(), OWN.get(name, {}))
            found |= {f"losses/{name}/{what}": numbers for what, numbers in measured}
        found |= {f"losses/{name}": numbers for name, numbers in _budgets()}
    return found
