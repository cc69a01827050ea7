"""Neural collapse is the same however its samples come: batches, orders, precisions, processes."""

from __future__ import annotations

import math

import pytest
import torch

from peft_ncgeo.geometry import NeuralCollapse

from ..launching import launch
from .collapse_problems import distributed_problem, expected, problem, reduce_two, streamed


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


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    assert launch(reduce_two, str(tmp_path), processes=2) == [0, 0]
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
