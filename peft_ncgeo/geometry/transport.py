"""Optimal transport between two sets of features. Every call to POT lives here."""

from __future__ import annotations

import numpy as np
import ot
import torch
from torch import Tensor


def half_squared_distances(u: Tensor, v: Tensor) -> Tensor:
    """Cost matrix `C_ij = 1/2 ||u_i - v_j||^2` of `u` (n, d) and `v` (m, d), shape (n, m), never negative."""
    with torch.autocast(u.device.type, enabled=False):
        dtype = torch.promote_types(u.dtype, torch.float32)  # bf16 costs are wrong by more than their differences
        u, v = u.to(dtype), v.to(dtype)
        squares = u.square().sum(-1)[:, None] + v.square().sum(-1)[None, :]
        return (0.5 * squares - u @ v.T).clamp_min(0)


def transport_plan(cost: Tensor, solver: str = "exact", epsilon: float | None = None) -> Tensor:
    """Optimal plan between uniform marginals, `min_P <P, C>` with rows summing to 1/n and columns to 1/m.

    Solved by the network simplex in float64; no gradient flows into the plan.

    Args:
        cost: (n, m), finite.
        solver: "exact".
        epsilon: reserved for entropic solvers; must be None here.

    Returns:
        Plan (n, m) in the dtype and on the device of `cost`, summing to 1.

    Raises:
        ValueError: cost is not a non-empty matrix or not finite, or the solver is unknown.

    Reference: R. Flamary et al., POT: Python Optimal Transport, JMLR 2021.
    """
    if solver != "exact" or epsilon is not None:
        raise ValueError(f"solver={solver!r} with epsilon={epsilon}: only 'exact' is offered, without epsilon.")
    if cost.dim() != 2 or 0 in cost.shape:
        raise ValueError(f"cost must be a matrix (n, m) with n, m >= 1, got shape {tuple(cost.shape)}.")
    values = cost.detach().double().cpu().numpy()
    if not np.isfinite(values).all():  # POT would return a plan, and a loss of 0, without a word
        raise ValueError("cost has non-finite entries.")
    n, m = values.shape
    plan = ot.emd(np.full(n, 1 / n), np.full(m, 1 / m), values)
    return torch.from_numpy(plan).to(cost)


def transport_cost(cost: Tensor, solver: str = "exact", epsilon: float | None = None) -> Tensor:
    """Transport value `<P, C>` of the optimal plan, a scalar whose gradient with respect to `cost` is the plan P."""
    return (transport_plan(cost, solver, epsilon) * cost).sum()


def identity_share(plan: Tensor, v: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Mass that a square plan (n, n) leaves where it was: `sum_ij P_ij [v_i == v_j]` with `v` (n, d) the targets.

    1 for the identity, also where several targets are equal (a repeated label's text).
    """
    rows, columns = plan.nonzero(as_tuple=True)
    same = (v[rows] - v[columns]).abs().amax(dim=-1) <= tolerance
    return (plan[rows, columns] * same).sum()
