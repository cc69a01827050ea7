"""Space alignment of classifier rows with class means (arXiv 2512.07844), as pure functions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..validation import check_float, check_int
from .checks import check_finite, check_shape, numbers, refuse_unless
from .sphere import length_and_direction, rounding, slerp, tangent

if TYPE_CHECKING:  # numpy 1.26 does not import it by itself
    from numpy.typing import ArrayLike

PUBLISHED_STEPS = 34000  # length of the run for which the paper gives its rotation per step


def centred_means(means: Tensor, center: bool = True) -> Tensor:
    """Subtract the mean of all class means from each of them, `mu_c = m_c - mean of m over the classes seen`.

    Args:
        means: (K, d); a row of nan alone is a class that was not seen yet.
        center: False subtracts nothing.

    Returns:
        (K, d) in float32 or wider. Rows are exactly 0 for classes not seen, and for class means that equal the mean of
        all up to rounding, for example if only one class was seen.

    Raises:
        ValueError: `means` is not a matrix, or a row is neither finite nor wholly nan.

    Reference: arXiv 2512.07844. To centre the means is our reading of the paper; the authors' SLERP code does not.
    """
    seen = seen_classes(means)[:, None]
    means = means.to(torch.promote_types(means.dtype, torch.float32))
    means = means.where(seen, torch.zeros_like(means))
    if not center:
        return means
    centred = means - means.sum(0) / seen.sum().clamp_min(1)
    longest = _lengths(means).amax()
    apart = _lengths(centred) > rounding(means.dtype) * longest
    return centred.where(seen & apart, torch.zeros_like(centred))


def alignment(weights: Tensor, means: Tensor, center: bool = True) -> Tensor:
    """Return the cosine of each classifier row with its class mean, `cos(w_c, mu_c)`, mu as in [`centred_means`].

    Args:
        weights: (K, d), a linear head's rows or text features.
        means: (K, d); rows wholly nan are classes not seen yet.
        center: True to centre the means.

    Returns:
        (K,) in float32 or wider, differentiable; nan without gradient for classes not seen and where mu_c or w_c
        is 0.

    Raises:
        ValueError: shapes are wrong, weights are not finite, or a row of means is neither finite nor wholly nan.

    Reference: arXiv 2512.07844.
    """
    w, mu, defined = _directions(weights, means, center)
    cosines = (w * mu).sum(1).clamp(-1, 1)
    return cosines.masked_fill(~defined[:, 0], math.nan)


def rotate_towards_means(
    weights: Tensor, means: Tensor, fraction: ArrayLike | Tensor, threshold: float = 1.0, center: bool = True
) -> Tensor:
    """Rotate w_c towards mu_c by a fraction of their angle, where `cos(w_c, mu_c) <= threshold` (SpA-SLERP).

    Rows keep their lengths. Rows of classes not seen do not change, nor do rows where mu_c or w_c is 0 or the two are
    parallel or opposite.

    Args:
        weights: (K, d).
        means: (K, d); rows wholly nan are classes not seen yet.
        fraction: fraction of the angle, a number or (K,); in training, the value of [`slerp_fraction`].
        threshold: rows with a larger cosine do not change; 1.0 rotates all.
        center: True to centre the means.

    Returns:
        (K, d) in float32 or wider.

    Raises:
        ValueError: shapes are wrong, weights or fraction are not finite, threshold is nan, or a row of means is
            neither finite nor wholly nan.

    Reference: arXiv 2512.07844.
    """
    threshold = check_float("threshold", threshold, "a cosine", lambda value: not math.isnan(value))
    check_shape("weights", weights, "K", "d")
    check_shape("means", means, "K", "d")
    cosines = alignment(weights.detach(), means.detach(), center)
    mu = centred_means(means, center)
    fraction = numbers("fraction", fraction).to(cosines.device, cosines.dtype)
    if fraction.shape not in ((), cosines.shape):
        raise ValueError(f"fraction must be a number or ({len(cosines)},), got shape {tuple(fraction.shape)}.")
    return slerp(weights, mu, fraction.where(cosines <= threshold, torch.zeros_like(fraction)))


def project_gradient(
    gradient: Tensor, weights: Tensor, means: Tensor, gamma: float = 0.6, center: bool = True
) -> Tensor:
    """Remove a share 1 - gamma of the gradient that would rotate w_c away from its class mean (SpA-Proj).

    Let w and mu be unit vectors, g the gradient of the row, `g_t = g - <g, w> w` and `d = unit(mu - <mu, w> w)`. If
    `<g_t, d> > 0`, a descent step rotates w away from mu, and `g_t <- g_t - <g_t, d> d`. The result is
    `(1 - gamma) g_t + gamma g`. In every row the part of g along w is multiplied by gamma, as in the authors' code.
    The part that rotates w away from mu is multiplied by gamma too, so it disappears only for gamma = 0. A descent
    step is a step of plain SGD here: with momentum or Adam, the step does not follow the gradient.

    Rows of classes not seen do not change, nor do rows where mu_c or w_c is 0 or the two are parallel or opposite.

    Args:
        gradient: (K, d), the loss's gradient with respect to `weights`.
        weights: (K, d).
        means: (K, d); rows wholly nan are classes not seen yet.
        gamma: share of the gradient that is kept unchanged, in [0, 1].
        center: True to centre the means.

    Returns:
        (K, d) in float32 or wider.

    Raises:
        ValueError: shapes are wrong, gradient or weights are not finite, a row of means is neither finite nor wholly
            nan, or gamma is not in [0, 1].

    Reference: arXiv 2512.07844.
    """
    check_shape("gradient", gradient, "K", "d")
    check_shape("weights", weights, "K", "d")
    check_finite("gradient", gradient)
    gamma = check_float("gamma", gamma, "in [0, 1]", lambda value: 0 <= value <= 1)
    if gradient.shape != weights.shape:
        raise ValueError(f"gradient must have the weights' shape {tuple(weights.shape)}, got {tuple(gradient.shape)}.")
    w, mu, defined = _directions(weights, means, center)
    g = gradient.to(torch.promote_types(gradient.dtype, w.dtype))
    away, _, _, spans = tangent(w, mu)
    tangential = g - (g * w).sum(1, keepdim=True) * w
    tangential = tangential - (tangential * away).sum(1, keepdim=True).clamp_min(0) * away
    return torch.where(defined & spans, (1 - gamma) * tangential + gamma * g, g)


def slerp_fraction(step: int, steps: int, alpha: float = 0.002) -> float:
    """Return the fraction for [`rotate_towards_means`] at one step, such that runs of any length rotate equally far.

    `1 - (1 - alpha r_t)^(34000/T)` with the ramp `r_t = (1 - cos(pi t/T))/2`; the exponent is our reading: the paper
    gives alpha for 34,000 steps, and the effects of the steps multiply. With the default alpha, the rotations of a run
    multiply the angle by about `exp(-34)`, if training does not rotate the rows back.

    Args:
        step: t = 0..T-1 (T is allowed: the end of the ramp).
        steps: T, the optimiser steps of the run.
        alpha: fraction per step at the end of a run of 34,000 steps.

    Returns:
        In [0, 1].

    Raises:
        ValueError: `alpha` is not in [0, 1], `steps` is less than 1, or `step` is not in 0..steps.

    Reference: arXiv 2512.07844.
    """
    alpha = check_float("alpha", alpha, "in [0, 1]", lambda value: 0 <= value <= 1)
    step, steps = check_int("step", step), check_int("steps", steps, least=1)
    if not 0 <= step <= steps:
        raise ValueError(f"step={step} must be in 0..{steps}.")
    share = alpha * math.sin(math.pi * step / (2 * steps)) ** 2  # (1 - cos x)/2 = sin^2(x/2), exact for small x
    return 1.0 if share >= 1 else -math.expm1(PUBLISHED_STEPS / steps * math.log1p(-share))


def seen_classes(means: Tensor) -> Tensor:
    """Return a mask (K,) of the rows of class means (K, d) that are finite; all other rows must be wholly nan.

    Raises:
        ValueError: `means` is not a matrix, or a row is neither finite nor wholly nan.
    """
    check_shape("means", means, "K", "d")
    seen = means.isfinite().all(1)
    wrong = ~(seen | means.isnan().all(1))
    message = "Each row of means must be finite or wholly nan; row {} is neither."
    refuse_unless(~wrong.any(), ValueError, message, wrong.int().argmax())
    return seen


def _directions(weights: Tensor, means: Tensor, center: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return unit rows of weights and mu, (K, d), and a mask (K, 1) of the rows where neither is 0."""
    check_shape("weights", weights, "K", "d")
    check_shape("means", means, "K", "d")
    check_finite("weights", weights)
    if weights.shape != means.shape:
        raise ValueError(f"weights must have the means' shape {tuple(means.shape)}, got {tuple(weights.shape)}.")
    mu = centred_means(means, center)
    dtype = torch.promote_types(weights.dtype, mu.dtype)
    _, w, nonzero = length_and_direction(weights.to(dtype))
    _, mu, apart = length_and_direction(mu.to(dtype))
    return w, mu, nonzero & apart


def _lengths(rows: Tensor) -> Tensor:
    """Return the lengths (K, 1) of rows (K, d), exact even if their squares overflow or underflow."""
    length, _, nonzero = length_and_direction(rows.detach())
    return length * nonzero
