"""Metrics of any predictions: the right share, or one line that says what they are not."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_ncgeo.evaluation import GroupAccuracyMetric, NeuralCollapseMetric, evaluate_groups, harmonic_mean
from peft_ncgeo.metrics.accuracy import accuracy, balanced_accuracy, class_groups

from ..profiles import cases
from .outcomes import said_well
from .tensors import features, seeds

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

KINDS = ("int8", "uint8", "int32", "int64", "float32", "float64")
NO_ARRAYS = (
    None,
    "cat",
    [[0, 1], [0]],
    {"a": 1},
    object(),
    [None, 1],
    [0.5, 1.0],
    [math.nan, 0.0],
    [1j, 0.0],
    np.zeros((2, 1)),
    np.zeros((2, 3)),
    [],
    torch.zeros(2, requires_grad=True),
    [0, 1, 0],
    ["cat", "dog"],
)
NO_THRESHOLDS = (
    *(None, "halves", 3, (1,), (1, 2, 3), (2, 1), (1, 1)),
    *((math.nan, 2), ("a", "b"), (None, 1), [[1, 2], [3, 4]], {1, 2}),
)


@st.composite
def pairs(draw, classes: int = 5, fewest: int = 1):
    """Predictions and labels (N,), as arrays of any dtype, lists or tensors."""
    n = draw(st.integers(fewest, 12))
    values = [draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n)) for _ in range(2)]
    form = draw(st.sampled_from(["list", "tensor", *KINDS]))
    make = {"list": list, "tensor": torch.tensor}.get(form, lambda v: np.array(v, dtype=form))
    return values, [make(v) for v in values]


@given(pairs())
def test_accuracies_count(drawn):
    (predictions, labels), given_ = drawn
    right = [p == y for p, y in zip(predictions, labels, strict=True)]
    assert accuracy(*given_) == pytest.approx(sum(right) / len(right))
    shares = []
    for c in set(labels):
        own = [r for r, y in zip(right, labels, strict=True) if y == c]
        shares.append(sum(own) / len(own))
    assert balanced_accuracy(*given_) == pytest.approx(sum(shares) / len(shares))


@given(pairs())
def test_names_count_as_indices_do(drawn):
    (predictions, labels), _ = drawn
    names = [[f"class {c}" for c in values] for values in (predictions, labels)]
    assert accuracy(*names) == accuracy(predictions, labels)
    assert balanced_accuracy(*names) == balanced_accuracy(predictions, labels)


@given(
    wrong=st.sampled_from(range(len(NO_ARRAYS))),
    first=st.booleans(),
    measure=st.sampled_from([accuracy, balanced_accuracy]),
)
def test_what_is_no_row_of_classes_is_refused(wrong, first, measure):
    arguments = [NO_ARRAYS[wrong], [0, 1]] if first else [[0, 1], NO_ARRAYS[wrong]]
    assert said_well(lambda: measure(*arguments)) is None
    counts = [3, 30]
    assert said_well(lambda: evaluate_groups(*arguments, counts)) is None


@given(base=st.floats(0, 1e300), new=st.floats(0, 1e300))
def test_the_harmonic_mean_of_any_numbers(base, new):
    b, n = Fraction(base), Fraction(new)
    expected = float(2 * b * n / (b + n)) if b + n else 0.0
    assert harmonic_mean(base, new) == pytest.approx(expected, rel=1e-12, abs=1e-322)
    assert harmonic_mean(base, new) == harmonic_mean(new, base)


@given(
    value=st.sampled_from([-0.1, math.nan, math.inf, -math.inf, "0.5", None, [0.5], 1j]),
    other=st.floats(0, 1),
    first=st.booleans(),
)
def test_no_accuracy_has_no_harmonic_mean(value, other, first):
    assert said_well(lambda: harmonic_mean(*((value, other) if first else (other, value)))) is None


@given(data=st.data(), counts=st.lists(st.integers(0, 200), min_size=1, max_size=9), thirds=st.booleans())
def test_groups_part_the_classes_and_their_accuracies_count(data, counts, thirds):
    low = data.draw(st.integers(0, 100))
    thresholds = "thirds" if thirds else (low, low + data.draw(st.integers(1, 100)))
    groups = class_groups(counts, thresholds)
    assert sorted(np.concatenate(list(groups.values())).tolist()) == list(range(len(counts)))
    if not thirds:
        for c, count in enumerate(counts):
            group = "many" if count > thresholds[1] else "few" if count <= low else "medium"
            assert c in groups[group]
    (predictions, labels), given_ = data.draw(pairs(len(counts), fewest=0))
    results = evaluate_groups(*given_, counts, thresholds)
    for name, members in groups.items():
        right = [p == y for p, y in zip(predictions, labels, strict=True) if y in members]
        assert results[name] == (pytest.approx(sum(right) / len(right)) if right else None)


@given(
    counts=st.one_of(
        st.sampled_from([None, "many", [], [[1, 2]], 3, ["1", "2"], [1j], [True, False], object(), [[1], [1, 2]]]),
        st.lists(st.sampled_from([1.0, -1.0, math.nan, math.inf]), min_size=1).filter(lambda v: set(v) != {1.0}),
    )
)
def test_what_is_no_count_of_classes_is_refused(counts):
    assert said_well(lambda: class_groups(counts)) is None
    assert said_well(lambda: evaluate_groups([0], [0], counts)) is None


@given(st.sampled_from(NO_THRESHOLDS))
def test_no_thresholds_are_refused(thresholds):
    assert said_well(lambda: class_groups([1, 50, 500], thresholds)) is None


@given(labels=st.lists(st.sampled_from([0, 1, -1, -100, 2, 10**12]), min_size=1).filter(lambda v: set(v) - {0, 1}))
def test_labels_outside_the_classes_are_refused(labels):
    assert said_well(lambda: evaluate_groups([0] * len(labels), labels, [1, 50])) is None


def test_a_hundred_thousand_classes():
    rng = np.random.default_rng(0)
    counts, labels = rng.integers(0, 300, 100_000), rng.integers(0, 100_000, 20_000)
    predictions = np.where(rng.random(20_000) < 0.5, labels, 0)
    right = predictions == labels
    results = evaluate_groups(predictions, labels, counts)
    assert results["many"] == pytest.approx(right[counts[labels] > 100].mean())
    shares = np.zeros(100_000)
    np.add.at(shares, labels, right)
    sizes = np.bincount(labels, minlength=100_000)
    assert balanced_accuracy(predictions, labels) == pytest.approx((shares[sizes > 0] / sizes[sizes > 0]).mean())


@cases(0.2)
@given(data=st.data())
def test_the_metrics_of_evaluate_say_the_same(data):
    counts = data.draw(st.lists(st.integers(0, 200), min_size=2, max_size=5))
    (predictions, labels), given_ = data.draw(pairs(len(counts)))
    results = GroupAccuracyMetric().compute(predictions=given_[0], references=given_[1], class_counts=counts)
    assert {k: results[k] for k in ("many", "medium", "few")} == evaluate_groups(predictions, labels, counts)
    assert results["accuracy"] == accuracy(predictions, labels)


@cases(0.2)
@given(data=st.data(), seed=seeds)
def test_the_collapse_metric_is_finite_or_says_why_not(data, seed):
    rng = np.random.default_rng(seed)
    n = data.draw(st.integers(1, 9))
    x = data.draw(features(n, 3, torch.float64))
    labels = rng.integers(data.draw(st.sampled_from([-1, 0])), 3, n)
    heads, no_heads = [None, rng.standard_normal((3, 3))], [np.full((3, 3), np.nan), "head", np.ones(3)]
    k = data.draw(st.integers(0, 4))
    weights = [*heads, *no_heads][k]
    metric = NeuralCollapseMetric()
    results = said_well(lambda: metric.compute(predictions=x.numpy(), references=labels, weights=weights))
    assert (results is None) == (labels.min() < 0 or k >= len(heads))
    assert results is None or not any(math.isinf(value) for value in results.values())
