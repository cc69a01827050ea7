"""Space alignment (arXiv 2512.07844): its exact results, by explicit weights, by rotating and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import log_ndtr

from peft_ncgeo.geometry import error_exponent, exponent_ratio, optimal_exponent, simplex_etf
from peft_ncgeo.geometry.alignment import rotate_towards_means, slerp_fraction
from peft_ncgeo.geometry.exponent import class_exponents, misaligned_exponent

from ..geometry.test_exponent import exponents_by_hand
from ..losses.batches import unit_rows


def etf(k: int, dim: int) -> np.ndarray:
    """Unit rows at cosine -1/(K-1), from the centred unit vectors of R^K."""
    rows = np.eye(k) - 1 / k
    basis = np.linalg.svd(rows)[2][: k - 1]  # the complement of the ones vector
    rows = math.sqrt(k / (k - 1)) * rows @ basis.T
    return np.pad(rows, ((0, 0), (0, dim - k + 1)))


def exponent_by_hand(mu: np.ndarray, w: np.ndarray) -> float:
    return min(exponents_by_hand(mu, w, np.zeros(len(mu))))


def beta(mu: np.ndarray, w: np.ndarray, b: np.ndarray | None = None) -> float:
    return float(error_exponent(torch.from_numpy(mu), torch.from_numpy(w), None if b is None else torch.from_numpy(b)))


@pytest.mark.parametrize(("classes", "value"), [(3, 0.375), (10, 0.27778), (100, 0.25253)])
def test_aligned_simplex(classes, value):
    e = etf(classes, classes + 3)
    assert beta(e, e) == pytest.approx(classes / (4 * (classes - 1)), rel=1e-12)
    assert beta(e, e) == pytest.approx(value, abs=5e-6)
    assert beta(e, 7 * e) == pytest.approx(value, abs=5e-6)
    ours = simplex_etf(classes, classes)
    assert float(error_exponent(ours, ours)) == pytest.approx(beta(e, e), rel=1e-12)
    mu = torch.from_numpy(e)
    np.testing.assert_allclose(class_exponents(mu, mu), classes / (4 * (classes - 1)), rtol=1e-12)  # of every class
    assert float(exponent_ratio(mu, mu)) == pytest.approx(1, abs=1e-12)
    assert float(optimal_exponent(mu)) == pytest.approx(2 * classes / (classes - 1) / 8)


@pytest.mark.parametrize("classes", [2, 3, 4, 10])
@pytest.mark.parametrize("degrees", [0, 10, 37, 60, 85, 90, 91, 140, 180])
def test_rotation_into_an_orthogonal_copy(classes, degrees):
    theta = math.radians(degrees)
    mu = etf(classes, 2 * (classes - 1))
    copy = np.roll(mu, classes - 1, axis=1)
    assert abs(mu @ copy.T).max() == 0
    w = math.cos(theta) * mu + math.sin(theta) * copy
    expected = classes / (4 * (classes - 1)) * max(math.cos(theta), 0) ** 2
    assert exponent_by_hand(mu, w) == pytest.approx(expected, abs=1e-15)
    assert beta(mu, w) == pytest.approx(expected, abs=1e-15)
    assert misaligned_exponent(classes, theta) == pytest.approx(expected, abs=1e-15)


def turned(rows: np.ndarray, x: np.ndarray, y: np.ndarray, theta: float) -> np.ndarray:
    """Rows rotated by theta in the plane of the orthonormal x and y, from x to y."""
    c, s = math.cos(theta), math.sin(theta)
    plane = (c - 1) * (np.outer(x, x) + np.outer(y, y)) + s * (np.outer(y, x) - np.outer(x, y))
    return rows + rows @ plane.T


@pytest.mark.parametrize("classes", [3, 4, 10])
@pytest.mark.parametrize("degrees", [0, 5, 20, 44, 54, 55, 59, 61, 90, 180])
def test_worst_rotation_in_the_span(classes, degrees):
    theta = math.radians(degrees)
    mu = etf(classes, classes - 1)
    # in the plane of two means, their difference turned away from the first
    x, y = unit_rows(np.stack([mu[0] - mu[1], mu[0] + mu[1]]))
    w = turned(mu, x, -y, theta)
    np.testing.assert_allclose(w @ w.T, mu @ mu.T, atol=1e-14)  # a rotation
    phi0 = math.acos(math.sqrt(classes / (2 * (classes - 1))))
    expected = 0.5 * max(math.cos(phi0 + theta), 0) ** 2
    assert exponent_by_hand(mu, w) == pytest.approx(expected, abs=1e-14)
    assert beta(mu, w) == pytest.approx(expected, abs=1e-14)
    assert misaligned_exponent(classes, theta, "span") == pytest.approx(expected, abs=1e-15)
    rng = np.random.default_rng(degrees)
    for _ in range(50):  # no other plane is worse
        x, y = np.linalg.qr(rng.standard_normal((classes - 1, 2)))[0].T
        assert beta(mu, turned(mu, x, y, theta)) >= expected - 1e-14


@pytest.mark.parametrize(("classes", "degrees"), [(3, 60.0), (4, 54.7356)])
def test_where_a_rotation_in_the_span_leaves_nothing(classes, degrees):
    assert misaligned_exponent(classes, math.radians(degrees - 0.01), "span") > 0
    assert misaligned_exponent(classes, math.radians(degrees + 0.01), "span") == 0
    assert misaligned_exponent(classes, math.radians(degrees + 0.01)) > 0.09


@pytest.mark.parametrize("total", [68, 100, 1000, 6000])
def test_a_run_turns_by_the_same_factor_whatever_its_length(total):
    # the mean along an axis: an angle of 1e-15 then has all its digits
    mean = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    start = 3.0
    w = 2 * torch.tensor([[math.cos(start), 0.6 * math.sin(start), -0.8 * math.sin(start)]], dtype=torch.float64)
    for t in range(total):
        w = rotate_towards_means(w, mean, slerp_fraction(t, total), center=False)
    x = w[0].numpy()
    left = math.atan2(math.hypot(x[1], x[2]), x[0])
    assert math.log(left / start) == pytest.approx(-34.0, rel=0.015)
    ramp = (1 - np.cos(np.pi * np.arange(total) / total)) / 2
    assert math.log(left / start) == pytest.approx(34000 / total * np.log1p(-0.002 * ramp).sum(), abs=1e-3)
    assert np.linalg.norm(x) == pytest.approx(2, rel=1e-12)


def test_a_published_run_and_a_short_one():
    for total, expected in ((34000, -34.0245), (68, -33.53), (10, -30.6)):
        factors = [1 - slerp_fraction(t, total) for t in range(total)]
        assert np.log(factors).sum() == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(("classes", "dim"), [(2, 3), (5, 4), (8, 20)])
def test_nearest_class_mean_is_the_best_linear_classifier(classes, dim):
    rng = np.random.default_rng(classes)
    mu = rng.standard_normal((classes, dim)) * rng.uniform(0.3, 3, (classes, 1)) + 2
    best = min(((mu[i] - mu[j]) ** 2).sum() for i in range(classes) for j in range(i)) / 8
    bias = -(mu**2).sum(1) / 2
    assert beta(mu, mu, bias) == pytest.approx(best, rel=1e-12)
    assert float(optimal_exponent(torch.from_numpy(mu))) == pytest.approx(best, rel=1e-12)
    for scale in (0.01, 0.1, 1.0):
        for _ in range(30):
            w, b = mu + scale * rng.standard_normal(mu.shape), bias + scale * rng.standard_normal(classes)
            assert beta(mu, w, b) <= best * (1 + 1e-12)


def test_monte_carlo():
    """-sigma^2 log P(error) tends to beta, and P(error) lies between the worst pair's tail and the sum of them."""
    classes, samples = 3, 400_000
    rng = np.random.default_rng(0)
    mu = etf(classes, 3) + 0.5
    w = turned(mu, np.array([1.0, 0, 0]), np.array([0, 1.0, 0]), 0.2)
    b = np.array([0.05, -0.1, 0.0]) - w.sum(1) * 0.5
    per_class = exponents_by_hand(mu, w, b)
    np.testing.assert_allclose(class_exponents(*map(torch.from_numpy, (mu, w, b))), per_class, rtol=1e-12)
    c = int(np.argmin(per_class))
    value = beta(mu, w, b)
    assert value == pytest.approx(per_class[c])
    assert 0.1 < value < 0.35
    gaps = []
    for sigma in (0.5, 0.35, 0.25, 0.2):
        wrong = 0
        for _ in range(5):
            x = mu[c] + sigma * rng.standard_normal((samples, 3))
            wrong += int(((x @ w.T + b).argmax(1) != c).sum())
        share = wrong / (5 * samples)
        noise = 5 * math.sqrt(share / (5 * samples))
        tails = []
        for other in set(range(classes)) - {c}:
            difference = w[c] - w[other]
            reach = (difference @ mu[c] + b[c] - b[other]) / np.linalg.norm(difference)
            tails.append(math.exp(log_ndtr(-reach / sigma)))
        assert max(tails) - noise <= share <= sum(tails) + noise
        gaps.append(-(sigma**2) * math.log(share) - value)
    assert gaps == sorted(gaps, reverse=True)
    assert 0 < gaps[-1] < 0.3 * gaps[0]
    # exact tail of the worst pair where sampling no longer reaches
    for sigma, share in ((0.05, 0.06), (0.01, 0.005), (0.001, 1e-4)):
        assert -(sigma**2) * log_ndtr(-math.sqrt(2 * value) / sigma) == pytest.approx(value, rel=share)
