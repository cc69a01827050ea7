"""The judge of the other files here: it accepts the package's own words and nothing else."""

from __future__ import annotations

import pytest
import torch

from peft_ncgeo.geometry import simplex_etf, transport_plan

from .outcomes import said_well


def test_a_value_comes_back():
    assert said_well(lambda: simplex_etf(3, 4)).shape == (3, 4)


def test_a_refusal_of_the_package_is_none():
    assert said_well(lambda: transport_plan(torch.full((2, 2), float("nan")))) is None


def test_an_error_of_a_dependency_is_not_let_through():
    with pytest.raises(AssertionError, match="raised outside the package"):
        said_well(lambda: torch.zeros(2) @ torch.zeros(3))


def test_an_error_of_another_kind_is_not_let_through():
    with pytest.raises(AssertionError, match="is no refusal"):
        said_well(lambda: transport_plan(torch.full((2, 2), float("nan"))), KeyError)
