"""The formulas of `peft_ncgeo.geometry` on anything: the value of a float64 oracle, or one line that says why not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from peft_ncgeo import geometry
from peft_ncgeo.geometry.alignment import alignment, project_gradient, rotate_towards_means, slerp_fraction
from peft_ncgeo.geometry.clusters import cluster_features
from peft_ncgeo.geometry.heads import class_prototypes
from peft_ncgeo.geometry.sphere import l2_normalize

from ..profiles import cases
from . import loss_oracles as oracles
from .outcomes import said_well
from .tensors import NO_NUMBERS, features, no_labels, seeds, spoilt, unit_rows, wide

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

sizes = st.integers(1, 5)


@st.composite
def two(draw, **like):
    """Points (n, d) and (n, d), each of its own dtype and scale."""
    n, d = draw(sizes), draw(sizes)
    return draw(features(n, d, **like)), draw(features(n, d, **like))


def close(value, expected, tolerance=1e-5):
    assert wide(value) == pytest.approx(expected, abs=tolerance, rel=tolerance)


# ---- on the sphere -----------------------------------------------------------------------------------------------


@given(st.data())
def test_unit_rows_have_length_one_or_none(data):
    x = data.draw(features(data.draw(sizes), data.draw(sizes)))
    close(l2_normalize(x), unit_rows(wide(x)))


@given(x=st.floats(-(2.0**127), 2.0**127, width=32), y=st.floats(-(2.0**127), 2.0**127, width=32))
def test_unit_of_any_float32_is_one_long_or_0(x, y):
    point = torch.tensor([x, y])
    value = l2_normalize(point)
    close(value, unit_rows(wide(point)) if point.abs().max() > 1.2e-30 else np.zeros(2))


@given(two())
def test_the_gap_is_the_distance_of_the_centres(points):
    a, b = (unit_rows(wide(x)) for x in points)
    close(geometry.modality_gap(*points), np.linalg.norm(a.mean(0) - b.mean(0)))


@given(points=two(kinds=("normal", "spread")), t=st.floats(-2, 2))
def test_slerp_keeps_lengths_and_turns_by_its_share(points, t):
    a, b = points
    u, v = unit_rows(wide(a)), unit_rows(wide(b))
    turned = geometry.slerp(a, b, t)
    length, largest = np.linalg.norm(wide(a), axis=1), np.abs(wide(a)).max()
    assert np.linalg.norm(wide(turned), axis=1) == pytest.approx(length, rel=1e-5, abs=1e-6 * largest)
    angle = 2 * np.arctan2(np.linalg.norm(u - v, axis=1), np.linalg.norm(u + v, axis=1))
    plane = np.minimum(angle, np.pi - angle) > 1e-3
    between = (unit_rows(wide(turned)) * u).sum(1)
    assert between[plane] == pytest.approx(np.cos(t * angle)[plane], abs=1e-4)


@given(st.data())
def test_alignment_and_rotation_are_those_of_the_formulas(data):
    weights, means = data.draw(two(kinds=("normal", "spread", "one row of 0")))
    fraction, center = data.draw(st.sampled_from([0.0, 0.3, 1.0])), data.draw(st.booleans())
    term = oracles.space_alignment({"class_means": wide(means), "classifier_weight": wide(weights)}, center)
    cosines = alignment(weights, means, center)
    close((1 - cosines).nanmean() if not cosines.isnan().all() else torch.zeros(()), term, 2e-3)
    turned = rotate_towards_means(weights, means, fraction, center=center)
    better = alignment(turned, means, center)
    kept = ~cosines.isnan()
    assert (better[kept] >= cosines[kept] - 1e-4).all()
    length = np.linalg.norm(wide(weights), axis=1)
    assert np.linalg.norm(wide(turned), axis=1) == pytest.approx(length, rel=1e-4, abs=1e-6 * np.abs(length).max())


@given(points=two(), other=seeds, gamma=st.floats(0, 1))
def test_a_projected_gradient_never_turns_rows_faster_away(points, other, gamma):
    weights, means = points
    gradient = torch.from_numpy(np.random.default_rng(other).standard_normal(weights.shape))
    projected = project_gradient(gradient, weights, means, gamma)
    assert projected.isfinite().all()
    assert (projected.norm(dim=1) <= gradient.norm(dim=1) * (1 + 1e-6)).all()


@given(step=st.integers(0, 1000), rest=st.integers(0, 10**9), alpha=st.floats(0, 1))
def test_the_fraction_of_a_step_is_a_share(step, rest, alpha):
    assert 0 <= slerp_fraction(step, max(1, step + rest), alpha) <= 1


# ---- simplices, exponents and collapse ---------------------------------------------------------------------------


@given(k=st.integers(-2, 40), d=st.integers(-2, 40), seed=st.one_of(st.none(), st.integers(-(2**80), 2**80)))
def test_a_simplex_has_its_cosines_or_is_refused(k, d, seed):
    etf = said_well(lambda: geometry.simplex_etf(k, d, seed))
    assert (etf is None) == (k < 2 or d < max(1, k - 1))
    if etf is not None:
        close(etf @ etf.T, np.where(np.eye(k), 1, -1 / (k - 1)), 1e-12)


@given(two())
def test_gram_distances_are_the_formulas(points):
    grams = []
    for x in points:
        x = wide(x) / (np.abs(wide(x)).max() or 1)
        grams.append(x @ x.T / (np.linalg.norm(x @ x.T) or 1))
    close(geometry.gram_distance(*points), np.linalg.norm(grams[0] - grams[1]), 1e-3)


@given(two())
def test_exponents_are_the_formulas_whatever_the_scale(points):
    means, weights = (wide(x) for x in points)
    k = len(means)
    value, best, ratio = (
        geometry.error_exponent(*points),
        geometry.optimal_exponent(points[0]),
        geometry.exponent_ratio(*points),
    )
    if k < 2:
        assert value.isnan()
        assert best.isnan()
        assert ratio.isnan()
        return
    reach = []
    for c in range(k):
        for other in range(k):
            w = weights[c] - weights[other]
            if c != other:
                length = np.linalg.norm(w)
                reach.append(max(0.0, w @ means[c]) / length if length else 0.0)
    least = min(np.linalg.norm(means[c] - means[e]) for c in range(k) for e in range(c))
    assert float(value) == pytest.approx(min(reach) ** 2 / 2, rel=1e-6)
    assert float(best) == pytest.approx(least**2 / 8, rel=1e-6)
    assert ratio.isnan() or 0 <= ratio <= 1
    if not ratio.isnan() and best > 0:
        assert float(ratio) == pytest.approx(min(1.0, float(value / best)), rel=1e-6)


@given(
    counts=st.one_of(
        st.lists(st.sampled_from([1, 2, 100, 10**6, 10**12]), min_size=0, max_size=6),
        st.sampled_from(["many", None, [0, 3], [-1, 3], [math.nan, 1], [math.inf, 1], [[1, 2]], np.ones(100_000)]),
    ),
    dim=st.one_of(st.integers(-1, 8), st.sampled_from(NO_NUMBERS)),
    strength=st.one_of(st.floats(), st.sampled_from([0.0, 0.5, 1e-30, 1e6, *NO_NUMBERS])),
)
def test_margins_are_unit_vectors_or_refused(counts, dim, strength):
    points = said_well(lambda: geometry.minority_margin(counts, dim, strength))
    if points is not None:
        assert points.shape == (len(counts), dim)
        close(points.norm(dim=1), np.ones(len(counts)), 1e-9)
    if (
        isinstance(counts, list)
        and len(counts) > 1
        and isinstance(dim, int)
        and dim >= len(counts)
        and strength == 0.5
    ):
        assert (points is None) == (not all(isinstance(n, int) and n > 0 for n in counts))


@given(st.data())
def test_collapse_is_that_of_all_samples_at_once_and_scales_out(data):
    n, d, k = data.draw(st.integers(1, 12)), data.draw(sizes), data.draw(sizes)
    x = data.draw(features(n, d, torch.float64, kinds=("normal", "duplicated", "constant"), scales=(1.0,)))
    y = torch.from_numpy(np.random.default_rng(data.draw(seeds)).integers(0, k, n))
    weights = data.draw(features(k, d, torch.float64, kinds=("normal",), scales=(1e-30, 1.0, 1e30, 1e150)))
    power = data.draw(st.integers(-80, 80))
    whole = geometry.NeuralCollapse(k, d).update(x, y).compute(weights)
    parts = geometry.NeuralCollapse(k, d)
    for start in range(0, n, 5):
        parts.update(x[start : start + 5] * 2.0**power, y[start : start + 5].to(torch.uint8))
    for name, value in parts.compute(weights).items():
        assert not math.isinf(value)
        if name != "nc4":  # ties
            assert value == pytest.approx(whole[name], rel=1e-6, abs=1e-6, nan_ok=True), name


@given(power=st.sampled_from([-1000, -600, 500, 600, 1000]), seed=seeds)
def test_collapse_of_features_whose_squares_leave_float64_is_refused(power, seed):
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((6, 3)))
    y = torch.arange(6) % 3
    expected = geometry.NeuralCollapse(3, 3).update(x, y).compute()
    found = said_well(lambda: geometry.NeuralCollapse(3, 3).update(x * 2.0**power, y).compute())
    assert found is None or found == pytest.approx(expected)


@given(st.data())
def test_clusters_are_numbered_without_gaps(data):
    k = data.draw(st.integers(1, 8))
    x = data.draw(features(k, data.draw(sizes)))
    number = data.draw(st.one_of(st.integers(-1, 9), st.sampled_from(NO_NUMBERS)))
    found = said_well(lambda: cluster_features(x, number))
    assert (found is None) == (not isinstance(number, int) or not 1 <= number <= k)
    if found is not None:
        assert sorted(set(found.tolist())) == list(range(int(found.max()) + 1))
        assert int(found.max()) < number


@given(st.data())
def test_class_means_are_means(data):
    n, k = data.draw(sizes), data.draw(sizes)
    x = data.draw(features(n, data.draw(sizes)))
    y = torch.from_numpy(np.random.default_rng(data.draw(seeds)).integers(-1, k + data.draw(st.integers(0, 1)), n))
    found = said_well(lambda: class_prototypes(x, y, k))
    assert (found is None) == bool(y.max() >= k)
    if found is not None:
        for c in range(k):
            mean = wide(x)[y.numpy() == c].mean(0) if (y == c).any() else np.zeros(x.shape[1])
            rounding = 4 * torch.finfo(x.dtype).eps
            assert wide(found[c]) == pytest.approx(mean, rel=rounding, abs=rounding * float(x.abs().max()))


# ---- transport and contrast --------------------------------------------------------------------------------------


@given(st.data())
def test_exact_transport_costs_the_least_at_any_scale(data):
    n, m = data.draw(sizes), data.draw(sizes)
    cost = data.draw(
        features(n, m, scales=(1e-25, 1.0, 1e30), dtype=data.draw(st.sampled_from([torch.float32, torch.float64])))
    )
    plan = geometry.transport_plan(cost)
    close(plan.sum(1), np.full(n, 1 / n), 1e-6)
    close(plan.sum(0), np.full(m, 1 / m), 1e-6)
    scale = float(cost.abs().max()) or 1.0
    c = wide(cost) / scale
    rows, columns = np.kron(np.eye(n), np.ones((1, m))), np.kron(np.ones((1, n)), np.eye(m))
    b = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    best = linprog(c.ravel(), A_eq=np.concatenate([rows, columns]), b_eq=b).fun
    assert float(geometry.transport_cost(cost)) / scale == pytest.approx(best, abs=1e-5)


@given(st.data())
def test_transport_keeps_the_digits_of_narrow_and_whole_costs(data):
    n = data.draw(st.integers(1, 6))
    values = torch.from_numpy(np.random.default_rng(data.draw(seeds)).integers(0, 50, (n, n)))
    dtype = data.draw(st.sampled_from([torch.int64, torch.uint8, torch.float16, torch.bfloat16]))
    expected = geometry.transport_cost(values.double())
    close(geometry.transport_cost(values.to(dtype)), float(expected))


@cases(0.4)
@given(data=st.data(), epsilon=st.sampled_from([1e-8, 0.05, 0.5, 1e6, math.nan, math.inf, 0.0, -1.0, *NO_NUMBERS]))
def test_entropic_transport_is_the_formulas_or_refused(data, epsilon):
    cost = data.draw(features(data.draw(sizes), data.draw(sizes), torch.float64, scales=(1e-12, 1.0, 1e12)))
    found = said_well(lambda: geometry.transport_plan(cost, "entropic", epsilon))
    if found is not None and isinstance(epsilon, float):
        close(found, oracles.sinkhorn_plan(wide(cost), epsilon), 0.01)
    assert found is None or (cost >= 0).all()


@given(data=st.data(), temperature=st.sampled_from([1e-6, 0.1, 1.0, 1e6]))
def test_contrast_is_the_formulas(data, temperature):
    n, k, d = data.draw(sizes), data.draw(sizes), data.draw(sizes)
    dtype = data.draw(st.sampled_from([None, torch.float64]))
    x, p = data.draw(features(n, d, dtype)), data.draw(features(k, d, dtype))
    y = torch.from_numpy(np.random.default_rng(data.draw(seeds)).integers(-1, k, n))
    b = {"image_features": wide(x), "class_means": wide(p), "labels": y.numpy()}
    expected = oracles.prototype_image(b, temperature)
    value = geometry.prototype_image_contrast(x, p, y, temperature)
    assert float(value) == pytest.approx(expected, abs=1e-5 * max(1.0, 1 / temperature))


@given(data=st.data(), temperature=st.sampled_from([0.0, -1.0, math.nan, math.inf, *NO_NUMBERS]))
def test_no_temperature_is_refused(data, temperature):
    x, y = torch.ones(2, 3), torch.tensor([0, 1])
    for contrast in (geometry.prototype_image_contrast, geometry.prototype_cross_entropy):
        assert said_well(lambda contrast=contrast: contrast(x, x, y, temperature)) is None
    assert said_well(lambda: geometry.loss_against_gap(x, x, y, [0.0], temperature)) is None


# ---- what is no input --------------------------------------------------------------------------------------------

LABELS = torch.tensor([0, 1, 1])
CALLS = {
    "modality_gap": (geometry.modality_gap, 2),
    "slerp": (lambda a, b: geometry.slerp(a, b, 0.5), 2),
    "gram_distance": (geometry.gram_distance, 2),
    "alignment": (alignment, 2),
    "rotate_towards_means": (lambda w, m: rotate_towards_means(w, m, 0.5), 2),
    "project_gradient": (project_gradient, 3),
    "error_exponent": (geometry.error_exponent, 2),
    "optimal_exponent": (geometry.optimal_exponent, 1),
    "exponent_ratio": (geometry.exponent_ratio, 2),
    "shared_head_gap_bound": (geometry.shared_head_gap_bound, 3),
    "transport_plan": (geometry.transport_plan, 1),
    "transport_cost": (lambda c: geometry.transport_cost(c, "entropic"), 1),
    "prototype_image_contrast": (lambda x, p: [geometry.prototype_image_contrast(x, p, LABELS)], 2),
    "prototype_cross_entropy": (lambda x, p: [geometry.prototype_cross_entropy(x, p, LABELS)], 2),
    "loss_against_gap": (lambda x, p: geometry.loss_against_gap(x, p, LABELS, [0.0, 1.0]), 2),
    "neural_collapse": (lambda x: geometry.NeuralCollapse(3, 3).update(x, LABELS).compute(), 1),
    "neural_collapse_weights": (
        lambda w: geometry.NeuralCollapse(3, 3).update(torch.eye(3), LABELS).compute(w),
        1,
    ),
    "cluster_features": (lambda x: cluster_features(x, 2), 1),
}
UNREAD = ("prototype_image_contrast", "prototype_cross_entropy", "loss_against_gap")


@pytest.mark.parametrize("name", CALLS)
@given(data=st.data())
def test_what_is_no_matrix_of_numbers_is_refused(name, data):
    call, number = CALLS[name]
    arguments = [data.draw(features(3, 3, scales=(1.0,))).abs() for _ in range(number)]
    which = data.draw(st.integers(0, number - 1))
    may_be_nan = name in ("alignment", "rotate_towards_means", "project_gradient") or "expon" in name
    arguments[which] = data.draw(spoilt(arguments[which], whole_rows_of_nan=may_be_nan))
    found = said_well(lambda: call(*arguments))
    if which == 1 and name in UNREAD and isinstance(arguments[1], torch.Tensor) and arguments[1].shape == (3, 3):
        # of class 2 there are no samples: its prototype may be anything
        parts = [] if found is None else [torch.as_tensor(part) for part in found]
        assert all(part.isfinite().all() for part in parts)
    else:
        assert found is None


@given(data=st.data())
def test_what_is_no_label_is_refused(data):
    x = torch.ones(3, 2)
    y = data.draw(no_labels(3, 2, lowest=-1))
    assert said_well(lambda: geometry.prototype_image_contrast(x, x[:2], y)) is None
    assert said_well(lambda: geometry.NeuralCollapse(2, 2).update(x, y)) is None


@given(data=st.data(), value=st.sampled_from(NO_NUMBERS))
def test_what_is_no_number_is_refused(data, value):
    x = torch.eye(3)
    calls = [
        lambda: geometry.simplex_etf(value, 3),
        lambda: geometry.simplex_etf(3, value),
        lambda: geometry.simplex_etf(3, 3, dtype=torch.int64),
        lambda: geometry.NeuralCollapse(value, 3),
        lambda: geometry.NeuralCollapse(3, value),
        lambda: project_gradient(x, x, x, value),
        lambda: rotate_towards_means(x, x, 0.5, value),
        lambda: slerp_fraction(value, 10),
        lambda: slerp_fraction(1, 10, value),
    ]
    if not isinstance(value, torch.Tensor | list):  # fractions, one a row
        calls.append(lambda: geometry.slerp(x, x, value))
    assert said_well(data.draw(st.sampled_from(calls))) is None


@given(st.sampled_from(["shifts", None, [], ["a"], [math.nan], [0.0, math.inf], 1.0, [[0.0]], object()]))
def test_no_row_of_shifts_is_refused(shifts):
    x = torch.eye(3)
    assert said_well(lambda: geometry.loss_against_gap(x, x, torch.arange(3), shifts)) is None
