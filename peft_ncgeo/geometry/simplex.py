"""Simplex equiangular tight frames (ETFs), and distances of point sets from them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..validation import check_int
from .checks import check_finite, check_shape
from .sphere import l2_normalize, rounding, scale_extreme_rows


def simplex_etf(num_classes: int, dim: int, seed: int | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a simplex ETF: K unit vectors in d dimensions, each pair with cosine `-1/(K-1)`.

    `E = sqrt(K/(K-1)) Q V^T` with Q (K, K-1) an orthonormal basis of the complement of the ones vector and V (d, K-1)
    with orthonormal columns; so `E E^T = K/(K-1) (I - 11^T/K)`.

    Args:
        num_classes, dim: K and d.
        seed: seed for drawing V; None: V is the first K - 1 axes, which is exact to the last digit.
        dtype: dtype of the result; the computation is in float64.

    Returns:
        `(K, d)`.

    Raises:
        ValueError: there are fewer than two classes, `d < K - 1` (no simplex ETF exists), or dtype is not floating.

    Reference: V. Papyan et al., Prevalence of neural collapse, PNAS 2020.

    Example:

    >>> etf = simplex_etf(num_classes=3, dim=8)
    >>> (etf @ etf.T).round(decimals=4).tolist()
    [[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0]]
    """
    num_classes, dim = check_int("num_classes", num_classes), check_int("dim", dim)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype={dtype} must be a floating dtype, for example torch.float32.")
    if num_classes < 2:
        raise ValueError(f"A simplex ETF needs at least 2 classes, got {num_classes}.")
    if dim < 1:
        raise ValueError(f"dim={dim} must be at least 1.")
    if dim < num_classes - 1:
        raise ValueError(
            f"A simplex ETF of {num_classes} classes needs at least {num_classes - 1} dimensions, got {dim}; in {dim} "
            f"dimensions, the mean squared cosine of two vectors is at least {welch_bound(num_classes, dim):.4g}."
        )
    # Helmert's basis in closed form: more exact than one from a decomposition
    j = torch.arange(1, num_classes, dtype=torch.float64)
    q = torch.ones(num_classes, num_classes - 1, dtype=torch.float64).triu()
    q[torch.arange(1, num_classes), torch.arange(num_classes - 1)] = -j
    q = (num_classes / (num_classes - 1)) ** 0.5 * q / (j * (j + 1)).sqrt()
    if seed is None:
        return torch.nn.functional.pad(q, (0, dim - num_classes + 1)).to(dtype)
    generator = torch.Generator().manual_seed(check_int("seed", seed) % 2**64)
    v = torch.linalg.qr(torch.randn(dim, num_classes - 1, dtype=torch.float64, generator=generator)).Q
    return (q @ v.T).to(dtype)


def welch_bound(num_classes: int, dim: int) -> float:
    """Return the smallest mean squared cosine between pairs of K unit vectors in d dimensions.

    `(K^2/d - K)/(K(K-1))` for K > d; 0 for K <= d, where they can be orthogonal.
    """
    k = num_classes
    return max(0.0, (k * k / dim - k) / (k * (k - 1)))


def etf_floor(num_classes: int, dim: int) -> float:
    """Return the smallest value of [`etf_deviation`]: 0 if a simplex ETF exists (K <= d + 1), else above 0.

    It is `welch_bound(K, d) - 1/(K-1)^2`, reached by tight frames whose vectors sum to 0.
    """
    k = num_classes
    return max(0.0, welch_bound(k, dim) - 1 / (k - 1) ** 2) if k > dim + 1 else 0.0


def etf_deviation(points: Tensor) -> Tensor:
    """Return the mean squared difference between pairwise cosines and those of a simplex ETF.

    The value is the scalar `1/(K(K-1)) sum_{i != j} (cos(p_i, p_j) + 1/(K-1))^2` for `points` (K, d), K >= 2. For K >
    2d it takes O(Kd) memory: with unit rows P, `sum_ij cos_ij^2 = ||P^T P||_F^2` and `sum_ij cos_ij = ||sum_i
    p_i||^2`. No digits are lost there: by the Welch bound, the result is at least half of the first term.

    Raises:
        ValueError: `points` is not a matrix, has fewer than two rows, or is not finite.
    """
    check_shape("points", points, "K", "d")
    check_finite("points", points)
    k = len(points)
    if k < 2:
        raise ValueError("A simplex ETF needs at least 2 classes, got 1.")
    if k > 2 * points.shape[1]:
        with torch.autocast(points.device.type, enabled=False):
            p = l2_normalize(points)
            every = (p.T @ p).square().sum() + 2 / (k - 1) * p.sum(0).square().sum() + (k / (k - 1)) ** 2
            return (every - (p.square().sum(1) + 1 / (k - 1)).square().sum()) / (k * (k - 1))
    deviation = _cosines(points) + 1 / (k - 1)
    return deviation.square().masked_fill(_diagonal(deviation), 0).sum() / (k * (k - 1))


def clustered_etf_deviation(points: Tensor, clusters: Tensor, reduction: str = "mean") -> Tensor:
    """Return the distance of each cluster's cosines from those of a simplex ETF of the cluster's size.

    With M clusters, cluster m of `k_m` points, and M' clusters of two points or more:

    - "sum": `1/M sum_m sum_{i != j in m} (cos_ij + 1/(k_m - 1))^2`;
    - "mean": `1/M' sum_m 1/(k_m (k_m - 1)) sum_{i != j in m} (cos_ij + 1/(k_m - 1))^2`, which for one cluster is
      [`etf_deviation`].

    A cluster of one point counts as 0; if all clusters have one point, the value is 0, attached to the graph.

    Args:
        points: `(K, d)`.
        clusters: `(K,)` int64, numbers 0..M-1 without gaps.
        reduction: "mean" or "sum".
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r} must be 'mean' or 'sum'.")
    cosines = _cosines(points)
    # sized for K clusters: the host does not know their number, nor that of the pairs
    sizes = cosines.new_zeros(len(points)).index_add_(0, clusters, cosines.new_ones(len(points)))
    size = sizes[clusters]  # size of each point's cluster
    others = (size - 1).clamp_min(1)
    pairs = (clusters[:, None] == clusters[None, :]) & ~_diagonal(cosines)
    squares = (cosines + 1 / others[:, None]).square().masked_fill(~pairs, 0).sum(1)
    if reduction == "sum":
        return squares.sum() / (clusters.max() + 1)
    return (squares / (size * others)).sum() / (sizes > 1).sum().clamp_min(1)


def gram_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the distance between the shapes of two sets of K points, independent of rotation, scale and dimension.

    `|| G_a/||G_a||_F - G_b/||G_b||_F ||_F` with `G_a = a a^T`; the points are not centred. Without gradients and for
    K > d + d', no K x K matrix is formed; see [`fewer_rows`].

    Args:
        a, b: points `(K, d)` and `(K, d')`.

    Returns:
        A scalar in 0..2 (0..sqrt(2) for non-zero points). Its gradient at 0 is 0.

    Raises:
        ValueError: the numbers of points differ, or values are not finite.

    Example:

    >>> triangle, turned = simplex_etf(3, 2), 5 * simplex_etf(3, 8, seed=1)
    >>> round(float(gram_distance(triangle, turned)), 4)
    0.0
    >>> round(float(gram_distance(triangle, torch.eye(3, dtype=torch.float64))), 4)
    0.6058
    """
    for name, points in (("a", a), ("b", b)):
        check_shape(name, points, "K", "d")
        check_finite(name, points)
    if len(a) != len(b):
        raise ValueError(f"gram_distance needs equally many points in a and b, got {len(a)} and {len(b)}.")
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return torch.linalg.norm(_unit_gram(a) - _unit_gram(b))
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = fewer_rows(torch.cat([a.to(dtype), b.to(dtype)], 1)).split([a.shape[1], b.shape[1]], 1)
    return torch.linalg.norm(_unit_gram(a) - _unit_gram(b))


def simplex_distance(gram: Tensor, kept: Tensor | None = None) -> Tensor:
    """Return the distance of a matrix of inner products from the simplex ETF's, independent of scale.

    `|| G/||G||_F - (I - 11^T/K)/sqrt(K-1) ||_F`, in [0, 2]; 1 if G is 0.

    Args:
        gram: (K, K), K >= 2; it need not be symmetric (NC3 compares weights with means).
        kept: (K,) bool, mask of the rows and columns to use; `gram` is 0 in the others. None: all.

    Returns:
        Scalar in float32 or wider, differentiable.

    Raises:
        ValueError: `gram` is not a square matrix with K >= 2.
    """
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] < 2:
        raise ValueError(f"gram must be a matrix (K, K) with K >= 2, got shape {tuple(gram.shape)}.")
    gram = gram.to(torch.promote_types(gram.dtype, torch.float32))
    kept = torch.ones(len(gram), dtype=torch.bool, device=gram.device) if kept is None else kept
    k = kept.sum().to(gram).clamp_min(2)
    simplex = (torch.eye(len(gram), dtype=gram.dtype, device=gram.device) - 1 / k) / (k - 1).sqrt()
    simplex = simplex.masked_fill(~(kept[:, None] & kept), 0)
    return torch.linalg.norm(_scaled(gram) - simplex)


def simplex_distance_of_product(a: Tensor, b: Tensor) -> Tensor:
    """Return [`simplex_distance`] of `a b^T` for rows (K, d) of the same classes, in O(Kd) memory if K > d + 1.

    Its square is `2 - 2 <G/||G||_F, (I - 11^T/K)/sqrt(K-1)>`. For K > d + 1 it is at least about `1/(d+1)`, since G
    has rank d at most, so the difference keeps its digits. `<G, I - 11^T/K> = sum_c <a_c, b_c> - <sum_c a_c, sum_c
    b_c>/K`.
    """
    k, d = a.shape
    if k <= d + 1:
        return simplex_distance(a @ b.T)
    a, b = _moderate(a), _moderate(b)
    norm = torch.linalg.norm(a @ fewer_rows(b).T)
    inner = (a * b).sum() - a.sum(0) @ b.sum(0) / k
    square = 2 - 2 * inner / (norm * (k - 1) ** 0.5)
    return square.clamp_min(0).sqrt().where(norm > 0, 1)


def fewer_rows(points: Tensor) -> Tensor:
    """Return R (d, d) of `points = Q R` (Q has orthonormal columns) if there are more than d points, else `points`.

    R and the points p have the same inner products of columns, the same singular values, and the same norms of
    products, `||a p^T||_F = ||a R^T||_F`, and of weighted products, `||p D p^T||_F = ||R D R^T||_F`.
    """
    with torch.autocast(points.device.type, enabled=False):
        return torch.linalg.qr(points, mode="r").R if len(points) > points.shape[1] else points


def centred_directions(points: Tensor, kept: Tensor | None = None) -> Tensor:
    """Subtract the mean from points (K, d) and scale each to length 1; where `kept` (K,) is False, return 0.

    A point that equals the mean up to rounding gives 0, since rounding has no meaningful direction.
    """
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    kept = torch.ones(len(points), dtype=torch.bool, device=points.device) if kept is None else kept
    points = points.masked_fill(~kept[:, None], 0)
    centred = points - points.sum(0) / kept.sum().clamp_min(1)
    with torch.no_grad():
        largest = centred.abs().amax(-1)
        kept = kept & (largest > rounding(points.dtype) * points.abs().amax())
    return l2_normalize(centred.masked_fill(~kept[:, None], 0))


def _cosines(points: Tensor) -> Tensor:
    with torch.autocast(points.device.type, enabled=False):
        points = l2_normalize(points)
        return points @ points.T


def _diagonal(square: Tensor) -> Tensor:
    return torch.eye(len(square), dtype=torch.bool, device=square.device)


def _unit_gram(points: Tensor) -> Tensor:
    with torch.autocast(points.device.type, enabled=False):
        points = _moderate(points.to(torch.promote_types(points.dtype, torch.float32)))
        return _scaled(points @ points.T)


def _moderate(matrix: Tensor) -> Tensor:
    """Scale a matrix if its squares would be infinite or 0."""
    return scale_extreme_rows(matrix.flatten()).view_as(matrix)


def _scaled(matrix: Tensor) -> Tensor:
    # equal points are 0 after centring: 0 stays 0
    matrix = _moderate(matrix)
    return matrix / torch.linalg.norm(matrix).clamp_min(torch.finfo(matrix.dtype).tiny)
