"""Optimal transport between two sets of features. Only this file calls POT."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ..validation import check_float
from .checks import check_shape

DEFAULT_EPSILON = 0.1

# When Sinkhorn's iterations stop, and how far the plan's marginals may then be off: of one problem relative to each
# marginal, of many small ones absolute.
_ITERATIONS, _TOLERANCE, _WORST_MARGINAL = 2000, 1e-5, 0.01
_BATCH_ITERATIONS, _BATCH_TOLERANCE, _WORST_BATCH_MARGINAL = 1000, 1e-6, 1e-3


def half_squared_distances(u: Tensor, v: Tensor) -> Tensor:
    """Return the costs (n, m) `C_ij = 1/2 ||u_i - v_j||^2`, never negative, of `u` (n, d) and `v` (m, d)."""
    with torch.autocast(u.device.type, enabled=False):
        dtype = torch.promote_types(u.dtype, torch.float32)  # errors of bf16 costs are larger than their differences
        u, v = u.to(dtype), v.to(dtype)
        squares = u.square().sum(-1)[:, None] + v.square().sum(-1)[None, :]
        return (0.5 * squares - u @ v.T).clamp_min(0)


def transport_plan(cost: Tensor, solver: str = "exact", epsilon: float | None = None) -> Tensor:
    """Return the optimal plan between uniform marginals: rows sum to 1/n, columns to 1/m; it has no gradient.

    "exact" is `min_P <P, C>` by the network simplex. "entropic" is `min_P <P, C> + eps sum_ij P_ij log P_ij` with
    `eps = epsilon * mean(C)`, by Sinkhorn's iterations in the log domain. Both are solved in float64.

    Args:
        cost: (n, m), finite; for "entropic" not negative.
        solver: "exact" or "entropic".
        epsilon: strength of the entropy relative to the mean cost; for "entropic" only, default 0.1.

    Returns:
        Plan (n, m) in float32 or wider, on the device of `cost`, summing to 1. If the mean cost is 0, the entropic
        plan is the product of the marginals.

    Raises:
        ValueError: cost is not a non-empty matrix, not finite, or negative for "entropic"; the solver is unknown or
            failed; epsilon is given for "exact", or is not a finite number above 0; or it is so small that the
            iterations did not reach the marginals.

    Reference: R. Flamary et al., POT: Python Optimal Transport, JMLR 2021.

    Example:

    >>> cost = torch.tensor([[3.0, 1.0], [1.0, 3.0]])
    >>> transport_plan(cost)
    tensor([[0.0000, 0.5000],
            [0.5000, 0.0000]])
    >>> transport_plan(cost, solver="entropic", epsilon=1.0)
    tensor([[0.1345, 0.3655],
            [0.3655, 0.1345]])
    """
    import ot  # here, since the import takes a second, and registration with PEFT does not need it

    check_solver(solver, epsilon)
    check_shape("cost", cost, "n", "m")
    values = cost.detach().double().cpu().numpy()
    if not np.isfinite(values).all():  # POT would silently return a plan with a loss of 0
        raise ValueError("cost has non-finite entries.")
    if solver == "entropic" and values.min() < 0:
        raise ValueError(f"cost must not be negative for solver='entropic', but has the entry {values.min():.3g}.")
    # scale costs to about 1, without rounding: POT starts from costs above 1, so costs of 1e-20 would be lost
    values = np.ldexp(values, -int(np.frexp(np.abs(values).max())[1]))
    n, m = values.shape
    a, b = np.full(n, 1 / n), np.full(m, 1 / m)
    if solver == "exact":
        with without_warnings():  # the log has them too
            plan, log = ot.emd(a, b, values, numItermax=10_000_000, log=True)
        if log["warning"]:
            raise ValueError(f"The exact solver failed on a cost of shape ({n}, {m}): {log['warning']}")
    elif values.mean() == 0:
        plan = np.outer(a, b)
    else:
        epsilon = DEFAULT_EPSILON if epsilon is None else epsilon
        reg = epsilon * float(values.mean())
        with without_warnings():  # about convergence; the marginals are checked below
            plan = ot.solve(values, a, b, reg=reg, max_iter=_ITERATIONS, tol=_TOLERANCE).plan
        error = max(np.abs(n * plan.sum(1) - 1).max(), np.abs(m * plan.sum(0) - 1).max())
        if not error < _WORST_MARGINAL:
            raise ValueError(
                f"epsilon={epsilon} is too small: after {_ITERATIONS} iterations the marginals are off by "
                f"{error:.1%}; use a larger epsilon or solver='exact'."
            )
    return torch.from_numpy(plan).to(cost.device, torch.promote_types(cost.dtype, torch.float32))


def check_solver(solver: str, epsilon: float | None) -> None:
    """Raise an error for an unknown solver, or an epsilon that is not above 0 or that the solver does not use."""
    if solver not in ("exact", "entropic"):
        raise ValueError(f"solver={solver!r} must be 'exact' or 'entropic'.")
    if epsilon is not None:
        wanted = "None, or a number greater than 0 with solver='entropic'"
        check_float("epsilon", epsilon, wanted, lambda value: solver == "entropic" and 0 < value < math.inf)


def transport_cost(cost: Tensor, solver: str = "exact", epsilon: float | None = None) -> Tensor:
    """Return the transport cost `<P, C>` of the plan, a scalar whose gradient with respect to `cost` is the plan P.

    For the exact plan this is the true gradient. The entropy is never part of the value. Arguments and errors
    are those of [`transport_plan`].

    Example:

    >>> cost = torch.tensor([[3.0, 1.0], [1.0, 3.0]], requires_grad=True)
    >>> transport_cost(cost).backward()
    >>> cost.grad
    tensor([[0.0000, 0.5000],
            [0.5000, 0.0000]])
    """
    return (transport_plan(cost, solver, epsilon) * cost).sum()


def class_transport_plans(cost: Tensor, a: Tensor, b: Tensor, epsilon: float | None = None) -> Tensor:
    """Return entropic plans of many small problems at once, each relative to its own mean cost, without gradient.

    Args:
        cost: (C, T, n), finite; padded where a marginal is 0.
        a: (C, T) and b: (C, n), marginals that sum to 1; 0 for padding.
        epsilon: strength of the entropy relative to each problem's mean cost over its unpadded pairs. Default 0.1.

    Returns:
        Plans (C, T, n) in the dtype and on the device of `cost`, 0 for padding. If a mean cost is 0, or one side has
        only one point, the plan is the product of the marginals.

    Raises:
        ValueError: cost is not finite, or epsilon is so small that the iterations did not reach the marginals.
    """
    import ot

    check_solver("entropic", epsilon)
    values, a, b = (tensor.detach().double().cpu() for tensor in (cost, a, b))
    if not torch.isfinite(values).all():
        raise ValueError("cost has non-finite entries.")
    plans = a[:, :, None] * b[:, None, :]
    pairs = plans > 0
    mean = (values * pairs).sum((1, 2)) / pairs.sum((1, 2))
    solved = (mean > 0) & ((a > 0).sum(1) > 1) & ((b > 0).sum(1) > 1)
    if solved.any():
        epsilon = DEFAULT_EPSILON if epsilon is None else epsilon
        scaled = (values * pairs)[solved] / mean[solved, None, None]
        stop = {"max_iter": _BATCH_ITERATIONS, "tol": _BATCH_TOLERANCE}
        found = ot.batch.solve_batch(scaled, epsilon, a=a[solved], b=b[solved], grad="detach", **stop).plan
        error = max((found.sum(2) - a[solved]).abs().max(), (found.sum(1) - b[solved]).abs().max())
        if not error < _WORST_BATCH_MARGINAL:
            raise ValueError(
                f"epsilon={epsilon} is too small: after {_BATCH_ITERATIONS} iterations the marginals are off by "
                f"{error:.1g}; use a larger epsilon."
            )
        plans[solved] = found
    return plans.to(cost)


def grouped_transport_plans(cost: Tensor, labels: Tensor, epsilon: float | None = None) -> tuple[Tensor, int]:
    """Return entropic plans between the points of each class and T other points, with one copy to the host.

    Args:
        cost: (B, T), finite: costs between each point and the T other points of its class.
        labels: (B,) int64.
        epsilon: see [`class_transport_plans`].

    Returns:
        Plans (B, T) in the dtype and on the device of `cost`, with uniform marginals (the rows of one class sum to 1),
        and the number of classes.

    Raises:
        ValueError: as in [`class_transport_plans`].
    """
    both = torch.cat([cost.detach().double(), labels[:, None]], dim=1).cpu()
    values, classes = both[:, :-1], both[:, -1].long()
    order = classes.argsort(stable=True)
    counts = classes[order].unique_consecutive(return_counts=True)[1]
    groups = torch.nn.utils.rnn.pad_sequence(order.split(counts.tolist()), batch_first=True)  # (C, n)
    held = torch.arange(groups.shape[1]) < counts[:, None]
    a = values.new_full((len(counts), values.shape[1]), 1 / values.shape[1])
    plans = class_transport_plans(values[groups].mT, a, held.double() / counts[:, None], epsilon)
    result = torch.zeros_like(values)
    result[groups[held]] = plans.mT[held]
    return result.to(cost), len(counts)


def identity_share(plan: Tensor, v: Tensor) -> Tensor:
    """Return the share of mass of `plan` (n, m), m >= n, that does not move: `sum_ij P_ij [v_i == v_j] / sum_ij P_ij`.

    `v` (m, d) are the targets; the first n of them belong to the n rows. The share is 1 for the identity, even if some
    targets are equal (as for a repeated label, whose text appears twice).
    """
    v = v.detach()
    same = torch.cdist(v[: len(plan)], v, p=float("inf")) <= 1e-6
    return (plan * same).sum() / plan.sum()


@contextmanager
def without_warnings() -> Iterator[None]:
    """Ignore user and runtime warnings, but not deprecation warnings."""
    with warnings.catch_warnings():
        for category in (UserWarning, RuntimeWarning):
            warnings.simplefilter("ignore", category)
        yield
