"""Prompt-OT: keep the features near the frozen model's by optimal transport."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..geometry.sphere import unit
from ..geometry.transport import half_squared_distances, identity_share, transport_plan
from .base import GeometryBatch, Regularizer

_MODALITIES = ("joint", "image", "text")


class OTPreservation(Regularizer):
    r"""Transport cost between the batch's features and the frozen model's.

    Each sample is a pair: `u_i = [f_i; g_{y_i}]` of the tuned model and `v_j = [f0_j; g0_{y_j}]` of the frozen one,
    each half normalised (modality "image" or "text" keeps one half).

    .. math:: L = \sum_{ij} P_{ij} C_{ij}, \quad C_{ij} = \tfrac12 \|u_i - v_j\|^2

    P is the optimal plan between uniform marginals, without gradient, so the gradient with respect to C is P. L is at
    most the point-wise cost `mean_i[(1 - cos(f_i, f0_i)) + (1 - cos(g_{y_i}, g0_{y_i}))]`, and equal to it where the
    plan is the identity, which it nearly always is in small batches: `ot_identity_share` is logged.

    | field | shape |
    |---|---|
    | image_features, frozen_image_features | (B, d) |
    | text_features, frozen_text_features | (K, d) |
    | labels | (B,) |

    Args:
        weight, budget, name, step_size, max_step: see [`Regularizer`]. The paper's weight is 10, at logit scale 100.
            "joint" ranges over 0..4 and a single modality over 0..2.
        modality: "joint", "image" or "text".
        solver: "exact".

    Raises:
        ValueError: unknown modality or solver; a field missing or not finite, named.

    Relations: with the identity plan and modality "image" or "text" this is the cosine form of PromptSRC's
    consistency terms.

    Reference: X. Chen et al., Prompt-OT: An Optimal Transport Regularization Paradigm for Knowledge Preservation in
    Vision-Language Model Adaptation, arXiv 2503.08906.

    Example: `GeometryTrainer(..., losses=[OTPreservation(budget=0.05)])`
    """

    default_name = "ot"

    def __init__(
        self,
        weight: float | Callable[[float], float] | None = None,
        budget: float | None = None,
        modality: str = "joint",
        solver: str = "exact",
        name: str | None = None,
        step_size: float = 0.3,
        max_step: float | None = None,
    ) -> None:
        super().__init__(weight, budget, name, step_size, max_step)
        if modality not in _MODALITIES:
            raise ValueError(f"modality={modality!r} must be one of {', '.join(_MODALITIES)}.")
        if solver != "exact":
            raise ValueError(f"solver={solver!r} must be 'exact'.")
        self.modality, self.solver = modality, solver
        self.halves = ("image", "text") if modality == "joint" else (modality,)
        self.requires = tuple(f"frozen_{half}_features" for half in self.halves)

    def forward(self, batch: GeometryBatch) -> Tensor:
        u, v = (
            torch.cat([self._half(batch, prefix + half) for half in self.halves], -1) for prefix in ("", "frozen_")
        )
        cost = half_squared_distances(u, v)
        plan = transport_plan(cost, self.solver)
        self.metrics = {f"{self.name}_identity_share": identity_share(plan, v)}
        return (plan * cost).sum()

    def _half(self, batch: GeometryBatch, kind: str) -> Tensor:
        features, labels = batch.need(f"{kind}_features", "labels")
        features = unit(features)
        return features[labels] if kind.endswith("text") else features
