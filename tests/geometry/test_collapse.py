"""NC1-NC4 against a float64 recomputation in numpy from the formulas; streams and processes give the same."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from peft_ncgeo.geometry import NeuralCollapse

STATISTICS = {"nc1", "nc1_trace", "nc2", "nc2_norm_spread", "nc2_cosine"}
ALL = STATISTICS | {"nc3", "nc3_cosine", "nc4"}
# counts of each class, d
CASES = {
    "few classes": ([5, 5, 5, 5], 7),
    "K = d + 1": ([6, 6, 6, 6, 6], 4),
    "many classes": ([4] * 9, 3),
    "imbalanced": ([40, 13, 3, 1, 1], 6),
    "absent": ([0, 9, 4, 0, 2, 7, 0], 5),
    "absent, many": ([3, 0, 8, 5, 2, 2, 0, 6, 4], 3),
    "two classes": ([6, 3], 4),
}


def problem(counts: list[int], dim: int, seed: int = 0, noise: float = 1.0):
    """Shuffled features and labels, a classifier that agrees with the means on some samples, and its bias."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(len(counts), dim)) + 0.3
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    features = means[labels] + noise * rng.normal(size=(len(labels), dim))
    weights = means + 0.7 * rng.normal(size=means.shape) + 1
    bias = 0.5 * rng.normal(size=len(counts))
    return [torch.from_numpy(a) for a in (features, labels, weights, bias)]


def frobenius_from_simplex(a: np.ndarray) -> float:
    k, total = len(a), math.sqrt(sum(v * v for v in a.flatten()))
    target = np.array([[(i == j) - 1 / k for j in range(k)] for i in range(k)]) / math.sqrt(k - 1)
    return math.sqrt(sum(v * v for v in (a / total - target).flatten()))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def covariances(x: np.ndarray, y: np.ndarray) -> tuple[list[int], dict, np.ndarray, np.ndarray, np.ndarray]:
    """Classes present, their means, mu_G, S_W and S_B, sample by sample."""
    classes = sorted(set(y.tolist()))
    mu = {c: sum(x[i] for i in range(len(y)) if y[i] == c) / (y == c).sum() for c in classes}
    mu_g = sum(mu.values()) / len(classes)
    within = sum(np.outer(x[i] - mu[c], x[i] - mu[c]) for i, c in enumerate(y.tolist())) / len(y)
    between = sum(np.outer(m - mu_g, m - mu_g) for m in mu.values()) / len(classes)
    return classes, mu, mu_g, within, between


def expected(x, y, weights=None, bias=None, center_weights=True) -> dict[str, float]:
    x, y = x.double().numpy(), y.numpy()
    classes, mu, mu_g, within, between = covariances(x, y)
    k = len(classes)
    m = {c: mu[c] - mu_g for c in classes}
    lengths = [math.sqrt(m[c] @ m[c]) for c in classes]
    mean_length = sum(lengths) / k
    pairs = [(c, e) for c in classes for e in classes if c != e]
    result = {
        "nc1": np.trace(np.linalg.pinv(between, rcond=1e-10) @ within) / k,
        "nc1_trace": np.trace(within) / np.trace(between),
        "nc2": frobenius_from_simplex(np.array([[m[c] @ m[e] for e in classes] for c in classes])),
        "nc2_norm_spread": math.sqrt(sum((v - mean_length) ** 2 for v in lengths) / k) / mean_length,
        "nc2_cosine": sum(abs(cosine(m[c], m[e]) + 1 / (k - 1)) for c, e in pairs) / len(pairs),
    }
    if weights is not None:
        weights = weights.double().numpy()
        bias = np.zeros(len(weights)) if bias is None else bias.double().numpy()
        average = sum(weights[c] for c in classes) / k if center_weights else 0
        w = {c: weights[c] - average for c in classes}
        result["nc3"] = frobenius_from_simplex(np.array([[w[c] @ m[e] for e in classes] for c in classes]))
        result["nc3_cosine"] = sum(cosine(w[c], m[c]) for c in classes) / k
        named = [max(range(len(weights)), key=lambda c: weights[c] @ row + bias[c]) for row in x]
        nearest = [min(classes, key=lambda c: ((row - mu[c]) ** 2).sum()) for row in x]
        result["nc4"] = sum(a == b for a, b in zip(named, nearest, strict=True)) / len(x)
    return result


def streamed(features, labels, num_classes: int, batch: int = 7, **arguments) -> NeuralCollapse:
    collapse = NeuralCollapse(num_classes, features.shape[1], **arguments)
    for x, y in zip(features.split(batch), labels.split(batch), strict=True):
        assert collapse.update(x, y) is collapse
    return collapse


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
    """What the test above rests on: no number sits at an end, and each argument matters."""
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


def test_batches_make_no_difference():
    x, y, weights, bias = problem([20, 11, 0, 3, 6], 8)
    once = streamed(x, y, 5, batch=len(x))
    for batch in (1, 3, 17):
        many = streamed(x, y, 5, batch=batch)
        assert many.counts.tolist() == [20, 11, 0, 3, 6]
        torch.testing.assert_close(many.class_means, once.class_means, equal_nan=True, rtol=1e-12, atol=1e-12)
        assert many.compute(weights, bias) == pytest.approx(once.compute(weights, bias), rel=1e-10)


def test_order_makes_no_difference():
    x, y, weights, bias = problem([20, 11, 5, 3, 6], 8)
    want = streamed(x, y, 5).compute(weights, bias)
    by_class = y.argsort()
    for order in (by_class, by_class.flip(0), torch.arange(len(y)).flip(0)):
        assert streamed(x[order], y[order], 5).compute(weights, bias) == pytest.approx(want, rel=1e-10)


def test_counts_and_means():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [10.0, 0.0]])
    collapse = NeuralCollapse(3, 2).update(x, torch.tensor([2, 2, 0]))
    assert collapse.counts.tolist() == [1, 0, 2]
    assert collapse.counts.dtype == torch.int64
    assert collapse.class_means.dtype == torch.float64
    assert collapse.class_means[[0, 2]].tolist() == [[10.0, 0.0], [2.0, 3.0]]
    assert collapse.class_means[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_features_are_summed_in_float64(dtype):
    """Also under autocast, and with weights as narrow."""
    x, y, weights, bias = (t.to(dtype) if t.is_floating_point() else t for t in problem([300, 200, 90, 10], 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = streamed(x, y.int(), 4).compute(weights, bias)
    assert got == pytest.approx(expected(x, y, weights, bias), rel=1e-9)


def test_offset_costs_no_precision():
    """Small spread around a common vector of length 1e4 sqrt(d)."""
    x, y, _, _ = problem([20, 11, 5, 3, 6], 8)
    x = 1e-3 * x
    want = expected(x, y)
    assert streamed(x + 1e4, y, 5).compute() == pytest.approx(want, rel=1e-6)


def test_nearest_mean_survives_an_offset():
    x, y, weights, _ = problem([20, 11, 5, 3, 6], 8)
    want = expected(x, y, weights)["nc4"]
    shift = torch.full((8,), 1e6, dtype=torch.float64)
    got = streamed(x + shift, y, 5).compute(weights, bias=-weights @ shift)
    assert got["nc4"] == want


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


def test_bad_batches_are_refused_and_leave_nothing():
    x, y, _, _ = problem([6, 6, 6], 4)
    collapse = streamed(x, y, 3)
    before, means = collapse.compute(), collapse.class_means
    nan = x.clone()
    nan[4, 2], nan[7, 1] = math.nan, math.inf
    for features, labels, message in (
        (x[:, :3], y, r"features must have shape \(B, 4\), got \(18, 3\)"),
        (x[0], y[:1], r"features must have shape \(B, 4\), got \(4,\)"),
        (x, y[:5], "labels must be 18 integers"),
        (x, y[:, None], "labels must be 18 integers"),
        (x, y.double(), "got torch.float64"),
        (x, torch.where(y == 2, 3, y), r"labels must be in 0..2, got 3"),
        (x, torch.where(y == 0, -1, y), r"labels must be in 0..2, got -1"),
        (nan, y, "features has non-finite entries in 2 rows, first in row 4"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            collapse.update(features, labels)
        assert "\n" not in str(error.value)
    assert collapse.compute() == before
    assert torch.equal(collapse.class_means, means)
    assert sum(len(samples) for samples in collapse._samples) == 18


def test_empty_batch_changes_nothing():
    x, y, weights, _ = problem([6, 6, 6], 4)
    collapse = NeuralCollapse(3, 4).update(x[:0], y[:0]).update(x, y).update(x[:0], y[:0])
    assert collapse.compute(weights) == streamed(x, y, 3, batch=18).compute(weights)


def test_bad_classifiers_are_refused():
    x, y, weights, bias = problem([6, 6, 6], 4)
    collapse = streamed(x, y, 3)
    wrong = weights.clone()
    wrong[1, 1] = math.inf
    for arguments, message in (
        ((weights.T,), r"weights must have shape \(3, 4\), got \(4, 3\)"),
        ((weights[:2],), "weights must have shape"),
        ((wrong,), "weights has non-finite entries"),
        ((weights, bias[:2]), r"bias must have shape \(3,\), got \(2,\)"),
        ((weights, bias * math.nan), "bias has non-finite entries"),
        ((None, bias), "bias was given without weights"),
    ):
        with pytest.raises(ValueError, match=message):
            collapse.compute(*arguments)


def test_bad_sizes_are_refused():
    for sizes in ((0, 4), (3, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            NeuralCollapse(*sizes)


def distributed_problem():
    """Far from the origin and, in the second half, from the first's mean."""
    x, y, weights, bias = problem([20, 11, 0, 3, 6], 8)
    x = torch.where(torch.arange(len(x))[:, None] < 25, x, x + 2) + 1e4
    return x, y, weights, bias - weights.sum(1) * 1e4


def _reduce(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", world_size=2, rank=rank)
    x, y, weights, bias = distributed_problem()
    results = {}
    for cut in (25, 0):  # at 0 the first process has no sample
        own = slice(0, cut) if rank == 0 else slice(cut, None)
        collapse = NeuralCollapse(5, 8).update(x[own], y[own])
        assert collapse.all_reduce() is collapse
        results[cut] = (collapse.counts, collapse.class_means, collapse.compute(weights, bias))
    refusals = []
    for call in (lambda: collapse.update(x, y), collapse.all_reduce):
        try:
            call()
        except RuntimeError as error:
            refusals.append(str(error).split(":")[0])
    own = slice(0, 25) if rank == 0 else slice(25, None)
    alone = NeuralCollapse(5, 8).update(x[own], y[own]).compute(weights, bias)  # not asked to reduce
    torch.save((results, refusals, alone), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    mp.spawn(_reduce, args=(str(tmp_path),), nprocs=2)
    x, y, weights, bias = distributed_problem()
    one = NeuralCollapse(5, 8).update(x, y)
    assert one.all_reduce() is one  # no processes: nothing happens
    one.update(x[:0], y[:0])
    want = one.compute(weights, bias)
    assert 0 < want["nc4"] < 1
    for rank in range(2):
        results, refusals, alone = torch.load(tmp_path / f"{rank}.pt")
        for counts, means, numbers in results.values():
            assert counts.tolist() == [20, 11, 0, 3, 6]
            torch.testing.assert_close(means, one.class_means, equal_nan=True, rtol=1e-14, atol=0)
            assert numbers == pytest.approx(want, rel=1e-9)
        assert refusals == ["update after all_reduce", "all_reduce after all_reduce"]
        own = slice(0, 25) if rank == 0 else slice(25, None)
        assert alone == pytest.approx(NeuralCollapse(5, 8).update(x[own], y[own]).compute(weights, bias))
