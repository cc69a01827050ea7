"""Fixed class prototypes of a prescribed geometry."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..validation import check_int, check_non_negative
from .checks import check_tensor, numbers
from .simplex import welch_bound
from .sphere import l2_normalize

TOLERANCE = 1e-8  # of entries, and of eigenvalues relative to the largest


def prototypes_from_gram(gram: Tensor, dim: int) -> Tensor:
    """Return unit vectors with given inner products: rows of `V sqrt(L)` for `G = V L V^T`, padded to d numbers.

    Args:
        gram: (K, K), the cosines: symmetric, with unit diagonal, positive semi-definite, and of rank at most d; each
            of these up to 1e-8 (2e-6 for float32 and narrower).
        dim: d.

    Returns:
        (K, d) float64, without gradient. The sign of each axis is fixed: its first entry of the largest absolute value
        is positive. If eigenvalues of G are equal, their axes may differ between machines; the inner products do not.

    Raises:
        ValueError: `gram` is not such a matrix; the message names the fault.

    Reference: J. Gill, V. Vakilian, C. Thrampoulidis, arXiv 2310.00893, where prototypes may have any geometry.
    """
    check_tensor("gram", gram)
    dim = check_int("dim", dim)
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or not len(gram):
        raise ValueError(f"gram must be a square matrix, got shape {tuple(gram.shape)}.")
    tolerance = max(TOLERANCE, 16 * torch.finfo(torch.promote_types(gram.dtype, torch.float32)).eps)
    gram = gram.detach().double()
    if not gram.isfinite().all():
        raise ValueError("gram has non-finite entries.")
    if (gram - gram.T).abs().max() > tolerance:
        raise ValueError(f"gram must be symmetric, but entries differ by {float((gram - gram.T).abs().max()):.3g}.")
    off = (gram.diagonal() - 1).abs()
    if off.max() > tolerance:
        c = int(off.argmax())
        raise ValueError(f"gram must have a unit diagonal, but gram[{c}, {c}] is {float(gram[c, c]):.6g}.")
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    if values[-1] < -tolerance * values[0]:
        raise ValueError(
            f"gram must be positive semi-definite, but its smallest eigenvalue is {float(values[-1]):.3g}."
        )
    rank = int((values > tolerance * values[0]).sum())
    if rank > dim:
        raise ValueError(f"gram has rank {rank}, which does not fit into {dim} dimensions.")
    # keep all eigenvalues above float64's rounding that fit, so that G is met to 1e-15 and not only to the tolerance
    kept = min(dim, int((values > len(gram) * torch.finfo(torch.float64).eps * values[0]).sum()))
    axes = vectors[:, :kept] * values[:kept].sqrt()
    largest = (axes.abs() > (1 - 1e-6) * axes.abs().amax(0)).to(torch.uint8).argmax(0)  # the first, up to rounding
    axes = axes * axes.gather(0, largest[None]).sign()
    return l2_normalize(F.pad(axes, (0, dim - kept)))


def minority_margin(class_counts: Tensor | Sequence[int], dim: int, strength: float = 0.5) -> Tensor:
    """Return prototypes with wider angles for rarer classes: a simplex ETF for equal counts or strength 0.

    With `p_c = n_c^-strength / sum_j n_j^-strength`, the unit vectors along `v_c = e_c - p` in R^K, of rank K - 1:
    `cos_ij = (|p|^2 - p_i - p_j) / sqrt((1 - 2 p_i + |p|^2)(1 - 2 p_j + |p|^2))`. The angle between i and any other
    class grows as n_i falls (K >= 3; two classes are always opposite), at the cost of angles between common classes.
    The formula is ours: the paper allows wider angles for minorities and gives no formula.

    Args:
        class_counts: (K,), number of samples of each class, at least 1.
        dim: d, at least K - 1.
        strength: strength of the effect of counts, at least 0.

    Returns:
        (K, d) float64 on the CPU.

    Raises:
        ValueError: there are fewer than two classes, a count is below 1, d < K - 1, or strength is negative, not
            finite, or so large that p is 0 for all classes but the rarest.

    Reference: J. Gill, V. Vakilian, C. Thrampoulidis, arXiv 2310.00893.

    Example:

    >>> w = minority_margin([100, 100, 1], dim=2)
    >>> (w @ w.T).round(decimals=2).tolist()
    [[1.0, 0.35, -0.82], [0.35, 1.0, -0.82], [-0.82, -0.82, 1.0]]
    """
    counts = numbers("class_counts", class_counts).detach().to("cpu", torch.float64)
    dim = check_int("dim", dim, least=1)
    strength = check_non_negative("strength", strength)
    if counts.dim() != 1 or len(counts) < 2:
        raise ValueError(f"class_counts must have at least 2 classes, got shape {tuple(counts.shape)}.")
    k = len(counts)
    wrong = (~(counts >= 1) | counts.isinf()).nonzero().flatten()
    if len(wrong):
        c = int(wrong[0])
        raise ValueError(f"class_counts must be at least 1 and finite, but class_counts[{c}] is {float(counts[c]):g}.")
    if dim < k - 1:
        raise ValueError(
            f"Prototypes of {k} classes with minority margins need at least {k - 1} dimensions, got {dim}; in {dim} "
            f"dimensions, the mean squared cosine of two vectors is at least {welch_bound(k, dim):.4g}."
        )
    p = torch.softmax(-strength * counts.log(), 0)
    v = torch.eye(k, dtype=torch.float64) - p
    others = p.expand(k, k).clone().fill_diagonal_(0)
    v.diagonal().copy_(others.sum(1))  # 1 - p_c, with all digits even if p_c is nearly 1
    lengths = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    if not lengths.all():
        raise ValueError(f"strength={strength} is too large for these counts: one class leaves the others no weight.")
    v = v / lengths
    return prototypes_from_gram(v @ v.T, dim)
