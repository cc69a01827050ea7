"""Features on the unit sphere."""

from __future__ import annotations

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional as F

from .checks import check_finite, check_shape, check_tensor, numbers


def unit(features: Tensor) -> Tensor:
    """Rows of `(..., d)` scaled to length 1, computed in float32 or wider whatever autocast says.

    Rows of 0 stay 0 and get no gradient; so do those below 1e-30 (in float64 1e-300), whose own would overflow.
    """
    with torch.autocast(features.device.type, enabled=False):
        rows = features.to(torch.promote_types(features.dtype, torch.float32))
        if _may_look(rows):  # one pass less
            lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
            if ordinary(lengths):
                return rows / lengths
        return F.normalize(moderate(rows), dim=-1)


def ordinary(lengths: Tensor) -> bool:
    """Whether [`moderate`] leaves all rows of these lengths as they are; False where telling takes a wait."""
    return _may_look(lengths) and bool(((lengths > 1e-10) & (lengths < 1e15)).all())


def _may_look(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and not torch.compiler.is_compiling()


def moderate(rows: Tensor) -> Tensor:
    """Rows `(..., d)` of float32 or wider, scaled where their squares would be infinite or 0; see [`unit`]."""
    largest = rows.detach().abs().amax(-1, keepdim=True)
    scale = largest / largest.clamp(1e-10, 1e15)  # 1, and so exact, for all but extreme rows
    return rows / scale.where(largest > 1e8 * torch.finfo(rows.dtype).tiny, torch.inf)


def cosine_logits(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's logits `s * cos(f_i, g_k)`, `s = exp(logit_scale)`: (B, d) and (K, d) to (B, K), in float32 or wider."""
    with torch.autocast(image.device.type, enabled=False):
        dtype = torch.promote_types(image.dtype, text.dtype)
        image, text = unit(image.to(dtype)), unit(text.to(dtype))
        return logit_scale.to(image.dtype).exp() * image @ text.T


def modality_gap(a: Tensor, b: Tensor) -> Tensor:
    """Distance between the centres of two sets of features on the sphere, `||mean_i a^_i - mean_j b^_j||_2`.

    Args:
        a, b: raw features `(n, d)` and `(m, d)`, images and texts for instance; normalised here.

    Returns:
        A scalar in 0..2, in float32 or wider.

    Raises:
        ValueError: no row, another width, or values that are not finite.

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
    return torch.linalg.vector_norm(unit(a).mean(0) - unit(b).mean(0))


def slerp(a: Tensor, b: Tensor, t: ArrayLike | Tensor) -> Tensor:
    """Rows of `a` rotated towards those of `b` by a fraction of the angle between them, each keeping its length.

    With `theta = angle(a, b)` and e the unit vector orthogonal to a, in the plane of both, on b's side:
    `cos(t theta) a + sin(t theta) ||a|| e`. At t = 0 that is a, at t = 1 b's direction with a's length. Tiny angles
    and those near pi are as exact as the rows themselves: `theta = atan2(sin, cos)`, not arccos.

    Where a or b is 0, or they are parallel or opposite to rounding, no plane is defined: the row of `a` is returned
    as it is, and nothing flows back to `b` and `t` there.

    Args:
        a, b: `(..., d)`, of one shape. The length of b's rows does not matter.
        t: fraction of the angle, a number, or an array or tensor that broadcasts to the rows' shape `(...)`; usually
            in [0, 1], any real number rotates on.

    Returns:
        `(..., d)` in float32 or wider, differentiable.

    Raises:
        ValueError: `a` and `b` differ in shape, `t` does not broadcast, or something is not finite.

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
        raise ValueError(f"t of shape {tuple(fraction.shape)} does not broadcast to {wanted}, one a row.") from None
    check_finite("t", fraction)
    length, u, nonzero = polar(a)
    _, v, other_nonzero = polar(b)
    side, sine, cosine, spans = tangent(u, v)
    angle = fraction * torch.atan2(sine, cosine)
    return torch.where(nonzero & other_nonzero & spans, angle.cos() * a + angle.sin() * length * side, a)


def polar(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Length `(..., 1)` and direction `(..., d)` of rows of float32 or wider, and where they are not 0 `(..., 1)`.

    A row of 0 gets a direction that means nothing and no gradient, where normalising would give 0 and one of 1e12.
    """
    scale = rows.detach().abs().amax(-1, keepdim=True)  # squares of 1e-30 are 0 in float32
    nonzero = scale != 0
    scale = scale.where(nonzero, torch.ones_like(scale))
    scaled = (rows / scale).where(nonzero, torch.ones_like(rows))
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scale * length, scaled / length, nonzero


def tangent(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For unit rows `(..., d)`: the unit vector orthogonal to u, in the plane of u and v, on v's side.

    Returns:
        It `(..., d)`; sine and cosine of the angle from u to v; and where the plane exists, that is u and v are
        neither parallel nor opposite to rounding, all three `(..., 1)`. Elsewhere the vector means nothing and has no
        gradient.
    """
    cosine = (u * v).sum(-1, keepdim=True)
    side = v - cosine * u
    side = side - (u * side).sum(-1, keepdim=True) * u  # what rounding left along u is not small beside a tiny side
    spans = ~(torch.linalg.vector_norm(side.detach(), dim=-1, keepdim=True) <= 8 * torch.finfo(u.dtype).eps)
    side = side.where(spans, torch.ones_like(side))
    sine = torch.linalg.vector_norm(side, dim=-1, keepdim=True)
    return side / sine, sine, cosine, spans


def rounding(dtype: torch.dtype) -> float:
    """The share of their lengths below which a difference of vectors counts as rounding."""
    return max(1e-12, 16 * torch.finfo(dtype).eps)
