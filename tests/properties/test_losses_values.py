"""For every batch that a loss accepts, its value is the formula's and its gradient is finite."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_ncgeo.geometry.checks import DeferredChecks

from .tensors import seeds
from .terms import TERMS, batches, names

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


@pytest.mark.parametrize("name", TERMS)
@given(data=st.data())
def test_the_value_is_the_formulas_and_its_gradient_finite(name, data):
    term = TERMS[name]
    batch = data.draw(batches(term))
    loss = term.make()
    value = loss(batch)
    expected = term.value(batch, loss)
    assert value.shape == ()
    assert value.dtype in (torch.float32, torch.float64)
    magnitude = max([abs(expected), 1.0, *(float(x.abs().max()) for x in [batch.logits] if x is not None)])
    assert float(value) == pytest.approx(expected, abs=term.tolerance * term.scale * magnitude)
    if value.requires_grad:
        value.backward()
    for field, tensor in vars(batch).items():
        if isinstance(tensor, torch.Tensor) and tensor.grad is not None:
            assert tensor.grad.isfinite().all(), field


@given(data=st.data(), name=names)
def test_the_order_of_the_samples_does_not_matter(data, name):
    term = TERMS[name]
    batch, loss = data.draw(batches(term)), term.make()
    by_sample = ("labels", "multi_hot", "logits", "image_features", "frozen_image_features")
    n = next((len(getattr(batch, f)) for f in by_sample if getattr(batch, f) is not None), 0)
    order = torch.from_numpy(np.random.default_rng(data.draw(seeds)).permutation(n))
    moved = {f: getattr(batch, f)[order] for f in by_sample if getattr(batch, f) is not None}
    one, other = loss(batch), loss(replace(batch, **moved))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=10 * term.tolerance * term.scale)


@given(data=st.data(), name=names.filter(lambda name: "logits" not in TERMS[name].fields), power=st.integers(-60, 60))
def test_features_of_any_length_give_the_same(data, name, power):
    """The losses normalise: 2^60 times the features changes no digit that counts."""
    term = TERMS[name]
    batch, loss = data.draw(batches(term, scales=(1.0,))), term.make()
    same = {
        f: v.detach().double()
        for f, v in vars(batch).items()
        if f.endswith(("features", "weight", "means")) and v is not None
    }
    scaled = {f: v * 2.0**power for f, v in same.items()}
    one, other = (loss(replace(batch, **fields)) for fields in (same, scaled))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@given(data=st.data(), name=names)
def test_a_step_of_the_trainer_computes_the_same(data, name):
    """Inside deferred checks nothing is looked at, so what would be needless is computed, with the same result."""
    term = TERMS[name]
    batch, loss = data.draw(batches(term)), term.make()
    at_once = loss(batch)
    with DeferredChecks() as checks:
        later = loss(batch)
    checks.read()
    torch.testing.assert_close(at_once, later)
