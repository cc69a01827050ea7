"""Simplex ETFs and distances from them, against plain numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_ncgeo.geometry import gram_distance, modality_gap, simplex_etf
from peft_ncgeo.geometry.clusters import cluster_features
from peft_ncgeo.geometry.simplex import (
    clustered_etf_deviation,
    etf_deviation,
    etf_floor,
    simplex_distance,
    welch_bound,
)

from ..losses.batches import unit_rows


def points(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("classes", "dim"), [(2, 1), (2, 7), (3, 2), (10, 9), (10, 64), (31, 30)])
def test_simplex_etf_to_the_last_digit(classes, dim):
    etf = simplex_etf(classes, dim).numpy()
    gram = classes / (classes - 1) * (np.eye(classes) - 1 / classes)
    np.testing.assert_allclose(etf @ etf.T, gram, atol=1e-15, rtol=0)
    np.testing.assert_allclose(etf.sum(0), 0, atol=2e-15 * classes)
    turned = simplex_etf(classes, dim, seed=1).numpy()
    np.testing.assert_allclose(turned @ turned.T, gram, atol=1e-14, rtol=0)


def test_simplex_etf_is_drawn_by_its_seed():
    assert torch.equal(simplex_etf(5, 8, seed=1), simplex_etf(5, 8, seed=1))
    assert not torch.allclose(simplex_etf(5, 8, seed=1), simplex_etf(5, 8, seed=2))
    assert simplex_etf(5, 8, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(("classes", "dim", "message"), [(1, 4, "at least 2"), (6, 4, "at least 5 dimensions")])
def test_simplex_etf_needs_classes_and_room(classes, dim, message):
    with pytest.raises(ValueError, match=message):
        simplex_etf(classes, dim)


def test_floor_of_the_deviation():
    assert etf_floor(12, 4) == pytest.approx(0.17355, abs=5e-6)
    assert etf_floor(5, 4) == 0
    assert etf_floor(4, 4) == 0
    assert etf_floor(7, 4) > 0
    # reached by a tight frame: the eight corners of two orthogonal tetrahedra of opposite sign, a cube's
    cube = torch.tensor([[x, y, z] for x in (1, -1) for y in (1, -1) for z in (1, -1)], dtype=torch.float64)
    assert float(etf_deviation(cube)) == pytest.approx(etf_floor(8, 3), abs=1e-14)
    cosines = unit_rows(cube) @ unit_rows(cube).T
    off = cosines[~torch.eye(8, dtype=torch.bool)]
    assert float(off.square().mean()) == pytest.approx(welch_bound(8, 3), abs=1e-14)


def test_etf_deviation_by_hand():
    x = points(6, 4)
    u = unit_rows(x.numpy())
    expected = np.mean([(u[i] @ u[j] + 1 / 5) ** 2 for i in range(6) for j in range(6) if i != j])
    assert float(etf_deviation(x)) == pytest.approx(expected, rel=1e-12)
    assert float(etf_deviation(simplex_etf(6, 9))) < 1e-30


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_clustered_deviation_by_hand(reduction):
    x, clusters = points(7, 4), [0, 1, 0, 2, 0, 2, 2]  # sizes 3, 1, 3
    u = unit_rows(x.numpy())
    sums = []
    for m in range(3):
        members = [i for i, c in enumerate(clusters) if c == m]
        k = len(members)
        pairs = [(u[i] @ u[j] + 1 / (k - 1)) ** 2 for i in members for j in members if i != j] if k > 1 else []
        sums.append((sum(pairs), k))
    if reduction == "sum":
        expected = sum(s for s, _ in sums) / 3
    else:
        expected = sum(s / (k * (k - 1)) for s, k in sums if k > 1) / 2
    assert float(clustered_etf_deviation(x, torch.tensor(clusters), reduction)) == pytest.approx(expected, rel=1e-12)


def test_clusters_of_one_only_give_zero_with_a_graph():
    x = points(3, 4).requires_grad_()
    for reduction in ("mean", "sum"):
        value = clustered_etf_deviation(x, torch.arange(3), reduction)
        assert value.item() == 0
        value.backward()
        assert torch.isfinite(x.grad).all()


def test_one_cluster_is_the_plain_deviation():
    x = points(6, 4)
    assert float(clustered_etf_deviation(x, torch.zeros(6, dtype=torch.int64))) == pytest.approx(
        float(etf_deviation(x)), rel=1e-14
    )


def test_gram_distance_by_hand_and_its_invariances():
    a, b = points(5, 4), points(5, 7, seed=1)
    grams = [m @ m.T / np.linalg.norm(m @ m.T) for m in (a.numpy(), b.numpy())]
    value = float(gram_distance(a, b))
    assert value == pytest.approx(np.linalg.norm(grams[0] - grams[1]), rel=1e-12)
    rotation = torch.linalg.qr(points(7, 7, seed=2)).Q
    assert float(gram_distance(3 * a, b @ rotation)) == pytest.approx(value, rel=1e-12)
    assert float(gram_distance(a, a)) == 0
    assert float(gram_distance(torch.zeros(5, 2), b)) == pytest.approx(1)
    with pytest.raises(ValueError, match="got 5 and 4"):
        gram_distance(a, b[:4])


def test_gram_distance_has_no_gradient_at_zero():
    a = points(4, 3).requires_grad_()
    gram_distance(a, a.detach()).backward()
    assert a.grad.abs().max() == 0


def test_simplex_distance():
    assert float(simplex_distance(simplex_etf(6, 8) @ simplex_etf(6, 8).T)) < 1e-15
    gram = (points(4, 4) @ points(4, 4).T).numpy()
    expected = np.linalg.norm(gram / np.linalg.norm(gram) - (np.eye(4) - 0.25) / np.sqrt(3))
    assert float(simplex_distance(torch.from_numpy(gram))) == pytest.approx(expected, rel=1e-12)
    simplex = torch.eye(5, dtype=torch.float64) - 1 / 5
    assert simplex_distance(-simplex).item() == pytest.approx(2)
    assert simplex_distance(torch.zeros(3, 3)).item() == pytest.approx(1)
    assert torch.autograd.gradcheck(simplex_distance, points(5, 5).requires_grad_())
    assert simplex_distance(simplex.bfloat16()).dtype == torch.float32
    for shape in ((3,), (3, 4), (1, 1)):
        with pytest.raises(ValueError, match="gram must be a matrix"):
            simplex_distance(torch.zeros(shape))


def test_modality_gap():
    a, b = points(5, 4), points(9, 4, seed=1)
    expected = np.linalg.norm(unit_rows(a.numpy()).mean(0) - unit_rows(b.numpy()).mean(0))
    assert float(modality_gap(a, b)) == pytest.approx(expected, rel=1e-12)


def test_clusters_are_found_and_numbered_by_first_appearance():
    centres = 10 * torch.eye(3, dtype=torch.float64)
    true = torch.tensor([2, 0, 0, 1, 2, 1, 0, 2])
    x = centres[true] * torch.linspace(0.5, 3, 8, dtype=torch.float64)[:, None] + 0.1 * points(8, 3)
    found = cluster_features(x, 3, seed=4)
    assert found.tolist() == [0, 1, 1, 2, 0, 2, 1, 0]
    assert torch.equal(found, cluster_features(x, 3, seed=4))
    assert cluster_features(x, 8).unique().numel() == 8
    assert cluster_features(x, 1).tolist() == [0] * 8


def test_empty_clusters_are_removed():
    x = torch.eye(2, dtype=torch.float64).repeat(3, 1)  # two different points
    assert cluster_features(x, 4).tolist() == [0, 1, 0, 1, 0, 1]
    for number in (0, 7):
        with pytest.raises(ValueError, match="at least 1 and at most 6"):
            cluster_features(x, number)
