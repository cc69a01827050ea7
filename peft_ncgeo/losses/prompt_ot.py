"""Loss of Prompt-OT: optimal transport keeps the features near those of the frozen model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..geometry.sphere import l2_normalize
from ..geometry.transport import check_solver, half_squared_distances, identity_share, transport_plan
from ..validation import check_int
from .base import GeometryBatch, Regularizer, class_indices

# modality -> transport problems, each with the halves of a pair that it joins
_PROBLEMS = {
    "joint": (("image", "text"),),
    "image": (("image",),),
    "text": (("text",),),
    "separate": (("image",), ("text",)),
}


class OTPreservation(Regularizer):
    r"""Transport cost between the batch's features and those of the frozen model.

    Each sample has a pair of features, `u_i = [f_i; g_{y_i}]` of the tuned model and `v_j = [f0_j; g0_{y_j}]` of the
    frozen one; each half of a pair is normalised. Modality "image" or "text" keeps one half; "separate" adds the
    values of both.

    .. math:: L = \sum_{ij} P_{ij} C_{ij}, \quad C_{ij} = \tfrac12 \|u_i - v_j\|^2

    P is the plan between uniform marginals, without gradient, so the gradient with respect to C is P. With the exact
    plan, L is at most the point-wise cost `mean_i[(1 - cos(f_i, f0_i)) + (1 - cos(g_{y_i}, g0_{y_i}))]`. It equals
    this cost if the plan is the identity, as is almost always the case in small batches; the share of mass that does
    not move is logged as `ot_identity_share`. There are two ways to transport across samples:

    - `solver="entropic"` spreads the plan. The value is above 0 even if the features did not change: the same value
      with u replaced by v is logged as `ot_floor`, and a budget limits only the excess over it.
    - `memory_size=M` appends the last M pairs, detached, to rows and columns. The value is
      `(B + M)/B sum_{i <= B} sum_j P_ij C_ij` over the rows of the batch; it is 0 if the features did not change.

    | field | shape |
    |---|---|
    | image_features, frozen_image_features | (B, d) |
    | text_features, frozen_text_features | (K, d) |
    | labels | (B,); not read for modality "image" |

    Args:
        weight, budget, name, step_size, max_step: see [`Regularizer`]. The paper's weight is 10, at logit scale 100.
            The value is in 0..4 for "joint" and "separate", and in 0..2 for a single modality.
        modality: "joint", "image", "text" or "separate".
        solver: "exact" or "entropic".
        epsilon: strength of the entropy relative to the mean cost, for "entropic" only. Default 0.1.
        memory_size: number of earlier pairs to keep, 0 for none. Checkpoints hold them.

    Raises:
        ValueError: modality or solver is unknown, epsilon or memory_size is out of range, or a field is missing or not
            finite; the message names it.

    Relations: with the identity plan and modality "image" or "text" this is the cosine form of PromptSRC's
    consistency terms.

    Reference: X. Chen et al., Prompt-OT: An Optimal Transport Regularization Paradigm for Knowledge Preservation in
    Vision-Language Model Adaptation, arXiv 2503.08906. Entropy, memory and budget are ours.

    Example: `GeometryTrainer(..., losses=[OTPreservation(budget=0.05)])`
    """

    default_name = "ot"
    memory: Tensor

    def __init__(
        self,
        weight: float | Callable[[float], float] | None = None,
        budget: float | None = None,
        modality: str = "joint",
        solver: str = "exact",
        epsilon: float | None = None,
        memory_size: int = 0,
        name: str | None = None,
        step_size: float = 0.3,
        max_step: float | None = None,
    ) -> None:
        super().__init__(weight, budget, name, step_size, max_step)
        if modality not in _PROBLEMS:
            raise ValueError(f"modality={modality!r} must be one of {', '.join(_PROBLEMS)}.")
        check_solver(solver, epsilon)
        self.memory_size = check_int("memory_size", memory_size, least=0)
        self.modality, self.solver, self.epsilon = modality, solver, epsilon
        self.halves = ("image", "text") if modality == "separate" else _PROBLEMS[modality][0]
        self.requires = tuple(f"frozen_{half}_features" for half in self.halves)
        self.reads_labels = "text" in self.halves
        # (2, M', h, d): student and frozen, pairs, halves, width; empty at first
        self.register_buffer("memory", torch.empty(2, 0, len(self.halves), 0))
        self._floor = torch.zeros(())

    def forward(self, batch: GeometryBatch) -> Tensor:
        fields = [f"{who}{half}_features" for who in ("", "frozen_") for half in self.halves]
        features = batch.need(*fields, *(["labels"] if self.reads_labels else []))
        labels = class_indices(features.pop(), len(features[-1])) if self.reads_labels else None
        points = [
            l2_normalize(x)[labels] if "text" in field else l2_normalize(x)
            for field, x in zip(fields, features, strict=True)
        ]
        pairs = torch.stack(points, 1).unflatten(1, (2, -1)).transpose(0, 1)
        size = pairs.shape[1]
        remembered = self.memory.to(pairs) if self.memory.shape[1] else pairs[:, :0].detach()
        everything = torch.cat([pairs, remembered], dim=1)
        value = pairs.new_zeros(())
        floor, share = value.detach(), []
        for problem in _PROBLEMS[self.modality]:
            columns = [self.halves.index(half) for half in problem]
            u, v = everything[:, :, columns].flatten(2)
            part, plan = self._transport(u, v, size)
            value = value + part
            share.append(identity_share(plan[:size], v))
            if self.solver == "entropic":
                floor = floor + self._transport(v, v, size)[0]
        self._floor = floor
        self.metrics = {f"{self.name}_identity_share": torch.stack(share).mean()}
        if self.solver == "entropic":
            self.metrics[f"{self.name}_floor"] = floor
        if self.memory_size and self.training:
            self.memory = everything[:, : self.memory_size].detach()  # newest first, the oldest drop out
        return value

    def _transport(self, u: Tensor, v: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return the value over the first `size` rows, and the plan."""
        cost = half_squared_distances(u, v)
        plan = transport_plan(cost, self.solver, self.epsilon)
        return len(cost) / size * (plan[:size] * cost[:size]).sum(), plan

    def constrained(self, value: Tensor) -> Tensor:
        return value - self._floor
