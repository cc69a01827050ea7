"""Entropic plans, the memory of pairs and two separate plans, against a float64 recomputation."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from peft_ncgeo.geometry import transport_cost, transport_plan
from peft_ncgeo.losses import GeometryBatch, OTPreservation

from .test_prompt_ot import batch, pairs


def sinkhorn(cost: np.ndarray, eps: float) -> np.ndarray:
    """Scaling iterations, written down as in the textbook; slow and sure. The package stops at an error of 1e-5."""
    kernel = np.exp(-(cost - cost.min()) / eps)
    a, b = np.full(len(cost), 1 / len(cost)), np.full(cost.shape[1], 1 / cost.shape[1])
    v = np.ones_like(b)
    for _ in range(20000):
        u = a / (kernel @ v)
        v = b / (kernel.T @ u)
    return u[:, None] * kernel * v[None]


def costs(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 0.5 * ((u[:, None] - v[None]) ** 2).sum(-1)


@pytest.mark.parametrize("epsilon", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(6, 6), (4, 7)])
def test_entropic_plan_equals_textbook_iterations(epsilon, shape):
    cost = torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = sinkhorn(cost.numpy(), epsilon * float(cost.mean()))
    torch.testing.assert_close(
        transport_plan(cost, "entropic", epsilon), torch.from_numpy(expected), atol=5e-6, rtol=0
    )
    assert float(transport_cost(cost, "entropic", epsilon)) == pytest.approx(
        float((expected * cost.numpy()).sum()), abs=5e-6
    )


def test_entropic_gradient_is_the_plan_and_the_scale_is_the_costs_own():
    cost = torch.rand(5, 5, dtype=torch.float64).requires_grad_()
    transport_cost(cost, "entropic", 0.2).backward()
    torch.testing.assert_close(cost.grad, transport_plan(cost, "entropic", 0.2))
    torch.testing.assert_close(transport_plan(1000 * cost, "entropic", 0.2), cost.grad, atol=1e-6, rtol=1e-4)


def test_entropic_edge_cases():
    torch.testing.assert_close(transport_plan(torch.zeros(2, 4), "entropic"), torch.full((2, 4), 0.125))
    assert transport_plan(torch.tensor([[3.0]]), "entropic").item() == pytest.approx(1)
    exact = transport_plan(torch.rand(4, 4, generator=torch.Generator().manual_seed(1)))
    assert (exact > 0).sum() == 4
    with pytest.raises(ValueError, match="non-finite"):
        transport_plan(torch.tensor([[0.0, float("inf")]]), "entropic")
    with pytest.raises(ValueError, match=r"epsilon=1e-05.*2000"):
        transport_plan(torch.rand(30, 30, generator=torch.Generator().manual_seed(2)), "entropic", 1e-5)


@pytest.mark.parametrize(
    ("solver", "epsilon"), [("exact", 0.1), ("entropic", 0.0), ("entropic", -1.0), ("entropic", float("nan"))]
)
def test_epsilon_out_of_range(solver, epsilon):
    with pytest.raises(ValueError, match="epsilon"):
        OTPreservation(weight=1.0, solver=solver, epsilon=epsilon)
    with pytest.raises(ValueError, match="epsilon"):
        transport_plan(torch.ones(2, 2), solver, epsilon)


@pytest.mark.parametrize("modality", ["joint", "image", "text"])
def test_entropic_loss_and_floor(modality):
    b = batch(0)
    loss = OTPreservation(weight=1.0, modality=modality, solver="entropic", epsilon=0.3)
    u, v = pairs(b, modality)
    for value, (x, y) in ((loss(b), (u, v)), (loss.metrics["ot_floor"], (v, v))):
        cost = costs(x, y)
        expected = (sinkhorn(cost, 0.3 * cost.mean()) * cost).sum()
        assert float(value.detach()) == pytest.approx(expected, abs=5e-6)


def test_entropic_value_at_zero_drift_is_its_floor():
    b = batch(0, drift=0.0)
    loss = OTPreservation(budget=0.1, solver="entropic", epsilon=0.3)
    value = loss(b)
    assert float(value) > 0.01
    assert float(value) == pytest.approx(float(loss.metrics["ot_floor"]), abs=1e-9)
    assert float(loss.constrained(value)) == pytest.approx(0, abs=1e-9)  # what the budget limits


def test_exact_value_is_constrained_whole():
    loss = OTPreservation(budget=0.1)
    value = loss(batch(0))
    assert torch.equal(loss.constrained(value), value)


def test_separate_is_the_sum_of_both():
    b = batch(3)
    value = OTPreservation(weight=1.0, modality="separate")(b)
    parts = [OTPreservation(weight=1.0, modality=half)(b) for half in ("image", "text")]
    assert float(value) == pytest.approx(float(sum(parts)), abs=1e-12)
    joint = OTPreservation(weight=1.0)(b)
    assert float(value) <= float(joint) + 1e-12  # one plan for both is a restriction


@pytest.mark.parametrize("modality", ["joint", "image", "separate"])
def test_memory_equals_its_recomputation(modality):
    loss = OTPreservation(weight=1.0, modality=modality, memory_size=8)
    remembered: list[tuple[GeometryBatch, int]] = []
    for seed in range(4):
        b = batch(seed, n=5)
        value, expected = loss(b), 0.0
        for half in ("image", "text") if modality == "separate" else (modality,):
            # newest first, 8 pairs at most
            u, v = (
                np.concatenate(x)[: 5 + 8]
                for x in zip(pairs(b, half), *(pairs(m, half) for m in remembered), strict=True)
            )
            cost = costs(u, v)
            rows, columns = linear_sum_assignment(cost)
            plan = np.zeros_like(cost)
            plan[rows, columns] = 1 / len(cost)
            expected += len(cost) / 5 * (plan * cost)[:5].sum()
        assert float(value.detach()) == pytest.approx(expected, abs=1e-12)
        remembered.insert(0, b)
    assert loss.memory.shape[1] == 8


def test_memory_is_zero_at_zero_drift_and_has_no_gradient():
    loss = OTPreservation(weight=1.0, memory_size=6)
    for seed in range(3):
        assert float(loss(batch(seed, drift=0.0)).detach()) == pytest.approx(0, abs=1e-15)
    first, second = batch(4), batch(5)
    loss(first)
    loss(second).backward()
    assert first.image_features.grad is None
    assert second.image_features.grad.abs().max() > 0


def test_memory_rests_in_evaluation_mode_and_is_part_of_the_state():
    loss = OTPreservation(weight=1.0, memory_size=4)
    loss(batch(0, n=3))
    loss.eval()
    before = loss.memory.clone()
    loss(batch(1, n=3))
    assert torch.equal(loss.memory, before)
    other = OTPreservation(weight=1.0, memory_size=4)
    other.load_state_dict(copy.deepcopy(loss.state_dict()))
    assert torch.equal(other.memory, before)
    b = batch(2, n=3)
    assert float(other(b)) == float(loss(b))


def test_memory_makes_room_for_transport_across_instances():
    """A batch whose features moved onto an older pair's place: with that pair remembered, transport is cheaper."""
    moved = batch(0, n=2, drift=0.0)
    old = batch(1, n=2, drift=0.0)
    with torch.no_grad():
        moved.image_features.copy_(old.frozen_image_features)
    alone = OTPreservation(weight=1.0, modality="image")
    with_memory = OTPreservation(weight=1.0, modality="image", memory_size=2)
    swapped = copy.deepcopy(old)
    with torch.no_grad():
        swapped.image_features.copy_(moved.frozen_image_features)
    with_memory(swapped)
    assert float(with_memory(moved).detach()) == pytest.approx(0, abs=1e-12)
    assert float(alone(moved).detach()) > 0.1
    assert float(with_memory.metrics["ot_identity_share"]) == 0


def test_memory_size_out_of_range():
    with pytest.raises(ValueError, match="memory_size=-1"):
        OTPreservation(weight=1.0, memory_size=-1)


def test_gradcheck_of_the_fixed_plan():
    """The plan is a constant of the gradient: finite differences of `<P, C>` with P held."""
    b = batch(1, n=4, classes=4, d=3)
    loss = OTPreservation(weight=1.0, solver="entropic", epsilon=0.5)
    loss(b).backward()
    u, v = (torch.from_numpy(x) for x in pairs(b, "joint"))
    plan = transport_plan(torch.from_numpy(costs(u.numpy(), v.numpy())), "entropic", 0.5)
    x = b.image_features.detach().requires_grad_()
    y = b.text_features.detach().requires_grad_()
    joint = torch.cat([torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(y, dim=1)[b.labels]], 1)
    (plan * 0.5 * (joint[:, None] - v[None]).square().sum(-1)).sum().backward()
    torch.testing.assert_close(b.image_features.grad, x.grad, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(b.text_features.grad, y.grad, atol=1e-8, rtol=1e-6)
