"""Prompt-OT (arXiv 2503.08906), against a float64 recomputation that shares no code with the package."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from peft_ncgeo.geometry import transport_cost, transport_plan
from peft_ncgeo.losses import GeometryBatch, OTPreservation


def batch(seed: int = 0, n: int = 6, classes: int = 6, d: int = 5, drift: float = 1.0, distinct: bool = True):
    """Student features at a distance `drift` from the frozen ones; distinct labels unless said otherwise."""
    g = torch.Generator().manual_seed(seed)
    frozen_image, frozen_text = (torch.randn(k, d, generator=g, dtype=torch.float64) for k in (n, classes))
    image = frozen_image + drift * torch.randn(n, d, generator=g, dtype=torch.float64)
    text = frozen_text + drift * torch.randn(classes, d, generator=g, dtype=torch.float64)
    labels = torch.randperm(classes, generator=g)[:n] if distinct else torch.randint(classes, (n,), generator=g)
    return GeometryBatch(
        image_features=image.requires_grad_(),
        text_features=text.requires_grad_(),
        labels=labels,
        frozen_image_features=frozen_image,
        frozen_text_features=frozen_text,
    )


def pairs(b: GeometryBatch, modality: str) -> tuple[np.ndarray, np.ndarray]:
    def unit(x):
        x = x.detach().numpy()
        return x / np.sqrt((x**2).sum(1, keepdims=True))

    y = b.labels.numpy()
    student = {"image": unit(b.image_features), "text": unit(b.text_features)[y]}
    frozen = {"image": unit(b.frozen_image_features), "text": unit(b.frozen_text_features)[y]}
    halves = ["image", "text"] if modality == "joint" else [modality]
    return np.hstack([student[h] for h in halves]), np.hstack([frozen[h] for h in halves])


def oracle(b: GeometryBatch, modality: str) -> tuple[float, np.ndarray]:
    """By assignment: between uniform marginals of equal size a permutation is optimal."""
    u, v = pairs(b, modality)
    cost = np.array([[0.5 * ((x - y) ** 2).sum() for y in v] for x in u])
    rows, columns = linear_sum_assignment(cost)
    plan = np.zeros_like(cost)
    plan[rows, columns] = 1 / len(cost)
    return cost[rows, columns].mean(), plan


def pointwise(b: GeometryBatch, modality: str) -> float:
    u, v = pairs(b, modality)
    return float((0.5 * (u - v) ** 2).sum(1).mean())


@pytest.mark.parametrize("modality", ["joint", "image", "text"])
@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_value_equals_the_assignment(modality, distinct, seed):
    b = batch(seed, distinct=distinct)
    value = OTPreservation(weight=1.0, modality=modality)(b)
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(oracle(b, modality)[0], abs=1e-12)


@pytest.mark.parametrize("modality", ["joint", "image", "text"])
def test_gradient_equals_the_assignments(modality):
    b, reference = batch(3), batch(3)
    OTPreservation(weight=1.0, modality=modality)(b).backward()
    unit_image = reference.image_features / reference.image_features.norm(dim=1, keepdim=True)
    unit_text = (reference.text_features / reference.text_features.norm(dim=1, keepdim=True))[b.labels]
    u = {"joint": torch.cat([unit_image, unit_text], 1), "image": unit_image, "text": unit_text}[modality]
    v = torch.from_numpy(pairs(b, modality)[1])
    plan = torch.from_numpy(oracle(b, modality)[1])
    sum(plan[i, j] * (u[i] - v[j]).square().sum() / 2 for i, j in itertools.product(range(6), repeat=2)).backward()
    for field in ("image_features", "text_features"):
        got, expected = getattr(b, field).grad, getattr(reference, field).grad
        assert (got is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-10)


def test_gradient_with_respect_to_the_cost_is_the_plan():
    cost = torch.rand(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    transport_cost(cost).backward()
    plan = transport_plan(cost)
    assert torch.equal(cost.grad, plan)
    torch.testing.assert_close(plan.sum(0), torch.full((7,), 1 / 7, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(1), torch.full((7,), 1 / 7, dtype=torch.float64))


def test_gradcheck():
    b = batch(1, n=4, classes=4, d=3)
    labels, fi, ft = b.labels, b.frozen_image_features, b.frozen_text_features

    def value(image, text):
        return OTPreservation(weight=1.0)(
            GeometryBatch(
                image_features=image,
                text_features=text,
                labels=labels,
                frozen_image_features=fi,
                frozen_text_features=ft,
            )
        )

    assert torch.autograd.gradcheck(value, (b.image_features, b.text_features))


def test_identity_plan_gives_the_cosine_form():
    b = batch(2, drift=0.05)
    loss = OTPreservation(weight=1.0)
    value = loss(b)
    assert float(loss.metrics["ot_identity_share"]) == pytest.approx(1, abs=1e-12)

    def cos(x, y):
        return torch.nn.functional.cosine_similarity(x, y, dim=1)

    y = b.labels
    image = 1 - cos(b.image_features, b.frozen_image_features)
    text = 1 - cos(b.text_features[y], b.frozen_text_features[y])
    assert float(value) == pytest.approx(float((image + text).mean()), abs=1e-12)


def test_zero_at_zero_drift():
    assert float(OTPreservation(weight=1.0)(batch(0, drift=0.0))) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("modality", ["joint", "image", "text"])
def test_never_above_the_pointwise_cost(modality):
    for seed in range(40):
        b = batch(seed, drift=1.5, distinct=seed % 2 == 0)
        assert float(OTPreservation(weight=1.0, modality=modality)(b)) <= pointwise(b, modality) + 1e-12


def test_strictly_below_it_for_a_crossing_plan():
    """Two images that changed places: transport moves nothing, point by point it costs 1 each."""
    frozen = torch.eye(2, dtype=torch.float64)
    b = GeometryBatch(
        image_features=frozen.flip(0),
        labels=torch.arange(2),
        frozen_image_features=frozen,
        text_features=frozen,
        frozen_text_features=frozen,
    )
    loss = OTPreservation(weight=1.0, modality="image")
    assert pointwise(b, "image") == pytest.approx(1)
    assert float(loss(b)) == pytest.approx(0, abs=1e-15)
    assert float(loss.metrics["ot_identity_share"]) == 0


def test_identity_share_counts_equal_targets():
    """With one repeated label the text plan is not unique; any of them moves nothing."""
    b = batch(0, classes=3, distinct=False)
    b.labels = torch.zeros(6, dtype=torch.int64)
    loss = OTPreservation(weight=1.0, modality="text")
    loss(b)
    assert float(loss.metrics["ot_identity_share"]) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_features_are_solved_in_float32(dtype):
    b = batch(0, drift=0.3)
    expected = float(OTPreservation(weight=1.0)(b))
    low = GeometryBatch(
        **{k: v.detach().to(dtype) if v.is_floating_point() else v for k, v in vars(b).items() if v is not None}
    )
    value = OTPreservation(weight=1.0)(low)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["image_features", "text_features", "frozen_image_features"])
def test_non_finite_features_are_named(bad, field):
    b = batch()
    with torch.no_grad():
        getattr(b, field)[0, 0] = bad
    with pytest.raises(ValueError, match=f"^{field} has non-finite values"):
        OTPreservation(weight=1.0)(b)


def test_missing_features_are_named():
    b = batch()
    b.frozen_text_features = None
    with pytest.raises(ValueError, match="frozen_text_features, which is None"):
        OTPreservation(weight=1.0)(b)
    assert torch.isfinite(OTPreservation(weight=1.0, modality="image")(b))


@pytest.mark.parametrize("cost", [torch.tensor([[float("nan"), 1.0], [1.0, 0.0]]), torch.zeros(0, 3), torch.zeros(3)])
def test_transport_refuses_bad_costs(cost):
    with pytest.raises(ValueError, match="cost"):
        transport_plan(cost)


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="modality='both'"):
        OTPreservation(weight=1.0, modality="both")
    with pytest.raises(ValueError, match="solver='magic' must be"):
        OTPreservation(weight=1.0, solver="magic")
    with pytest.raises(ValueError, match="solver='magic' must be"):
        transport_plan(torch.ones(2, 2), solver="magic")
