"""PromptKD (CVPR 2024): the value of its loss, by the fixture and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_ncgeo.losses import Distillation, GeometryBatch

from ..losses.batches import unit_rows


def rows(n: int, d: int, s: int) -> np.ndarray:
    """`A(n, d, s)` of the fixtures: ((k^2 + 3k + s) mod 13 - 6) / 6."""
    k = np.arange(n * d)
    return (((k * k + 3 * k + s) % 13 - 6) / 6).reshape(n, d)


def fixture() -> GeometryBatch:
    texts = unit_rows(rows(3, 4, 5))
    student, teacher = (10 * unit_rows(rows(2, 4, s)) @ texts.T for s in (9, 3))
    return GeometryBatch(logits=torch.from_numpy(student), teacher_logits=torch.from_numpy(teacher))


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 1.276242), (2.0, 2.395808)])
def test_the_fixture(temperature, expected):
    assert float(Distillation(temperature, weight=1.0)(fixture())) == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_value_by_hand(temperature):
    """Of probabilities, image by image; the mean is over images and classes."""
    batch, total = fixture(), 0.0
    for z, t in zip(batch.logits.numpy() / temperature, batch.teacher_logits.numpy() / temperature, strict=True):
        p, q = np.exp(z) / np.exp(z).sum(), np.exp(t) / np.exp(t).sum()
        total += float((q * np.log(q / p)).sum())
    expected = temperature**2 * total / (2 * 3)
    assert float(Distillation(temperature)(batch)) == pytest.approx(expected, rel=1e-12)


def test_the_published_weight_is_the_default():
    assert Distillation().factor() == 1000
    assert Distillation(weight=200).factor() == 200
    assert Distillation(budget=0.1).factor() == 1


def test_a_teacher_that_agrees_is_the_minimum():
    logits = fixture().logits.clone().requires_grad_()
    shifted = logits.detach() + torch.tensor([[3.0], [-1.0]])  # a softmax does not see it
    value = Distillation(2.0)(GeometryBatch(logits=logits, teacher_logits=shifted))
    value.backward()
    assert float(value.detach()) == pytest.approx(0, abs=1e-12)
    assert logits.grad.abs().max() < 1e-12


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), "warm"])
def test_temperatures_are_positive(temperature):
    with pytest.raises((ValueError, TypeError), match="temperature"):
        Distillation(temperature)


def test_both_speak_of_the_same_classes():
    with pytest.raises(ValueError, match="teacher_logits"):
        Distillation()(GeometryBatch(logits=torch.zeros(2, 3), teacher_logits=torch.zeros(2, 4)))
