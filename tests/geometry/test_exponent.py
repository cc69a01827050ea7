"""Error exponents against loops in numpy, and the classes they leave out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from peft_ncgeo.geometry import error_exponent, exponent_ratio, optimal_exponent, simplex_etf
from peft_ncgeo.geometry.exponent import class_exponents, misaligned_exponent

from .test_simplex import points

NAN = float("nan")


def exponents_by_hand(mu: np.ndarray, w: np.ndarray, b: np.ndarray) -> list[float]:
    """Pair by pair."""
    values = []
    for c in range(len(mu)):
        pairs = []
        for other in range(len(mu)):
            if other != c:
                difference = w[c] - w[other]
                margin = max(difference @ mu[c] + b[c] - b[other], 0)
                pairs.append(margin**2 / (2 * difference @ difference) if difference.any() else 0.0)
        values.append(min(pairs))
    return values


@pytest.mark.parametrize(("classes", "dim"), [(2, 1), (2, 5), (6, 3), (9, 20)])
def test_exponents_by_hand(classes, dim):
    mu, b = 3 * points(classes, dim), points(classes, seed=2)
    w = mu + points(classes, dim, seed=1)
    for bias in (None, b):
        expected = exponents_by_hand(mu.numpy(), w.numpy(), np.zeros(classes) if bias is None else b.numpy())
        np.testing.assert_allclose(class_exponents(mu, w, bias), expected, rtol=1e-12)
        assert float(error_exponent(mu, w, bias)) == pytest.approx(min(expected), rel=1e-12)
    nearest = min(np.sum((x - y) ** 2) for i, x in enumerate(mu.numpy()) for y in mu.numpy()[:i])
    assert float(optimal_exponent(mu)) == pytest.approx(nearest / 8, rel=1e-12)
    assert float(exponent_ratio(mu, w, b)) == pytest.approx(min(expected) / (nearest / 8), rel=1e-12)


def test_nothing_exceeds_the_optimum():
    for seed in range(100):
        mu = points(5, 4, seed=seed)
        w, b = mu + 0.3 * points(5, 4, seed=1000 + seed), 0.3 * points(5, seed=2000 + seed)
        b = b - mu.square().sum(1) / 2
        assert 0 <= float(exponent_ratio(mu, w, b)) <= 1
    best = exponent_ratio(mu, mu, -mu.square().sum(1) / 2)
    assert float(best) == pytest.approx(1, abs=1e-14)
    assert float(best) <= 1


def test_absent_classes_are_left_out():
    mu, w, b = points(6, 4), points(6, 4), points(6, seed=2)
    present = [0, 2, 3, 5]
    mu[[1, 4]] = NAN
    w[1] = NAN  # whatever an absent class's row holds
    values = class_exponents(mu, w, b)
    assert values.isnan().tolist() == [c not in present for c in range(6)]
    expected = exponents_by_hand(mu.numpy()[present], w.numpy()[present], b.numpy()[present])
    np.testing.assert_allclose(values[present], expected, rtol=1e-12)
    assert float(error_exponent(mu, w, b)) == pytest.approx(min(expected), rel=1e-12)
    assert float(optimal_exponent(mu)) == pytest.approx(float(optimal_exponent(mu[present])))
    for few in ([2], []):
        mu = torch.full((6, 4), NAN)
        mu[few] = 1.0
        assert class_exponents(mu, w).isnan().all()
        for value in (error_exponent(mu, w), optimal_exponent(mu), exponent_ratio(mu, w)):
            assert value.isnan()
            assert value.shape == ()


def test_equal_rows_and_equal_means():
    mu, w = points(4, 3), points(4, 3)
    w[3] = w[1]
    assert class_exponents(mu, w, 10 * points(4))[[1, 3]].tolist() == [0, 0]
    assert float(error_exponent(mu, w)) == 0
    assert float(error_exponent(mu, torch.zeros(4, 3))) == 0
    mu[2] = mu[0]
    assert exponent_ratio(mu, w).isnan()
    assert float(optimal_exponent(mu)) == 0
    mu = mu.float()
    mu[2] = mu[0] * (1 + 1e-7)
    assert exponent_ratio(mu, w).isnan()
    mu[2] = mu[0] * 1.01
    assert not exponent_ratio(mu, w).isnan()


def test_nearly_equal_rows_keep_their_digits():
    direction = torch.tensor([[1.0, 0], [-1, 0]], dtype=torch.float64)
    common = torch.tensor([2.0**20, 0], dtype=torch.float64)  # exact sums: nothing is lost before the call
    w = common + direction * 2**-30
    mu = direction * 0.7 + torch.tensor([0.0, 3.0], dtype=torch.float64)
    assert float(error_exponent(mu, w)) == pytest.approx(0.7**2 / 2, rel=1e-14)
    assert float(error_exponent(mu.float(), w.float().double())) == 0  # in float32 the rows are equal


def test_scale_of_the_classifier_and_shift_do_not_matter():
    mu, w, b = points(5, 4), points(5, 4) + 0.1 * points(5, 4, seed=1), 0.1 * points(5, seed=2)
    value = class_exponents(mu, w, b)
    torch.testing.assert_close(class_exponents(mu, 9 * w, 9 * b + 4), value)
    torch.testing.assert_close(class_exponents(mu, w + points(4, seed=5), b), value)


def test_dtypes_layouts_and_gradients():
    mu, w = points(5, 4), points(5, 4) + 0.1 * points(5, 4, seed=1)
    for dtype in (torch.bfloat16, torch.float32):
        narrow, rows = mu.to(dtype), w.to(dtype)
        value = class_exponents(narrow, rows)
        assert value.dtype == error_exponent(narrow, rows).dtype == exponent_ratio(narrow, rows).dtype == torch.float64
        torch.testing.assert_close(value, class_exponents(narrow.double(), rows.double()))
        assert optimal_exponent(narrow).dtype == torch.float64
    strided = points(4, 5).T
    torch.testing.assert_close(class_exponents(strided, w), class_exponents(strided.contiguous(), w))
    mu.requires_grad_(), w.requires_grad_()
    b = (0.1 * points(5, seed=2)).requires_grad_()
    assert torch.autograd.gradcheck(class_exponents, (mu, w, b))
    assert torch.autograd.gradcheck(exponent_ratio, (mu, w, b))
    equal = torch.ones(3, 2, requires_grad=True)
    error_exponent(equal, equal).backward()
    assert equal.grad.isfinite().all()


def test_misaligned_closed_forms():
    assert misaligned_exponent(3, 0.0) == pytest.approx(0.375)
    assert misaligned_exponent(3, 0.0, "span") == pytest.approx(0.375)
    assert misaligned_exponent(2, math.pi / 3) == pytest.approx(0.125)
    assert misaligned_exponent(7, math.pi) == 0
    assert misaligned_exponent(7, math.pi, "span") == 0
    etf = simplex_etf(7, 6)
    assert float(error_exponent(etf, etf)) == pytest.approx(misaligned_exponent(7, 0.0))
    for arguments, message in (
        ((1, 0.1), "at least 2"),
        ((2, 0.1, "span"), "at least 3"),
        ((3, 0.1, "both"), "rotation"),
        ((3, 4.0), "theta"),
        ((3, -0.1), "theta"),
        ((3, NAN), "theta"),
    ):
        with pytest.raises(ValueError, match=message):
            misaligned_exponent(*arguments)


def test_bad_arguments_are_named():
    mu = points(4, 3)
    half = mu.clone()
    half[1, 0] = NAN
    for call, message in (
        (lambda: class_exponents(points(4), mu), "means"),
        (lambda: class_exponents(half, mu), "row 1 is neither"),
        (lambda: optimal_exponent(half), "row 1 is neither"),
        (lambda: error_exponent(mu, mu[:3]), r"weights must have shape \(4, 3\).*got \(3, 3\)"),
        (lambda: error_exponent(mu, mu, mu), r"bias must have shape \(4,\)"),
        (lambda: error_exponent(mu, half), "weights has non-finite"),
        (lambda: exponent_ratio(mu, mu, half[:, 0]), "bias has non-finite"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
