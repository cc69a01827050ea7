"""Promises that every loss keeps, independent of its formula."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

from peft_ncgeo import losses
from peft_ncgeo.losses import (
    GeometryBatch,
    Regularizer,
    SpaceAlignment,
)

from ..cases import FORMULAS
from .batches import random_batch

# the plan of a Sinkhorn term is a constant, so the numerical gradient of the value is another one
CONSTANT_PLANS = {name for name in FORMULAS if "epsilon" in name}
OF_SAMPLES = ("image_features", "labels", "multi_hot", "logits", "frozen_image_features", "teacher_logits")
INPUTS = ("image_features", "text_features", "template_features", "logits", "classifier_weight", "class_means")


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def read_by(term, batch: GeometryBatch) -> list[str]:
    """Return the student's outputs that the term's value depends on."""
    inputs = [name for name in INPUTS if getattr(batch, name) is not None]
    grads = torch.autograd.grad(term(batch), [getattr(batch, name) for name in inputs], allow_unused=True)
    return [name for name, grad in zip(inputs, grads, strict=True) if grad is not None]


def test_every_loss_is_listed():
    made = {loss.cls for loss in FORMULAS.values()}
    public = {getattr(losses, name) for name in losses.__all__} - {GeometryBatch, Regularizer}
    assert public == made


@pytest.mark.parametrize("name", [n for n in FORMULAS if n not in CONSTANT_PLANS])
def test_gradient_equals_finite_differences(name):
    term, batch = FORMULAS[name](), random_batch()
    fields = read_by(term, batch)
    assert fields

    def value(*features):
        return term(dataclasses.replace(batch, **dict(zip(fields, features, strict=True))))

    assert torch.autograd.gradcheck(value, [getattr(batch, f) for f in fields], atol=1e-6)


@pytest.mark.parametrize("name", FORMULAS)
def test_bfloat16_features_lose_no_more_than_their_own_rounding(name):
    rounded = random_batch(dtype=torch.bfloat16)
    wide = {
        f.name: v.detach().double()
        for f in dataclasses.fields(rounded)
        if isinstance(v := getattr(rounded, f.name), torch.Tensor) and v.is_floating_point()
    }
    value = FORMULAS[name]()(rounded)
    assert value.dtype == torch.float32
    torch.testing.assert_close(
        value.double(), FORMULAS[name]()(dataclasses.replace(rounded, **wide)), atol=2e-5, rtol=2e-5
    )
    value.backward()


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_features_are_refused_by_name(name, bad):
    term, batch = FORMULAS[name](), random_batch()
    for field in read_by(FORMULAS[name](), batch):
        broken = getattr(batch, field).detach().clone()
        broken.view(-1)[3] = bad
        with pytest.raises(ValueError, match=f"{field} has non-finite values"):
            term(dataclasses.replace(batch, **{field: broken}))


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("labels", [(1,), (0, 0, 0), (0, 4), (0, 1, 2, 3, 4)], ids=str)
def test_few_samples_and_absent_classes_give_finite_values_and_gradients(name, labels):
    batch = random_batch(labels)
    value = FORMULAS[name]()(batch)
    assert value.dim() == 0
    assert torch.isfinite(value)
    assert value.requires_grad
    value.backward()
    for field in INPUTS:
        grad = getattr(batch, field).grad
        assert grad is None or torch.isfinite(grad).all()


@pytest.mark.parametrize("name", FORMULAS)
def test_more_classes_than_dimensions(name):
    batch = random_batch(labels=(0, 3, 7, 7, 5, 2), classes=8, dim=3)
    value = FORMULAS[name]()(batch)
    assert torch.isfinite(value)
    value.backward()


@pytest.mark.parametrize("name", FORMULAS)
def test_identical_texts_give_finite_values_and_gradients(name):
    batch = random_batch()
    same = batch.text_features.detach()[:1].repeat(5, 1).requires_grad_()
    batch = dataclasses.replace(batch, text_features=same, frozen_text_features=same.detach())
    value = FORMULAS[name]()(batch)
    assert torch.isfinite(value)
    value.backward()
    assert same.grad is None or torch.isfinite(same.grad).all()


@pytest.mark.parametrize("name", FORMULAS)
def test_a_missing_field_is_named(name):
    term, batch = FORMULAS[name](), random_batch()
    if FORMULAS[name].cls is SpaceAlignment:  # it takes texts where there are no classifier weights
        batch.classifier_weight = None
    for field in (*getattr(term, "requires", ()), *read_by(FORMULAS[name](), batch)):
        with pytest.raises(ValueError, match=f"needs GeometryBatch.{field}"):
            FORMULAS[name]()(dataclasses.replace(batch, **{field: None}))


@pytest.mark.parametrize("name", FORMULAS)
def test_a_term_says_whether_it_reads_labels(name):
    term, batch = FORMULAS[name](), dataclasses.replace(random_batch(), labels=None)
    if not getattr(term, "reads_labels", True):
        assert torch.equal(term(batch), FORMULAS[name]()(random_batch()))
    elif "class_means" not in FORMULAS[name].reads:  # those were made of labels
        with pytest.raises(ValueError, match="labels"):
            term(batch)


@pytest.mark.parametrize("name", FORMULAS)
def test_the_order_of_samples_does_not_matter(name):
    batch = random_batch()
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    shuffled = dataclasses.replace(
        batch,
        **{f: getattr(batch, f)[order] for f in OF_SAMPLES},
    )
    torch.testing.assert_close(FORMULAS[name]()(shuffled), FORMULAS[name]()(batch), rtol=1e-6, atol=1e-9)
