"""Geometry of features on the unit sphere: normalisation, angles, rotation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_finite, check_shape, check_tensor, numbers

if TYPE_CHECKING:  # numpy 1.26 does not import it by itself
    from numpy.typing import ArrayLike


def l2_normalize(features: Tensor) -> Tensor:
    """Scale rows of `(..., d)` to length 1, in float32 or wider even under autocast.

    Rows of 0 stay 0 and get no gradient. The same holds for rows shorter than 1e-30 (in float64 1e-300), whose
    gradient would overflow.
    """
    with torch.autocast(features.device.type, enabled=False):
        rows = features.to(torch.promote_types(features.dtype, torch.float32))
        if _may_look(rows):  # saves one pass over the rows
            lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
            if has_usual_lengths(lengths):
                return rows / lengths
        return F.normalize(scale_extreme_rows(rows), dim=-1)


def mean_directions(features: Tensor, counts: Sequence[int] | None) -> Tensor:
    """Return the direction of the mean of each group's directions, `g_k = m_k / |m_k|`, `m_k = mean_j f_kj / |f_kj|`.

    Args:
        features: (R, d), with the rows of each group next to each other; rows after those of the last group belong to
            no group and are returned unchanged.
        counts: n_k, the number of rows of each of the K groups; None: the features are returned as they are.

    Returns:
        (K + R - sum_k n_k, d), float32 or wider.
    """
    if counts is None:
        return features
    ends = list(accumulate(counts, initial=0))
    rows, starts = (torch.tensor(part, device=features.device) for part in (range(ends[-1]), ends[:-1]))
    with torch.autocast(features.device.type, enabled=False):
        means = l2_normalize(F.embedding_bag(rows, l2_normalize(features[: ends[-1]]), starts, mode="mean"))
    return means if ends[-1] == len(features) else torch.cat([means, features[ends[-1] :].to(means)])


def has_usual_lengths(lengths: Tensor) -> bool:
    """Return True if rows of these lengths need no scaling; False if the check would need a copy from the device."""
    return _may_look(lengths) and bool(((lengths > 1e-10) & (lengths < 1e15)).all())


def _may_look(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and not torch.compiler.is_compiling()


def scale_extreme_rows(rows: Tensor) -> Tensor:
    """Scale rows `(..., d)` of float32 or wider if their squares would be infinite or 0; see [`l2_normalize`]."""
    largest = rows.detach().abs().amax(-1, keepdim=True)
    scale = largest / largest.clamp(1e-10, 1e15)  # exactly 1 for all but extreme rows
    return rows / scale.where(largest > 1e8 * torch.finfo(rows.dtype).tiny, torch.inf)


def cosine_logits(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None) -> Tensor:
    """Return CLIP's logits (B, K) from (B, d) and (K, d), `exp(logit_scale) * cos(f_i, g_k)`, in float32 or wider.

    SigLIP adds `logit_bias`, a scalar, which a softmax over classes ignores.
    """
    with torch.autocast(image.device.type, enabled=False):
        dtype = torch.promote_types(image.dtype, text.dtype)
        image, text = l2_normalize(image.to(dtype)), l2_normalize(text.to(dtype))
        logits = logit_scale.to(image.dtype).exp() * image @ text.T
        return logits if logit_bias is None else logits + logit_bias.to(image.dtype)


def modality_gap(a: Tensor, b: Tensor) -> Tensor:
    """Return the distance between the centres of two sets of unit features, `||mean_i a^_i - mean_j b^_j||_2`.

    Args:
        a, b: features `(n, d)` and `(m, d)`, for example of images and texts; normalised here.

    Returns:
        A scalar in 0..2, in float32 or wider.

    Raises:
        ValueError: a set is empty, the widths differ, or values are not finite.

    Reference: W. Liang et al., Mind the Gap, NeurIPS 2022, arXiv 2203.02053.

    Example:

    >>> images, texts = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> round(float(modality_gap(images, texts)), 4)
    0.3162
    """
    for name, features, rows in (("a", a, "n"), ("b", b, "m")):
        check_shape(name, features, rows, "d")
        check_finite(name, features)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must have the same width, got {tuple(a.shape)} and {tuple(b.shape)}.")
    return torch.linalg.vector_norm(l2_normalize(a).mean(0) - l2_normalize(b).mean(0))


def slerp(a: Tensor, b: Tensor, t: ArrayLike | Tensor) -> Tensor:
    """Rotate rows of `a` towards rows of `b` by a fraction of the angle between them, keeping their lengths.

    With `theta = angle(a, b)` and e the unit vector orthogonal to a, in the plane of both, on b's side:
    `cos(t theta) a + sin(t theta) ||a|| e`. At t = 0 the result is a, at t = 1 it has b's direction and a's length.
    Angles near 0 and pi are as exact as the rows: `theta = atan2(sin, cos)`, not arccos.

    If a or b is 0, or they are parallel or opposite up to rounding, the plane is undefined: the row of `a` is returned
    unchanged, and `b` and `t` get no gradient there.

    Args:
        a, b: `(..., d)`, of the same shape. The length of b's rows does not matter.
        t: fraction of the angle: a number, or an array or tensor that broadcasts to the rows' shape `(...)`; usually
            in [0, 1], but any real number is allowed.

    Returns:
        `(..., d)` in float32 or wider, differentiable.

    Raises:
        ValueError: `a` and `b` differ in shape, `t` does not broadcast, or a value is not finite.

    Reference: K. Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985.

    Example:

    >>> slerp(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]]), 1 / 3)
    tensor([[1.7321, 1.0000]])
    """
    for name, rows in (("a", a), ("b", b)):
        check_tensor(name, rows)
        check_finite(name, rows)
    if a.shape != b.shape or not a.dim() or not a.shape[-1]:
        raise ValueError(f"a and b must have the same shape (..., d), got {tuple(a.shape)} and {tuple(b.shape)}.")
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    fraction = numbers("t", t).to(a.device, dtype)
    try:
        fraction = fraction.expand(a.shape[:-1])[..., None]
    except RuntimeError:
        wanted = tuple(a.shape[:-1])
        raise ValueError(f"t of shape {tuple(fraction.shape)} does not broadcast to {wanted}, one per row.") from None
    check_finite("t", fraction)
    length, u, nonzero = length_and_direction(a)
    _, v, other_nonzero = length_and_direction(b)
    side, sine, cosine, spans = tangent(u, v)
    angle = fraction * torch.atan2(sine, cosine)
    return torch.where(nonzero & other_nonzero & spans, angle.cos() * a + angle.sin() * length * side, a)


def length_and_direction(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return length `(..., 1)` and direction `(..., d)` of rows, and a mask `(..., 1)` of the rows that are not 0.

    Rows are of float32 or wider. A row of 0 gets an arbitrary direction without gradient; plain normalisation would
    give it a gradient of 1e12.
    """
    scale = rows.detach().abs().amax(-1, keepdim=True)  # squares of 1e-30 are 0 in float32
    nonzero = scale != 0
    scale = scale.where(nonzero, torch.ones_like(scale))
    scaled = (rows / scale).where(nonzero, torch.ones_like(rows))
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scale * length, scaled / length, nonzero


def tangent(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the unit vector orthogonal to u, in the plane of u and v, on v's side, for unit rows `(..., d)`.

    Returns:
        The vector `(..., d)`; sine and cosine of the angle from u to v; and a mask that is True where u and v are
        neither parallel nor opposite up to rounding; all three `(..., 1)`. Where it is False, the vector is arbitrary
        and has no gradient.
    """
    cosine = (u * v).sum(-1, keepdim=True)
    side = v - cosine * u
    side = side - (u * side).sum(-1, keepdim=True) * u  # removes the rounding along u, which matters if side is tiny
    spans = ~(torch.linalg.vector_norm(side.detach(), dim=-1, keepdim=True) <= 8 * torch.finfo(u.dtype).eps)
    side = side.where(spans, torch.ones_like(side))
    sine = torch.linalg.vector_norm(side, dim=-1, keepdim=True)
    return side / sine, sine, cosine, spans


def rounding(dtype: torch.dtype) -> float:
    """Return the relative length below which a difference of vectors counts as a rounding error."""
    return max(1e-12, 16 * torch.finfo(dtype).eps)
