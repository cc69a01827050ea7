"""Weights, budgets and their dual ascent (METHODS 8a of the design; the budget is this library's own)."""

from __future__ import annotations

import warnings

import pytest
import torch

from peft_ncgeo.losses import CrossEntropy, GeometryBatch, OTPreservation, Regularizer


class Constant(Regularizer):
    default_name = "constant"

    def forward(self, batch):
        return torch.tensor(1.0)


def test_exactly_one_of_weight_and_budget():
    for arguments in ({}, {"weight": 1.0, "budget": 0.1}):
        with pytest.raises(ValueError, match="exactly one of weight and budget"):
            Constant(**arguments)


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan"), float("inf")])
def test_budget_must_be_positive(budget):
    with pytest.raises(ValueError, match="budget"):
        Constant(budget=budget)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weight_must_be_finite(weight):
    with pytest.raises(ValueError, match="weight"):
        Constant(weight=weight)


def test_weight_may_depend_on_the_share_of_training_done():
    ramp = Constant(weight=lambda t: 10 * t)
    assert [ramp.factor(t) for t in (0, 0.25, 1)] == [0, 2.5, 10]
    assert Constant(weight=3).factor(0.7) == 3


def test_fixed_weight_ignores_updates():
    loss = Constant(weight=2.0)
    loss.update(torch.tensor(100.0))
    assert loss.factor() == 2.0


@pytest.mark.parametrize("max_step", [None, 0.5])
def test_dual_ascent_equals_its_recomputation(max_step):
    loss = Constant(budget=0.05, max_step=max_step)
    expected = 1.0
    for value in [0.2, 0.07, 0.01, 0.0, 0.0, 0.0, 0.0, 0.0, 0.06]:
        loss.update(torch.tensor(value))
        step = value / 0.05 - 1
        expected = max(0.0, expected + 0.3 * (step if max_step is None else min(step, max_step)))
        assert loss.factor() == pytest.approx(expected, abs=1e-6)


def test_non_finite_value_leaves_the_multiplier_alone():
    loss = Constant(budget=0.05)
    loss.update(0.1)
    before = loss.factor()
    with pytest.raises(ValueError, match="constant is nan"):
        loss.update(torch.tensor(float("nan")))
    assert loss.factor() == before


def test_warns_once_when_the_budget_is_out_of_reach():
    loss = Constant(budget=1e-3)
    with pytest.warns(UserWarning, match="lambda/constant passed 100"):
        loss.update(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss.update(1.0)


def test_multiplier_is_part_of_the_state():
    loss, other = Constant(budget=0.05), Constant(budget=0.05)
    loss.update(0.2)
    other.load_state_dict(loss.state_dict())
    assert other.factor() == loss.factor() != 1


def test_names():
    with pytest.raises(ValueError, match="must not hold a dot"):
        OTPreservation(weight=1.0, name="ot.image")
    assert OTPreservation(weight=1.0).name == "ot"
    assert OTPreservation(weight=1.0, name="mine").name == "mine"


def test_cross_entropy_equals_its_recomputation():
    logits = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, 1, 1, 0])
    expected = -sum(float(row[y] - row.exp().sum().log()) for row, y in zip(logits, labels, strict=True)) / 5
    assert float(CrossEntropy()(GeometryBatch(logits=logits, labels=labels))) == pytest.approx(expected, abs=1e-12)
