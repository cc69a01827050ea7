"""Rotation on the sphere against plain numpy in float64, and where no rotation is defined."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from peft_ncgeo.geometry import slerp
from peft_ncgeo.geometry.sphere import l2_normalize

from .test_simplex import points


def by_hand(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """The formula with arccos and sines, for one pair of rows at an ordinary angle."""
    u, v = a / np.linalg.norm(a), b / np.linalg.norm(b)
    theta = np.arccos(u @ v)
    return np.linalg.norm(a) * (np.sin((1 - t) * theta) * u + np.sin(t * theta) * v) / np.sin(theta)


def angle_of(plane: torch.Tensor) -> np.ndarray:
    """Angle of rows from the first axis; exact for tiny ones and near pi."""
    x = plane.detach().double().numpy()
    return np.arctan2(np.linalg.norm(x[..., 1:], axis=-1), x[..., 0])


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0, -0.7, 2.5])
def test_slerp_by_hand(t):
    a, b = points(20, 7), 5 * points(20, 7, seed=1)
    expected = np.stack([by_hand(x, y, t) for x, y in zip(a.numpy(), b.numpy(), strict=True)])
    np.testing.assert_allclose(slerp(a, b, t).numpy(), expected, rtol=1e-11, atol=1e-13)


def test_ends_length_and_leading_shape():
    a, b = points(3, 4, 6), points(3, 4, 6, seed=1)
    assert torch.equal(slerp(a, b, 0), a)
    end = slerp(a, b, 1)
    np.testing.assert_allclose(end, b * a.norm(dim=-1, keepdim=True) / b.norm(dim=-1, keepdim=True), atol=1e-14)
    for t in (0.1, 0.77, 3.0):
        torch.testing.assert_close(slerp(a, b, t).norm(dim=-1), a.norm(dim=-1), rtol=1e-14, atol=0)
    one = slerp(a[0, 0], b[0, 0], 0.4)
    torch.testing.assert_close(one, slerp(a, b, 0.4)[0, 0])


def test_fractions_a_row_broadcast():
    a, b = points(3, 4, 6), points(3, 4, 6, seed=1)
    t = torch.rand(4, dtype=torch.float64)
    expected = torch.stack([slerp(a[:, j], b[:, j], float(t[j])) for j in range(4)], 1)
    torch.testing.assert_close(slerp(a, b, t), expected, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(slerp(a, b, torch.tensor(1)), slerp(a, b, 1.0))
    with pytest.raises(ValueError, match="t of shape.*broadcast"):
        slerp(a, b, torch.rand(3))
    with pytest.raises(ValueError, match="same shape"):
        slerp(a, b[0], 0.5)


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9, 1e-13])
def test_tiny_angles_and_those_near_pi(gap):
    a = torch.tensor([2.0, 0, 0], dtype=torch.float64)
    for theta in (gap, math.pi - gap):
        # the small part written down by itself: a difference from 1 or pi would have lost its digits
        small = math.sin(gap) * 3
        b = torch.tensor([math.copysign(3 * math.cos(gap), math.cos(theta)), 0.8 * small, -0.6 * small], dtype=a.dtype)
        turned = slerp(a, b, 0.25)
        assert angle_of(turned) == pytest.approx(theta / 4, rel=1e-12)
        np.testing.assert_allclose(turned[1:] / turned[1:].norm(), [0.8, -0.6], rtol=1e-12)
        assert float(turned.norm()) == pytest.approx(2, rel=1e-15)


def test_small_angles_in_float32():
    a = torch.tensor([1.0, 0.0]).repeat(3, 1)
    b = torch.stack([torch.ones(3), torch.tensor([1e-3, 1e-4, 1e-5])], 1)
    np.testing.assert_allclose(angle_of(slerp(a, b, 0.5)), [5e-4, 5e-5, 5e-6], rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_without_a_plane_are_returned(dtype):
    a = points(400, 12).to(dtype)
    factor = points(400, 1, seed=1).to(dtype).exp()
    for b in (a * factor, -a * factor, torch.zeros_like(a)):
        assert torch.equal(slerp(a, b, 0.5), a)
    assert torch.equal(slerp(torch.zeros_like(a), a, 0.5), torch.zeros_like(a))
    line = points(30, 1).to(dtype)  # d = 1 has only parallel and opposite ones
    assert torch.equal(slerp(line, points(30, 1, seed=3).to(dtype), 0.9), line)


def test_scale_does_not_matter():
    a, b = points(5, 4).float(), points(5, 4, seed=1).float()
    expected = slerp(a, b, 0.3)
    np.testing.assert_allclose(slerp(a * 1e-30, b * 1e-25, 0.3) * 1e30, expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(slerp(a * 1e30, b * 1e25, 0.3) * 1e-30, expected, rtol=2e-5, atol=1e-6)


def test_dtypes_layouts_and_what_is_not_finite():
    a, b = points(4, 6), points(4, 6, seed=1)
    half = slerp(a.bfloat16(), b.bfloat16(), 0.5)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, slerp(a.bfloat16().double(), b.bfloat16().double(), 0.5).float())
    assert slerp(a.float(), b, 0.5).dtype == torch.float64
    strided, other = points(6, 4).T, points(4, 12, seed=1)[:, ::2]
    assert not strided.is_contiguous()
    torch.testing.assert_close(slerp(strided, other, 0.3), slerp(strided.contiguous(), other.contiguous(), 0.3))
    a[2, 1] = torch.nan
    with pytest.raises(ValueError, match="a has non-finite values"):
        slerp(a, b, 0.5)
    with pytest.raises(ValueError, match="t has non-finite values"):
        slerp(b, b, torch.inf)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(slerp(b, points(4, 6), 0.5), slerp(b.clone(), points(4, 6), 0.5))
    assert slerp(torch.zeros(0, 3), torch.zeros(0, 3), 0.5).shape == (0, 3)


def test_gradients_by_finite_differences():
    a, b = points(3, 4).requires_grad_(), points(3, 4, seed=1).requires_grad_()
    t = torch.tensor([0.2, 0.9, 1.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(slerp, (a, b, t))
    # rows close to one another and close to opposite ones
    near = (a.detach() + 1e-3 * points(3, 4, seed=2)).requires_grad_()
    assert torch.autograd.gradcheck(slerp, (a, near, t), eps=1e-8, atol=1e-4, rtol=1e-3)
    far = (-a.detach() + 1e-2 * points(3, 4, seed=2)).requires_grad_()
    assert torch.autograd.gradcheck(slerp, (a, far, t), eps=1e-8, atol=1e-3, rtol=1e-3)


def test_gradients_where_no_plane_is_defined():
    base = points(5, 3)
    a, b = base.clone(), points(5, 3, seed=1)
    a[0] = 0
    b[1] = 0
    b[2] = 4 * a[2]
    b[3] = -a[3]
    a.requires_grad_(), b.requires_grad_()
    t = torch.full((5,), 0.3, dtype=torch.float64, requires_grad=True)
    upstream = points(5, 3, seed=2)
    (slerp(a, b, t) * upstream).sum().backward()
    assert torch.equal(a.grad[:4], upstream[:4])  # the rows came through as they are
    assert b.grad[:4].abs().max() == 0
    assert t.grad[:4].abs().max() == 0
    assert b.grad[4].abs().min() > 0
    assert all(x.grad.isfinite().all() for x in (a, b, t))


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("beside", [[], [1e30, 1e-30, 0.0]])
def test_ordinary_rows_have_the_bits_of_torchs_own_whatever_is_beside_them(on_host, beside, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: not on_host)  # which may no more look than a device
    rows, scales = points(40, 12).float(), torch.tensor([1.0] * 40 + beside)
    rows = torch.cat([rows, rows[: len(beside)]]) * scales[:, None]
    ours, torchs = rows.clone().requires_grad_(), rows[:40].clone().requires_grad_()
    found, expected = l2_normalize(ours), F.normalize(torchs, dim=-1)
    weights = points(len(rows), 12, seed=1).float()
    (found * weights).sum().backward()
    (expected * weights[:40]).sum().backward()
    assert torch.equal(found[:40], expected)
    assert torch.equal(ours.grad[:40], torchs.grad)
    if beside:
        assert not found[-1].any()
        assert not ours.grad[-1].any()
        torch.testing.assert_close(found[40:42], expected[:2])
        u = expected[:2].detach()
        across = weights[40:42] - (u * weights[40:42]).sum(-1, keepdim=True) * u
        torch.testing.assert_close(
            ours.grad[40:42] * scales[40:42, None], across / rows[:2].norm(dim=-1, keepdim=True)
        )
