"""Error exponents: decay rates of a linear classifier's error as features concentrate at their class means."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..validation import check_float, check_int
from .alignment import seen_classes
from .checks import check_tensor, refuse_unless
from .pairs import boundary, least_distance, nearest_rivals
from .sphere import rounding


def class_exponents(means: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the error exponent of each class under a linear classifier.

    For features `x = mu_c + sigma * noise` with standard normal noise, `-sigma^2 log P(x is misclassified)` tends to
    `min_{c' != c} ([<w_c - w_c', mu_c> + b_c - b_c']_+)^2 / (2 ||w_c - w_c'||^2)` as sigma falls to 0; a pair of equal
    rows counts as 0. The nearest other class c' is found by matrix products, which exclude a pair only if it is
    farther by more than rounding; the rest is computed from differences of rows, so that nearly equal rows keep their
    digits. This takes O(K^2 d) time and O(K d) memory. If two classes are equally near, one of them gets the gradient.

    Args:
        means: (K, d), not centred here; a row of nan alone is an absent class, which is ignored, also as c'.
        weights: (K, d).
        bias: (K,), default 0.

    Returns:
        (K,) in float64 (on MPS in float32), since squares of float32 numbers may overflow or underflow in float32; nan
        for absent classes, and for all classes if fewer than two are present.

    Raises:
        ValueError: shapes are wrong, a row of means is neither finite nor wholly nan, weights or bias of classes
            present are not finite, or an exponent is too large for a float.

    Reference: arXiv 2512.07844, for any means, weights and biases.
    """
    present = seen_classes(means)
    wide = _computing(means)
    mu, w = means[present].to(wide), _rows("weights", weights, means.shape, present).to(wide)
    b = mu.new_zeros(len(mu))
    if bias is not None:
        b = _rows("bias", bias, means.shape[:1], present).to(wide)
    result = torch.full((len(means),), math.nan, dtype=wide, device=means.device)
    if len(mu) < 2:
        return result
    reach = boundary(mu, w, b, torch.arange(len(mu), device=mu.device), nearest_rivals(mu, w, b))
    return result.masked_scatter(present, _within_range(reach.square() / 2))


def error_exponent(means: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the error exponent beta of a linear classifier, the smallest of [`class_exponents`].

    It is 0 if a class mean is misclassified or on a boundary. For an aligned simplex ETF of unit rows it is
    `K/(4(K-1))`, and no classifier exceeds [`optimal_exponent`].

    Args:
        means, weights, bias: as for [`class_exponents`].

    Returns:
        A scalar in float64 (on MPS in float32); nan if fewer than two classes are present.

    Raises:
        ValueError: as [`class_exponents`] does.

    Reference: arXiv 2512.07844.

    Example:

    >>> from peft_ncgeo.geometry import simplex_etf
    >>> means = simplex_etf(3, 2)
    >>> round(float(error_exponent(means, weights=means)), 4)
    0.375
    >>> round(float(error_exponent(means, weights=-means)), 4)
    0.0
    """
    return least_exponent(class_exponents(means, weights, bias))


def least_exponent(exponents: Tensor) -> Tensor:
    """Return the [`error_exponent`] of known [`class_exponents`] (K,): the smallest one, without absent classes."""
    present = ~exponents.isnan()
    return exponents[present].min() if present.any() else exponents.new_tensor(math.nan)


def optimal_exponent(means: Tensor) -> Tensor:
    """Return the best error exponent of linear classifiers on these means, `min_{c != c'} ||mu_c - mu_c'||^2 / 8`.

    The nearest-mean classifier, `w_c = mu_c` and `b_c = -||mu_c||^2 / 2`, reaches it.

    Args:
        means: (K, d), not centred here; a row of nan alone is an absent class, which is ignored.

    Returns:
        A scalar in float64 (on MPS in float32); nan if fewer than two classes are present.

    Raises:
        ValueError: `means` is not a matrix, a row is neither finite nor wholly nan, or the result is too large for a
            float.

    Reference: arXiv 2512.07844.
    """
    return _within_range(_least_distance(means).square() / 8)


def exponent_ratio(means: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a classifier's share of the best possible error exponent: [`error_exponent`]/[`optimal_exponent`].

    Args:
        means, weights, bias: as for [`class_exponents`].

    Returns:
        A scalar in [0, 1], in float64 (on MPS in float32); nan if two means are equal up to rounding, or fewer than
        two classes are present.

    Raises:
        ValueError: as [`class_exponents`] does.

    Reference: arXiv 2512.07844; the ratio is ours.

    Example:

    >>> means = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    >>> float(exponent_ratio(means, weights=means, bias=-means.square().sum(1) / 2))
    1.0
    >>> round(float(exponent_ratio(means, weights=means)), 2)
    0.52
    """
    return share_of_best(error_exponent(means, weights, bias), means)


def share_of_best(beta: Tensor, means: Tensor) -> Tensor:
    """Return the [`exponent_ratio`] of a known [`error_exponent`]: `beta` over the best exponent on these means."""
    least = _least_distance(means)
    longest = torch.linalg.vector_norm(means.to(least.dtype), dim=1).nan_to_num().amax()
    if not least > rounding(_widest(means)) * longest:
        return beta.new_tensor(math.nan)
    return (beta / (least.square() / 8)).clamp_max(1)


def misaligned_exponent(num_classes: int, theta: float, rotation: str = "orthogonal") -> float:
    """Return the error exponent for means that form a simplex ETF of unit rows, and weights rotated by theta.

    - "orthogonal", a rotation out of the means' span into an orthogonal copy, `W = cos(theta) E + sin(theta) E'`:
      `K/(4(K-1)) (max(cos(theta), 0))^2`.
    - "span", the worst rotation by theta in a plane of the span:
      `1/2 (max(cos(phi0 + theta), 0))^2`, `phi0 = arccos sqrt(K/(2(K-1)))`; 0 from `theta = pi/2 - phi0` on.

    Args:
        num_classes: K, at least 2; at least 3 for "span", whose planes need two dimensions.
        theta: angle in radians, in [0, pi].
        rotation: "orthogonal" or "span".

    Raises:
        ValueError: there are too few classes, theta is outside [0, pi], or the rotation is unknown.

    Reference: arXiv 2512.07844.
    """
    if rotation not in ("orthogonal", "span"):
        raise ValueError(f"rotation={rotation!r} must be 'orthogonal' or 'span'.")
    k = check_int("num_classes", num_classes)
    theta = check_float("theta", theta, "in [0, pi], in radians", lambda value: 0 <= value <= math.pi)
    fewest = 2 if rotation == "orthogonal" else 3
    if k < fewest:
        raise ValueError(f"num_classes={k} must be at least {fewest} for rotation={rotation!r}.")
    if rotation == "orthogonal":
        return k / (4 * (k - 1)) * max(math.cos(theta), 0.0) ** 2
    phi0 = math.acos(math.sqrt(k / (2 * (k - 1))))
    return 0.5 * max(math.cos(phi0 + theta), 0.0) ** 2


def _least_distance(means: Tensor) -> Tensor:
    """Return the smallest distance between two present means, in the computing dtype; nan for fewer than two."""
    mu = means[seen_classes(means)].to(_computing(means))
    if len(mu) < 2:
        return mu.new_tensor(math.nan)
    return least_distance(mu)


def _rows(name: str, tensor: Tensor, shape: torch.Size, present: Tensor) -> Tensor:
    check_tensor(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, to fit the means, got {tuple(tensor.shape)}.")
    rows = tensor[present]
    if not rows.isfinite().all():
        raise ValueError(f"{name} has non-finite entries for classes that are present.")
    return rows


def _widest(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _within_range(exponents: Tensor) -> Tensor:
    message = "An exponent is too large for {}; scale the means."
    refuse_unless(~exponents.isinf().any(), ValueError, message, exponents.dtype)
    return exponents


def _computing(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64
