"""Prototypes of a given geometry, against plain numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_ncgeo.geometry import minority_margin
from peft_ncgeo.geometry.prototypes import prototypes_from_gram

from ..losses.batches import unit_rows
from .test_simplex import points


def simplex(k: int) -> np.ndarray:
    return k / (k - 1) * (np.eye(k) - 1 / k)


@pytest.mark.parametrize(("classes", "rank", "dim"), [(2, 1, 1), (5, 3, 3), (5, 3, 9), (6, 6, 6), (40, 12, 13)])
def test_gram_matrix_is_met(classes, rank, dim):
    rows = unit_rows(points(classes, rank))
    prototypes = prototypes_from_gram(rows @ rows.T, dim)
    assert prototypes.shape == (classes, dim)
    assert prototypes.dtype == torch.float64
    np.testing.assert_allclose(prototypes @ prototypes.T, rows @ rows.T, atol=1e-14)
    np.testing.assert_allclose(np.linalg.norm(prototypes, axis=1), 1, atol=1e-15)
    assert torch.equal(prototypes, prototypes_from_gram((rows @ rows.T).clone(), dim))


def test_signs_are_fixed_and_small_eigenvalues_kept():
    rows = unit_rows(points(6, 4))
    prototypes = prototypes_from_gram(rows @ rows.T, 4)
    largest = prototypes.abs().argmax(0)
    assert (prototypes.gather(0, largest[None]) > 0).all()
    flat = points(5, 2)
    rows = unit_rows(torch.cat([flat, 1e-5 * points(5, 1, seed=1)], 1))  # an eigenvalue of 1e-10 of the largest
    np.testing.assert_allclose(
        prototypes_from_gram(rows @ rows.T, 4) @ prototypes_from_gram(rows @ rows.T, 4).T, rows @ rows.T, atol=1e-14
    )
    float32 = torch.from_numpy(simplex(9)).float()
    found = prototypes_from_gram(float32, 8)
    np.testing.assert_allclose(found @ found.T, simplex(9), atol=1e-6)


def test_what_is_no_gram_matrix():
    eye = torch.eye(3, dtype=torch.float64)
    skew, indefinite, long = eye.clone(), eye.clone(), eye.clone()
    skew[0, 1] = 0.5
    indefinite[0, 1] = indefinite[1, 0] = 1.5
    long[1, 1] = 1.2
    for gram, dim, message in (
        (eye[:2], 3, "square"),
        (eye[0], 3, "square"),
        (torch.zeros(0, 0), 3, "square"),
        (skew, 3, "symmetric"),
        (long, 3, r"gram\[1, 1\] is 1.2"),
        (indefinite, 3, "smallest eigenvalue is -0.5"),
        (eye, 2, "rank 3.*2 dimensions"),
        (eye * float("nan"), 3, "non-finite"),
    ):
        with pytest.raises(ValueError, match=message):
            prototypes_from_gram(gram, dim)


def margin_gram(counts, strength: float) -> np.ndarray:
    """The closed form, entry by entry."""
    n = np.array(counts, dtype=np.float64)
    p = n**-strength / (n**-strength).sum()
    k, square = len(p), p @ p
    gram = np.eye(k)
    for i in range(k):
        for j in range(k):
            if i != j:
                scale = np.sqrt((1 - 2 * p[i] + square) * (1 - 2 * p[j] + square))
                gram[i, j] = (square - p[i] - p[j]) / scale
    return gram


@pytest.mark.parametrize("counts", [(5, 1), (100, 30, 10, 3, 1), (1280, 5, 5, 1280, 77, 20)])
@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0])
def test_minority_margin_by_hand(counts, strength):
    k = len(counts)
    for dim in (k - 1, k, k + 5):
        prototypes = minority_margin(counts, dim, strength)
        assert prototypes.shape == (k, dim)
        np.testing.assert_allclose(prototypes @ prototypes.T, margin_gram(counts, strength), atol=1e-13)
        assert torch.equal(prototypes, minority_margin(torch.tensor(counts), dim, strength))


@pytest.mark.parametrize(("counts", "strength"), [((7, 7, 7, 7), 0.8), ((100, 30, 10, 3), 0.0), ((1, 900), 0.5)])
def test_equal_counts_no_strength_or_two_classes_give_the_simplex(counts, strength):
    prototypes = minority_margin(counts, 6, strength)
    np.testing.assert_allclose(prototypes @ prototypes.T, simplex(len(counts)), atol=1e-14)


def test_rarer_classes_are_further_from_all():
    counts = torch.tensor([500, 200, 100, 50, 20, 10])
    gram = minority_margin(counts, 8).numpy()
    angles = np.arccos(np.clip(gram @ gram.T, -1, 1))
    mean = angles.sum(1)
    assert (np.diff(mean) > 0).all()
    rng = np.random.default_rng(0)
    for _ in range(200):
        k = int(rng.integers(3, 9))
        counts = np.exp(rng.uniform(0, 6, k)).round()
        rarer, i = counts.copy(), int(rng.integers(k))
        counts[i] += 3
        before, after = ((x @ x.T).numpy() for x in (minority_margin(n, k) for n in (counts, rarer)))
        others = np.arange(k) != i
        assert (after[i, others] < before[i, others]).all()
    stronger = [float((x @ x.T)[-1, 0]) for x in (minority_margin((100, 100, 1), 2, s) for s in (0, 0.2, 0.5, 1, 2))]
    assert stronger == sorted(stronger, reverse=True)


def test_extreme_counts_keep_their_digits():
    """Almost all of p on one class: in the limit the others meet at 60 degrees, and it opposes their mean."""
    counts = (10**6, 10**6, 10**6, 1)
    x = minority_margin(counts, 3, strength=2.0)
    gram = (x @ x.T).numpy()
    np.testing.assert_allclose(gram[np.triu_indices(3, 1)], 0.5, atol=1e-10)
    np.testing.assert_allclose(gram[3, :3], -np.sqrt(4 / 6), atol=1e-10)


def test_minority_margin_refuses():
    for arguments, message in (
        (((5,), 4), "at least 2 classes"),
        (([[5, 3]], 4), "at least 2 classes"),
        (((5, 0, 3), 4), r"class_counts\[1\] is 0"),
        (((5, 2, -3), 4), r"class_counts\[2\] is -3"),
        (((5, float("nan"), 3), 4), r"class_counts\[1\] is nan"),
        (((5, 4, 3, 2, 1), 3), "at least 4 dimensions, got 3.*0.1667"),
        (((5, 4), 3, -0.5), "strength=-0.5"),
        (((5, 4), 3, float("nan")), "strength=nan"),
        (((5, 4), 3, float("inf")), "strength=inf"),
        (((10**6, 10**6, 1), 3, 100.0), "strength=100.0 is too large"),
    ):
        with pytest.raises(ValueError, match=message):
            minority_margin(*arguments)
