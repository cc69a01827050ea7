"""Neural collapse's numbers are their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from peft_ncgeo.geometry import NeuralCollapse

from .collapse_problems import ALL, CASES, STATISTICS, covariances, expected, problem, streamed


def simplex_means(k: int, dim: int) -> torch.Tensor:
    """Rows of a simplex ETF of length 3 each, in a random subspace."""
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(0)).double())[0]
    rows = torch.zeros(k, dim, dtype=torch.float64)
    rows[:, :k] = (torch.eye(k, dtype=torch.float64) - 1 / k) * math.sqrt(k / (k - 1))
    return 3 * rows @ rotation


@pytest.mark.parametrize("name", CASES)
def test_every_number_is_its_formula(name):
    counts, dim = CASES[name]
    x, y, weights, bias = problem(counts, dim)
    collapse = streamed(x, y, len(counts))
    for arguments in (
        {"weights": weights, "bias": bias},
        {"weights": weights, "bias": 4 * bias},
        {"weights": weights},
        {"weights": weights, "center_weights": False},
        {},
    ):
        got, want = collapse.compute(**arguments), expected(x, y, **arguments)
        assert got.keys() == (ALL if arguments else STATISTICS)
        assert all(type(value) is float for value in got.values())
        assert got == pytest.approx(want, rel=1e-8, abs=1e-12)


def test_reference_data_tell_the_numbers_apart():
    """The test above needs this: no number sits at an end of its range, and each argument matters."""
    for name, (counts, dim) in CASES.items():
        x, y, weights, bias = problem(counts, dim)
        plain, biased = expected(x, y, weights), expected(x, y, weights, 4 * bias)
        uncentered = expected(x, y, weights, center_weights=False)
        assert 0 < plain["nc4"] < 1
        assert plain["nc4"] != biased["nc4"]
        assert abs(plain["nc3_cosine"] - uncentered["nc3_cosine"]) > 1e-3
        if name != "two classes":  # whose means are always a simplex
            assert abs(plain["nc3"] - uncentered["nc3"]) > 1e-3
            assert min(plain[key] for key in STATISTICS) > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_fixture_gram_route_of_nc1(name):
    """`tr(S_B^+ S_W)/K' = tr((G^+)^2 M S_W M^T)`."""
    counts, dim = CASES[name]
    x, y, _, _ = problem(counts, dim)
    classes, mu, mu_g, within, between = covariances(x.numpy(), y.numpy())
    m = np.array([mu[c] - mu_g for c in classes])
    inverse = np.linalg.pinv(m @ m.T, rcond=1e-10, hermitian=True)
    right = np.trace(inverse @ inverse @ m @ within @ m.T)
    assert right == pytest.approx(np.trace(np.linalg.pinv(between, rcond=1e-10) @ within) / len(classes), rel=1e-8)
    assert streamed(x, y, len(counts)).compute()["nc1"] == pytest.approx(right, rel=1e-8)


def test_nc1_where_means_span_less_than_they_could():
    """Two equal class means among five, all in a plane: directions without spread between classes do not count."""
    rng = np.random.default_rng(1)
    means = np.zeros((5, 6))
    means[:, :2] = rng.normal(size=(5, 2))
    means[4] = means[3]
    noise = rng.normal(size=(20, 6))
    x = torch.from_numpy(np.concatenate([m + s * noise for m in means for s in (1, -1)]))
    y = torch.arange(5).repeat_interleave(40)
    got = streamed(x, y, 5).compute()
    assert got["nc1"] == pytest.approx(expected(x, y)["nc1"], rel=1e-8)


@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_collapsed_data(offset):
    means = simplex_means(6, 9)
    y = torch.arange(6).repeat_interleave(torch.tensor([7, 1, 4, 2, 2, 9]))
    collapse = streamed((means + offset)[y], y, 6)
    bias = -offset * means.sum(1)  # a linear classifier of the shifted means
    got = collapse.compute(means, bias)
    want = dict.fromkeys(ALL, 0.0) | {"nc3_cosine": 1.0, "nc4": 1.0}
    assert got == pytest.approx(want, abs=1e-10)
    # weights' common part is nothing to a centred classifier, and something to the others
    shifted = collapse.compute(means + 1.5)
    assert shifted["nc3"] == pytest.approx(0, abs=1e-10)
    assert collapse.compute(means + 1.5, center_weights=False)["nc3"] > 0.1


def test_weights_turned_away_from_means():
    means = simplex_means(4, 6)
    y = torch.arange(4).repeat(3)
    got = streamed(means[y], y, 4).compute(-means)
    assert got["nc3"] == pytest.approx(2)
    assert got["nc3_cosine"] == pytest.approx(-1)
    assert got["nc4"] == 0


def test_scale_of_weights_and_features_makes_no_difference():
    x, y, weights, _ = problem([9, 5, 7, 3], 6)
    want = streamed(x, y, 4).compute(weights)
    assert streamed(x, y, 4).compute(1e5 * weights) == pytest.approx(want, rel=1e-9)
    assert streamed(1e-5 * x, y, 4).compute(weights) == pytest.approx(want, rel=1e-9)
    assert streamed(x, y, 4).compute(weights.roll(1, 0))["nc3"] != pytest.approx(want["nc3"], rel=1e-2)


def test_nc1_and_its_trace_form_are_different_numbers():
    """Spread along the shorter axis of the between-class covariance, by hand."""
    means = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.5], [0.0, -0.5]])
    x = torch.cat([means + torch.tensor([0.0, s]) for s in (2.0, -2.0)])
    got = NeuralCollapse(4, 2).update(x, torch.arange(4).repeat(2)).compute()
    # S_B = diag(1/2, 1/8), S_W = diag(0, 4)
    assert got["nc1"] == pytest.approx(4 / (1 / 8) / 4)
    assert got["nc1_trace"] == pytest.approx(4 / (5 / 8))


def test_classifier_may_name_an_absent_class():
    """NC4's nearest means are of the present classes, its classifier has all: naming an absent class disagrees."""
    x = torch.tensor([[1.0, 0.0], [1.0, 0.2], [-1.0, 0.0], [-1.0, 0.2]])
    weights = torch.tensor([[1.0, 0.0], [9.0, 0.0], [-1.0, 0.0]])
    collapse = NeuralCollapse(3, 2).update(x, torch.tensor([0, 0, 2, 2]))
    assert collapse.compute(weights)["nc4"] == 0.5
    assert collapse.compute(weights, bias=torch.tensor([0.0, -99.0, 0.0]))["nc4"] == 1


def test_kept_samples():
    x, y, weights, bias = problem([20, 11, 5, 3, 6], 8)
    kept, own = streamed(x, y, 5).compute(weights, bias), x.clone()
    unkept = streamed(own, y, 5, keep_samples=False)
    assert not unkept._samples
    assert unkept.compute(weights, bias) == {key: value for key, value in kept.items() if key != "nc4"}
    collapse = streamed(own, y, 5)
    own.zero_()  # the caller's buffer is the caller's
    assert collapse.compute(weights, bias) == kept


def test_many_samples_are_all_compared():
    """More in one batch than are scored at a time."""
    x, y, weights, _ = problem([3000, 2000, 1500], 3)
    assert streamed(x, y, 3, batch=len(x)).compute(weights)["nc4"] == expected(x, y, weights)["nc4"]


def test_no_gradient_is_kept():
    x, y, weights, _ = problem([5, 4, 8], 4)
    collapse = streamed(x.requires_grad_(), y, 3)
    assert not collapse.class_means.requires_grad
    assert collapse.compute(weights.requires_grad_()) == pytest.approx(
        expected(x.detach(), y, weights.detach()), rel=1e-9
    )


@pytest.mark.parametrize("case", ["empty", "one class", "equal means", "zero means", "equal features"])
def test_undefined_is_nan_with_one_warning(case):
    x, y, weights, _ = problem([6, 6, 6], 4)
    collapse = NeuralCollapse(3, 4)
    if case == "one class":
        collapse.update(x, torch.ones_like(y))
    elif case == "equal means":  # up to rounding
        for label, parts in enumerate((x.split(3), x.split(5), x.flip(0).split(7))):
            for part in parts:
                collapse.update(part + 0.1, torch.full((len(part),), label))
    elif case == "zero means":  # up to rounding, and the first batch's is the origin
        for label, rows in enumerate((x, x.roll(5, 0), x / 3)):
            collapse.update(torch.cat([rows, -rows.flip(0)]), torch.full((36,), label))
        assert collapse.class_means.any()
    elif case == "equal features":
        for batch in (1, 3, 2, 7):
            collapse.update(torch.full((batch, 4), 0.1), torch.arange(batch) % 3)
    with pytest.warns(UserWarning, match="every value is nan") as caught:
        got = collapse.compute(weights)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert got.keys() == ALL
    assert all(math.isnan(value) for value in got.values())
    with pytest.warns(UserWarning, match="every value is nan"):
        assert collapse.compute().keys() == STATISTICS


def test_head_of_equal_rows_has_no_direction():
    x, y, _, _ = problem([6, 6, 6], 4)
    collapse = streamed(x, y, 3)
    for row in (torch.zeros(4), torch.full((4,), 0.1)):
        with pytest.warns(UserWarning, match="nc3, nc3_cosine undefined") as caught:
            got = collapse.compute(row.expand(3, 4))
        assert len(caught) == 1
        assert {key for key, value in got.items() if math.isnan(value)} == {"nc3", "nc3_cosine"}


def test_class_mean_at_the_mean_of_means_has_no_direction():
    x = torch.tensor([[0.1, 0.2], [0.2, 0.3], [0.3, 0.4]], dtype=torch.float64)
    with pytest.warns(UserWarning, match="nc2_cosine, nc3_cosine undefined"):
        got = NeuralCollapse(3, 2).update(x, torch.arange(3)).compute(torch.eye(3, 2))
    assert math.isnan(got["nc2_cosine"])
    assert got["nc2_norm_spread"] == pytest.approx(math.sqrt(2) / 2)
