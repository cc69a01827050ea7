"""Geometry of more classes than dimensions is that of plain formulas, which form every K x K matrix."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from peft_ncgeo.geometry import gram_distance, optimal_exponent, simplex_etf
from peft_ncgeo.geometry.exponent import class_exponents
from peft_ncgeo.geometry.pairs import block_rows, most_alike
from peft_ncgeo.geometry.simplex import etf_deviation, etf_floor, simplex_distance_of_product
from peft_ncgeo.metrics.feature_geometry import FeatureGeometry

from .collapse_problems import STATISTICS, streamed
from .test_simplex import points, unit_rows

# K, d: fewer classes than dimensions, as many, one more and two more, and blocks of rows that do not divide K
SIZES = [(11, 30), (30, 30), (31, 30), (32, 30), (90, 30), (1100, 12), (1500, 3)]


def problem(k: int, d: int, absent: bool = False):
    """Features of random order, two of each class but the absent ones, a classifier and its bias."""
    mu = points(k, d)
    labels = torch.arange(k).repeat(2)
    if absent:
        labels = labels[labels % 4 != 1]
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))]
    features = mu[labels] + 0.5 * points(len(labels), d, seed=1)
    return features, labels, mu + 0.6 * points(k, d, seed=2), 0.5 * points(k, seed=4)


def from_simplex(gram: np.ndarray) -> float:
    k = len(gram)
    return np.linalg.norm(gram / np.linalg.norm(gram) - (np.eye(k) - 1 / k) / np.sqrt(k - 1))


def plain(features, labels, weights, bias) -> dict[str, float]:
    """Neural collapse's numbers in numpy."""
    x, y, w, b = (tensor.numpy() for tensor in (features, labels, weights, bias))
    classes = np.unique(y)
    k = len(classes)
    mu = np.stack([x[y == c].mean(0) for c in classes])
    m, v = mu - mu.mean(0), w[classes] - w[classes].mean(0)
    within = sum((r := x[y == c] - mean).T @ r for c, mean in zip(classes, mu, strict=True)) / len(x)
    lengths = np.linalg.norm(m, axis=1)
    cosines = (m @ m.T / np.outer(lengths, lengths))[~np.eye(k, dtype=bool)]
    nearest = [classes[((row - mu) ** 2).sum(1).argmin()] for row in x]
    return {
        "nc1": np.trace(np.linalg.pinv(m.T @ m / k, rcond=1e-10) @ within) / k,
        "nc1_trace": np.trace(within) / (m**2).sum() * k,
        "nc2": from_simplex(m @ m.T),
        "nc2_norm_spread": lengths.std() / lengths.mean(),
        "nc2_cosine": np.abs(cosines + 1 / (k - 1)).mean(),
        "nc3": from_simplex(v @ m.T),
        "nc3_cosine": ((v * m).sum(1) / lengths / np.linalg.norm(v, axis=1)).mean(),
        "nc4": ((x @ w.T + b).argmax(1) == nearest).mean(),
    }


def exponents(mu: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    values = []
    for c in range(len(mu)):
        difference = np.delete(w[c] - w, c, 0)
        margin = difference @ mu[c] + np.delete(b[c] - b, c)
        square = (difference**2).sum(1)
        values.append(np.where(square > 0, margin.clip(0) ** 2 / (2 * np.where(square > 0, square, 1)), 0).min())
    return np.array(values)


def test_sizes_have_several_blocks():
    assert [k % block_rows(k) > 0 for k, _ in SIZES if k > block_rows(k)] == [True, True]


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize(("k", "d"), SIZES)
def test_neural_collapse(k, d, absent):
    x, y, weights, bias = problem(k, d, absent)
    want = plain(x, y, weights, bias)
    got = streamed(x, y, k, batch=57).compute(weights, bias)
    assert got == pytest.approx(want, rel=1e-8)
    assert 0 < want["nc4"] < 1 or k < 40
    order = y.argsort(descending=True)
    assert streamed(x[order], y[order], k, batch=400).compute(weights, bias) == pytest.approx(want, rel=1e-8)


@pytest.mark.parametrize(("k", "d"), SIZES)
def test_exponents(k, d):
    mu, w, b = 2 * points(k, d), points(k, d) + 0.1 * points(k, d, seed=1), 0.1 * points(k, seed=2)
    b = b - w.square().sum(1)
    want = exponents(mu.numpy(), w.numpy(), b.numpy())
    np.testing.assert_allclose(class_exponents(mu, w, b), want, rtol=1e-10)
    nearest = min(((mu[c] - mu[:c]) ** 2).sum(1).min() for c in range(1, k))
    assert float(optimal_exponent(mu)) == pytest.approx(float(nearest) / 8, rel=1e-13)
    best = class_exponents(mu, mu, -mu.square().sum(1) / 2)
    assert float(best.min()) == pytest.approx(float(nearest) / 8, rel=1e-11)


CLASSIFIERS = {
    "equal rows": lambda mu, w, b: (mu, w[torch.arange(len(w)) // 2], b),
    "nearly equal rows": lambda mu, w, b: (mu, 2.0**10 + (2.0**20 * w).round() / 2.0**50, 0 * b),
    "one row": lambda mu, w, b: (mu, 0 * w + 0.1, b),
    "all wrong": lambda mu, w, b: (mu, -mu, 0 * b),
    "a simplex": lambda mu, w, b: (simplex_etf(len(mu), len(mu)), simplex_etf(len(mu), len(mu)), 0 * b),
    "a simplex, nearly": lambda mu, w, b: (simplex_etf(len(mu), 60), simplex_etf(len(mu), 60) * (1 + 1e-14 * b[0]), b),
    "lengths": lambda mu, w, b: (mu, w * torch.logspace(-9, 9, len(w), dtype=w.dtype)[:, None], b),
    "far means": lambda mu, w, b: (mu + 1e5, w, b - 1e5 * w.sum(1)),
    "squares of 1e200": lambda mu, w, b: (1e100 * mu, 1e100 * w, b),
    "squares of 1e-300": lambda mu, w, b: (mu, 1e-150 * w, 1e-150 * b),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_exponents_where_products_round(name):
    """The nearest boundary is found from differences of rows, also where products of rows do not tell it."""
    mu, w, b = points(40, 8), points(40, 8) + 0.1 * points(40, 8, seed=1), 0.1 * points(40, seed=2)
    mu, w, b = CLASSIFIERS[name](mu, w, b)
    scale = 2.0 ** -float(w.abs().max().log2().round())  # which the exponents do not depend on
    want = exponents(mu.numpy(), (scale * w).numpy(), (scale * b).numpy())
    assert name in ("equal rows", "one row", "all wrong") or (want > 0).any()
    np.testing.assert_allclose(class_exponents(mu, w, b), want, rtol=1e-9)


def test_an_equal_row_counts_beside_a_nearly_equal_one():
    w = (2.0**20 * points(5, 8)).round() / 2.0**20
    w[1], w[2] = w[0], w[0]
    w[1, 0] += 2.0**-32
    b = torch.tensor([5.0, 5, 0, -9, -9], dtype=torch.float64)
    mu = w.clone()
    mu[:, 0] = -3
    want = exponents(mu.numpy(), w.numpy(), b.numpy())
    assert want[0] == 0
    assert exponents(mu[:2].numpy(), w[:2].numpy(), b[:2].numpy())[0] > 1
    np.testing.assert_allclose(class_exponents(mu, w, b), want, rtol=1e-12)


def test_least_distance_where_products_round():
    mu = (2.0**20 * points(1100, 5)).round() / 2.0**20
    mu[1050] = mu[3] + 2.0**-34
    mu[700] = mu[699] + 2.0**-33
    for shift in (0.0, 2.0**15):
        assert float(optimal_exponent(mu + shift)) == pytest.approx(5 * 2.0**-68 / 8, rel=1e-14)
    mu[700] = mu[20]
    assert float(optimal_exponent(mu)) == 0


def test_gradients_of_more_points_than_dimensions():
    mu = (3 * points(12, 3)).requires_grad_()
    w, b = (mu.detach() + 0.1 * points(12, 3, seed=1)).requires_grad_(), -mu.detach().square().sum(1) / 2
    assert (class_exponents(mu, w, b) > 0).sum() > 6
    assert torch.autograd.gradcheck(lambda mu, w: class_exponents(mu, w, b), (mu, w))
    assert torch.autograd.gradcheck(optimal_exponent, (mu,))
    assert torch.autograd.gradcheck(gram_distance, (mu, w))


@pytest.mark.parametrize("k", [9, 11, 12, 13, 200])
def test_gram_distance(k):
    """Without gradients, on both sides of K = d + d'; also of sets that hardly differ."""
    a = points(k, 4)
    for b in (points(k, 7, seed=1), torch.cat([a, 0 * a], 1), 1e-7 * points(k, 4, seed=2) + a, 1e-120 * points(k, 3)):
        shapes = [side.numpy() / side.abs().max().item() for side in (a, b)]
        grams = [side @ side.T / np.linalg.norm(side @ side.T) for side in shapes]
        want = np.linalg.norm(grams[0] - grams[1])
        assert float(gram_distance(a, b)) == pytest.approx(want, rel=1e-7, abs=1e-14)
        assert float(gram_distance(a.float(), (b / b.abs().max()).float())) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize(("k", "d"), [(10, 5), (11, 5), (1100, 6)])
def test_deviation_of_more_points_than_dimensions(k, d):
    x = points(k, d)
    x[3] = 0
    u = np.where(x.numpy().any(1, keepdims=True), unit_rows(np.where(x.numpy().any(1, keepdims=True), x, 1)), 0)
    expected = ((u @ u.T + 1 / (k - 1)) ** 2)[~np.eye(k, dtype=bool)].mean()
    assert float(etf_deviation(x)) == pytest.approx(expected, rel=1e-12)
    assert float(etf_deviation(x.float())) == pytest.approx(expected, rel=1e-5)
    assert torch.autograd.gradcheck(etf_deviation, (points(11, 5).requires_grad_(),))
    tight = torch.cat([torch.eye(d), -torch.eye(d)] * 2).double()  # which reaches the lower limit
    assert float(etf_deviation(tight)) == pytest.approx(etf_floor(4 * d, d), rel=1e-12)


@pytest.mark.parametrize(("k", "d"), [(5, 5), (6, 5), (7, 5), (60, 5)])
def test_distance_of_a_product_from_the_simplex(k, d):
    a, b = points(k, d), points(k, d, seed=1)
    for left, right in ((a, b), (a - a.mean(0), b - b.mean(0)), (a, a), (1e-150 * a, 1e-150 * b)):
        want = from_simplex((left / left.abs().max()).numpy() @ (right / right.abs().max()).numpy().T)
        assert float(simplex_distance_of_product(left, right)) == pytest.approx(want, rel=1e-12)
    assert float(simplex_distance_of_product(0 * a, b)) == pytest.approx(1)


@pytest.mark.parametrize(("k", "d"), [(20, 30), (90, 30), (1100, 12)])
def test_feature_geometry(k, d):
    """The values that an evaluation logs are right, also with several threads at once."""
    x, y, text, _ = problem(k, d, absent=True)
    image, rows = (torch.from_numpy(unit_rows(side.numpy())) for side in (x, text))
    means = torch.stack([image[y == c].mean(0) for c in range(k) if c % 4 != 1])
    seen = rows[torch.arange(k) % 4 != 1].numpy()
    of_classes = exponents(means.numpy(), seen, np.zeros(len(seen)))
    nearest = min(float(((means[c] - means[:c]) ** 2).sum(1).min()) for c in range(1, len(means)))
    grams = [side @ side.T / np.linalg.norm(side @ side.T) for side in (means.numpy(), seen)]
    centred = (rows - rows.mean(0)).numpy()
    want = plain(image, y, rows, torch.zeros(k)) | {
        "error_exponent": of_classes.min(),
        "class_exponent": of_classes.mean(),
        "exponent_ratio": of_classes.min() / (nearest / 8),
        "gram_distance": np.linalg.norm(grams[0] - grams[1]),
        "text_nc2": from_simplex(centred @ centred.T),
    }
    assert want.keys() > STATISTICS

    def logged(batch: int) -> dict[str, float]:
        geometry = FeatureGeometry()
        geometry.begin()
        for features, labels in zip(x.split(batch), y.split(batch), strict=True):
            geometry.update(features, labels, k, reads_text=True)
        return geometry.compute(text)

    with ThreadPoolExecutor(3) as pool:
        for got in pool.map(logged, (19, 100, len(x))):
            assert {name: got[name] for name in want} == pytest.approx(want, rel=1e-7, abs=1e-12)


@pytest.mark.parametrize(("k", "pair"), [(2, (0, 1)), (30, (4, 29)), (1100, (3, 1099)), (1100, (5, 6))])
def test_most_alike(k, pair):
    x = torch.from_numpy(unit_rows(points(k, 20).numpy()))
    x[pair[1]] = x[pair[0]]
    cosine, found = most_alike(x)
    assert float(cosine) == pytest.approx(1)
    assert tuple(found.tolist()) == pair
