"""Space alignment's pure functions against loops in numpy, and the rows they leave alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from peft_ncgeo.geometry.alignment import (
    alignment,
    centred_means,
    project_gradient,
    rotate_towards_means,
    slerp_fraction,
)

from ..losses.batches import unit_rows
from .test_simplex import points
from .test_sphere import by_hand

NAN = float("nan")


def with_unseen(*classes: int, shape=(6, 5)) -> torch.Tensor:
    means = points(*shape, seed=7) + 3
    means[list(classes)] = NAN
    return means


def test_means_are_centred_over_the_classes_seen():
    means = with_unseen(1, 4)
    x = means.numpy()
    middle = x[[0, 2, 3, 5]].mean(0)
    expected = np.stack([np.zeros(5) if c in (1, 4) else x[c] - middle for c in range(6)])
    np.testing.assert_allclose(centred_means(means), expected, atol=1e-14)
    np.testing.assert_array_equal(centred_means(means, center=False), np.nan_to_num(x))
    assert means[1].isnan().all()  # the argument is as it was


def test_rounding_of_the_mean_counts_as_zero():
    assert not centred_means(with_unseen(0, 1, 2, 4, 5)).any()  # one class
    assert not centred_means(with_unseen(0, 1, 2, 3, 4, 5)).any()  # none
    for dtype in (torch.float32, torch.float64):
        equal = (100 * points(1, 8)).to(dtype).repeat(7, 1)
        equal = equal * (1 + 2 * torch.finfo(dtype).eps * torch.randn(7, 1).sign().to(dtype))
        assert not centred_means(equal).any()
        apart = equal.clone()
        apart[2, 0] += 1e-3
        assert centred_means(apart)[2].any()


@pytest.mark.parametrize("center", [True, False])
def test_alignment_by_hand(center):
    means, w = with_unseen(1), points(6, 5)
    w[3] = 0
    mu = means.numpy() - (np.nanmean(means.numpy(), 0) if center else 0)
    expected = [NAN if c in (1, 3) else unit_rows(w.numpy()[c]) @ unit_rows(mu[c]) for c in range(6)]
    np.testing.assert_allclose(alignment(w, means, center), expected, atol=1e-14)


def test_alignment_is_nan_without_a_mean_and_its_gradient_is_not():
    means, w = with_unseen(1), points(6, 5)
    w[3] = 0
    w.requires_grad_()
    means.requires_grad_()
    cosines = alignment(w, means)
    (1 - cosines[~cosines.isnan()]).mean().backward()
    assert w.grad.isfinite().all()
    assert w.grad[[1, 3]].abs().max() == 0
    assert means.grad.isfinite().all()
    zero = torch.zeros(4, 3)
    assert alignment(zero, zero + 1).isnan().all()
    assert alignment(zero + 1, zero, center=False).isnan().all()
    assert alignment(points(4, 3), torch.ones(4, 3)).isnan().all()


def test_two_classes_one_dimension_and_narrow_dtypes():
    means = torch.tensor([[1.0], [5.0]])
    assert alignment(torch.tensor([[-2.0], [-2.0]]), means).tolist() == [1, -1]
    w = torch.tensor([[3.0], [-2.0]])
    assert torch.equal(rotate_towards_means(w, means, 0.7), w)  # opposite, and on a line there is no way round
    assert torch.equal(project_gradient(w, w, means), w)
    w, means = points(4, 6).bfloat16(), points(4, 6, seed=1).bfloat16()
    for value in (alignment(w, means), rotate_towards_means(w, means, 0.3), project_gradient(w, means, w)):
        assert value.dtype == torch.float32
    torch.testing.assert_close(alignment(w, means), alignment(w.double(), means.double()).float())
    strided = points(6, 4).T
    torch.testing.assert_close(
        rotate_towards_means(strided, means.double(), 0.3),
        rotate_towards_means(strided.contiguous(), means.double(), 0.3),
    )


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("threshold", [1.0, 0.2, -1.0])
def test_rows_rotate_towards_their_means(center, threshold):
    means, w = with_unseen(1), points(6, 5)
    mu = means.numpy() - (np.nanmean(means.numpy(), 0) if center else 0)
    w[2] = 3 * torch.from_numpy(mu)[2]  # parallel
    w[3] = 0
    fraction = torch.linspace(0.1, 0.6, 6, dtype=torch.float64)
    expected = w.numpy().copy()
    for c in (0, 4, 5):
        if unit_rows(w.numpy()[c]) @ unit_rows(mu[c]) <= threshold:
            expected[c] = by_hand(w.numpy()[c], mu[c], float(fraction[c]))
    turned = rotate_towards_means(w, means, fraction, threshold, center)
    np.testing.assert_allclose(turned, expected, rtol=1e-12, atol=1e-13)
    assert torch.equal(turned[[1, 2, 3]], w[[1, 2, 3]])
    torch.testing.assert_close(turned.norm(dim=1), w.norm(dim=1))


def test_a_whole_rotation_aligns():
    means, w = with_unseen(1), points(6, 5)
    cosines = alignment(rotate_towards_means(w, means, 1.0), means)
    np.testing.assert_allclose(cosines[[0, 2, 3, 4, 5]], 1, atol=1e-15)
    assert torch.equal(rotate_towards_means(w, means, 0.0), w)


def projected_by_hand(g, w, mu, gamma):
    w, mu = w / np.linalg.norm(w), mu / np.linalg.norm(mu)
    g_t = g - (g @ w) * w
    d = mu - (mu @ w) * w
    d /= np.linalg.norm(d)
    if g_t @ d > 0:
        g_t = g_t - (g_t @ d) * d
    return (1 - gamma) * g_t + gamma * g


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_projected_gradient_by_hand(center, gamma):
    means, w, g = with_unseen(1), points(6, 5), points(6, 5, seed=3)
    mu = means.numpy() - (np.nanmean(means.numpy(), 0) if center else 0)
    w[2] = -0.5 * torch.from_numpy(mu)[2]
    w[3] = 0
    expected = g.numpy().copy()
    for c in (0, 4, 5):
        expected[c] = projected_by_hand(g.numpy()[c], w.numpy()[c], mu[c], gamma)
    projected = project_gradient(g, w, means, gamma, center)
    np.testing.assert_allclose(projected, expected, atol=1e-14)
    assert torch.equal(projected[[1, 2, 3]], g[[1, 2, 3]])


def turning(w: np.ndarray, mu: np.ndarray, g: np.ndarray) -> np.ndarray:
    """d cos(w - eta g, mu) / d eta at eta = 0, row by row: negative where descent rotates w away from mu."""
    length = np.linalg.norm(w, axis=1)
    u, v = unit_rows(w), unit_rows(mu)
    return -((g * v).sum(1) - (g * u).sum(1) * (u * v).sum(1)) / length


@pytest.mark.parametrize("dim", [2, 3, 20])
def test_descent_turns_away_gamma_times_as_fast_and_never_at_gamma_zero(dim):
    count = 5000
    w, means, g = (points(count, dim, seed=s) for s in (11, 12, 13))
    w = w * points(count, 1, seed=14).exp()
    means[: count // 10] = w[: count // 10] + 1e-4 * means[: count // 10]  # nearly aligned ones too
    arrays = w.numpy(), means.numpy()
    plain = turning(*arrays, g.numpy())
    assert (plain < 0).mean() > 0.4
    for gamma in (0.0, 0.3, 0.6, 1.0):
        projected = turning(*arrays, project_gradient(g, w, means, gamma, center=False).numpy())
        np.testing.assert_allclose(projected, np.where(plain < 0, gamma * plain, plain), atol=1e-11)
    # a small step of descent, measured rather than differentiated
    step = 1e-5 * w.norm(dim=1, keepdim=True) / g.norm(dim=1, keepdim=True)
    before = alignment(w, means, center=False)
    after = alignment(w - step * project_gradient(g, w, means, 0.0, center=False), means, center=False)
    assert float((after - before).min()) > -1e-10  # second order in the step
    moved = alignment(w - step * g, means, center=False)
    assert float((moved - before).min()) < -1e-6


def test_radial_part_is_scaled_either_way():
    w, means, g = (points(500, 6, seed=s) for s in (1, 2, 3))
    u = unit_rows(w)
    radial = (project_gradient(g, w, means, 0.25) * u).sum(1)
    torch.testing.assert_close(radial, 0.25 * (g * u).sum(1))


def test_fraction_of_a_step():
    for t, total, alpha in ((0, 100, 0.002), (1, 2, 0.002), (50, 100, 0.002), (33999, 34000, 0.01), (7, 9, 1.0)):
        ramp = (1 - math.cos(math.pi * t / total)) / 2
        assert slerp_fraction(t, total, alpha) == pytest.approx(1 - (1 - alpha * ramp) ** (34000 / total), rel=1e-9)
    assert slerp_fraction(0, 1) == 0
    assert slerp_fraction(5, 10, alpha=0.0) == 0
    assert slerp_fraction(10, 10, alpha=1.0) == 1
    assert slerp_fraction(34000, 34000) == pytest.approx(0.002)
    values = [slerp_fraction(t, 1000) for t in range(1000)]
    assert values == sorted(values)
    assert 0 <= min(values) <= max(values) < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 10, -0.1), "alpha"),
        ((0, 10, 1.1), "alpha"),
        ((0, 10, NAN), "alpha"),
        ((0, 0), "steps=0"),
        ((11, 10), "step=11"),
        ((-1, 10), "step=-1"),
    ],
)
def test_fraction_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        slerp_fraction(*arguments)


def test_bad_arguments_are_named():
    w, means = points(6, 5), with_unseen()
    with pytest.raises(ValueError, match="means must have shape"):
        centred_means(points(5))
    half = with_unseen()
    half[2, 1] = NAN
    with pytest.raises(ValueError, match="row 2 is neither"):
        alignment(w, half)
    half[2, 1] = math.inf
    with pytest.raises(ValueError, match="row 2 is neither"):
        centred_means(half)
    for bad in (w[:4], w[:, :1]):
        with pytest.raises(ValueError, match="weights must have"):
            alignment(bad, means)
        with pytest.raises(ValueError, match="gradient must have"):
            project_gradient(bad, w, means)
    with pytest.raises(ValueError, match="fraction must be"):
        rotate_towards_means(w, means, torch.rand(5))
    for gamma in (-0.1, 1.5):
        with pytest.raises(ValueError, match="gamma"):
            project_gradient(w, w, means, gamma)
