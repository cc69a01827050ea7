"""The geometry functions; those that losses are made of differentiate there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peft_ncgeo import geometry as g
from peft_ncgeo.geometry.alignment import project_gradient, rotate_towards_means, slerp_fraction
from peft_ncgeo.geometry.exponent import class_exponents, misaligned_exponent
from peft_ncgeo.geometry.simplex import clustered_etf_deviation, etf_deviation, etf_floor, welch_bound
from peft_ncgeo.geometry.transport import half_squared_distances

from .numbers import CLASSES, DIM, LABELS, summary, wave


def _made() -> Iterator[tuple[str, Tensor | float]]:
    labels = torch.tensor(LABELS)
    a, b, samples = wave(CLASSES, DIM), wave(CLASSES, DIM, phase=1.0), wave(len(LABELS), DIM, phase=2.0)
    yield "simplex_etf(5, 6)", g.simplex_etf(5, 6)
    yield "simplex_etf(4, 3)", g.simplex_etf(4, 3)
    yield "welch_bound(12, 4)", welch_bound(12, 4)
    yield "etf_floor(12, 4)", etf_floor(12, 4)
    yield "etf_deviation", etf_deviation(a)
    for reduction in ("mean", "sum"):
        yield (
            f"clustered_etf_deviation({reduction})",
            clustered_etf_deviation(a, torch.tensor([0, 1, 0, 2, 0]), reduction),
        )
    yield "gram_distance", g.gram_distance(a, wave(CLASSES, 4, phase=1.0))
    for strength in (0.25, 0.5):
        yield f"minority_margin(strength {strength})", g.minority_margin([40, 20, 10, 5, 2], DIM, strength)

    means, weights = a + 2 * g.simplex_etf(5, 6), g.simplex_etf(5, 6) + 0.2 * b
    bias = 0.05 * wave(CLASSES, phase=3.0)
    yield "class_exponents", class_exponents(means, weights, bias)
    yield "error_exponent", g.error_exponent(means, weights)
    yield "error_exponent(bias)", g.error_exponent(means, weights, bias)
    yield "optimal_exponent", g.optimal_exponent(means)
    yield "exponent_ratio", g.exponent_ratio(means, weights, bias)
    for rotation in ("orthogonal", "span"):
        yield f"misaligned_exponent({rotation})", misaligned_exponent(5, 0.3, rotation)

    collapse = g.NeuralCollapse(CLASSES, DIM)
    collapse.update(samples[:4] + 1, labels[:4]).update(samples[4:] + 1, labels[4:])  # class 3 is absent
    for centred in (True, False):
        found = collapse.compute(weights, bias, center_weights=centred)
        for name, value in found.items():
            yield f"NeuralCollapse(center_weights {centred})/{name}", value

    cost = half_squared_distances(a, samples)
    for solver, epsilon in (("exact", None), ("entropic", None), ("entropic", 0.5)):
        name = solver if epsilon is None else f"{solver}, epsilon {epsilon}"
        yield f"transport_plan({name})", g.transport_plan(cost, solver, epsilon)
        yield f"transport_cost({name})", g.transport_cost(cost, solver, epsilon)

    for fraction in (0.3, 1.0, 1.4):
        yield f"slerp({fraction})", g.slerp(a, b, fraction)
    yield "modality_gap", g.modality_gap(samples, a)
    for centred in (True, False):
        yield f"rotate_towards_means(center {centred})", rotate_towards_means(weights, a, 0.3, 0.4, centred)
        yield f"project_gradient(center {centred})", project_gradient(b, weights, a, center=centred)
    yield "slerp_fraction(100 of 400)", slerp_fraction(100, 400)

    yield "prototype_image_contrast", g.prototype_image_contrast(samples, a, labels)
    yield "prototype_cross_entropy", g.prototype_cross_entropy(samples, a, labels)
    yield "shared_head_gap_bound", g.shared_head_gap_bound(samples, a, wave(DIM, 4, phase=4.0))
    gaps, losses = g.loss_against_gap(samples, a, labels, (-1.0, 0.0, 1.0))
    yield "loss_against_gap/gaps", gaps
    yield "loss_against_gap/losses", losses


def geometry() -> dict[str, list[float]]:
    """Everything of this file by its name, `geometry/<function>(<variant>)`."""
    return {f"geometry/{name}": summary(value) for name, value in _made()}
