"""What every loss promises, whatever its formula."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

from peft_ncgeo import losses
from peft_ncgeo.losses import (
    LDAM,
    BalancedSoftmax,
    ClusterCollapse,
    CrossEntropy,
    GeometricDebiasing,
    GeometryBatch,
    LanguageCollapse,
    LogitAdjustment,
    ModalityIsomorphism,
    OTPreservation,
    PointwisePreservation,
    PrototypeImageContrast,
    PrototypeSupCon,
    Regularizer,
    RotationStabilization,
    SpaceAlignment,
)

from .batches import random_batch

TERMS = {
    "ce": CrossEntropy,
    "balanced_softmax": BalancedSoftmax,
    "logit_adjustment": LogitAdjustment,
    "ldam": LDAM,
    "ldam_reweighted": lambda: LDAM(reweight_after=0.5),
    "ot": lambda: OTPreservation(weight=1.0),
    "ot_entropic": lambda: OTPreservation(weight=1.0, solver="entropic", epsilon=0.3),
    "pointwise": lambda: PointwisePreservation(weight=1.0),
    "rotation": lambda: RotationStabilization(weight=1.0),
    "language": lambda: LanguageCollapse(weight=1.0),
    "debiasing": lambda: GeometricDebiasing(weight=1.0),
    "anchored": lambda: GeometricDebiasing(weight=1.0, anchor=True),
    "isomorphism": lambda: ModalityIsomorphism(weight=1.0),
    "sinkhorn": lambda: ModalityIsomorphism(weight=1.0, method="sinkhorn"),
    "clusters": lambda: ClusterCollapse(weight=1.0, num_clusters=2),
    "clusters_sum": lambda: ClusterCollapse(weight=1.0, num_clusters=2, reduction="sum"),
    "alignment": lambda: SpaceAlignment(weight=1.0),
    "alignment_of_means": lambda: SpaceAlignment(detach_means=False, weight=1.0),
    "supcon": lambda: PrototypeSupCon(copies=10, temperature=0.5),
    "prototype_image": PrototypeImageContrast,
}
# the plan of a Sinkhorn term is a constant, so the numerical gradient of the value is another one
CONSTANT_PLANS = {"ot_entropic", "sinkhorn"}
INPUTS = ("image_features", "text_features", "template_features", "logits", "classifier_weight", "class_means")
STAND_INS = {"alignment", "alignment_of_means"}  # these take texts where there are no classifier weights


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def read_by(term, batch: GeometryBatch) -> list[str]:
    """What the student makes that the term's value depends on."""
    inputs = [name for name in INPUTS if getattr(batch, name) is not None]
    grads = torch.autograd.grad(term(batch), [getattr(batch, name) for name in inputs], allow_unused=True)
    return [name for name, grad in zip(inputs, grads, strict=True) if grad is not None]


def test_every_loss_is_listed():
    made = {type(make()) for make in TERMS.values()}
    public = {getattr(losses, name) for name in losses.__all__} - {GeometryBatch, Regularizer}
    assert public == made


@pytest.mark.parametrize("name", [n for n in TERMS if n not in CONSTANT_PLANS])
def test_gradient_equals_finite_differences(name):
    term, batch = TERMS[name](), random_batch()
    fields = read_by(term, batch)
    assert fields

    def value(*features):
        return term(dataclasses.replace(batch, **dict(zip(fields, features, strict=True))))

    assert torch.autograd.gradcheck(value, [getattr(batch, f) for f in fields], atol=1e-6)


@pytest.mark.parametrize("name", TERMS)
def test_bfloat16_features_lose_no_more_than_their_own_rounding(name):
    rounded = random_batch(dtype=torch.bfloat16)
    wide = {
        f.name: v.detach().double()
        for f in dataclasses.fields(rounded)
        if isinstance(v := getattr(rounded, f.name), torch.Tensor) and v.is_floating_point()
    }
    value = TERMS[name]()(rounded)
    assert value.dtype == torch.float32
    torch.testing.assert_close(
        value.double(), TERMS[name]()(dataclasses.replace(rounded, **wide)), atol=2e-5, rtol=2e-5
    )
    value.backward()


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_features_are_refused_by_name(name, bad):
    term, batch = TERMS[name](), random_batch()
    for field in read_by(TERMS[name](), batch):
        broken = getattr(batch, field).detach().clone()
        broken.view(-1)[3] = bad
        with pytest.raises(ValueError, match=f"{field} has non-finite values"):
            term(dataclasses.replace(batch, **{field: broken}))


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("labels", [(1,), (0, 0, 0), (0, 4), (0, 1, 2, 3, 4)], ids=str)
def test_few_samples_and_absent_classes_give_finite_values_and_gradients(name, labels):
    batch = random_batch(labels)
    value = TERMS[name]()(batch)
    assert value.dim() == 0
    assert torch.isfinite(value)
    assert value.requires_grad
    value.backward()
    for field in INPUTS:
        grad = getattr(batch, field).grad
        assert grad is None or torch.isfinite(grad).all()


@pytest.mark.parametrize("name", TERMS)
def test_more_classes_than_dimensions(name):
    batch = random_batch(labels=(0, 3, 7, 7, 5, 2), classes=8, dim=3)
    value = TERMS[name]()(batch)
    assert torch.isfinite(value)
    value.backward()


@pytest.mark.parametrize("name", TERMS)
def test_identical_texts_give_finite_values_and_gradients(name):
    batch = random_batch()
    same = batch.text_features.detach()[:1].repeat(5, 1).requires_grad_()
    batch = dataclasses.replace(batch, text_features=same, frozen_text_features=same.detach())
    value = TERMS[name]()(batch)
    assert torch.isfinite(value)
    value.backward()
    assert same.grad is None or torch.isfinite(same.grad).all()


@pytest.mark.parametrize("name", TERMS)
def test_a_missing_field_is_named(name):
    term, batch = TERMS[name](), random_batch()
    if name in STAND_INS:
        batch.classifier_weight = None
    for field in (*getattr(term, "requires", ()), *read_by(TERMS[name](), batch)):
        with pytest.raises(ValueError, match=f"needs GeometryBatch.{field}"):
            TERMS[name]()(dataclasses.replace(batch, **{field: None}))


@pytest.mark.parametrize("name", TERMS)
def test_the_order_of_samples_does_not_matter(name):
    batch = random_batch()
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    shuffled = dataclasses.replace(
        batch,
        **{f: getattr(batch, f)[order] for f in ("image_features", "labels", "logits", "frozen_image_features")},
    )
    torch.testing.assert_close(TERMS[name]()(shuffled), TERMS[name]()(batch), rtol=1e-6, atol=1e-9)
