"""CoPA's loss (arXiv 2410.12474) as a term: what it reads, and whom it leaves out."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from peft_ncgeo.geometry import prototype_image_contrast
from peft_ncgeo.losses import BalancedSoftmax, GeometryBatch, PrototypeImageContrast

from .batches import LABELS, random_batch, unit_rows


def without(batch: GeometryBatch, *classes: int) -> GeometryBatch:
    """With rows of nan for these classes."""
    means = batch.class_means.detach().clone()
    means[list(classes)] = math.nan
    return dataclasses.replace(batch, class_means=means.requires_grad_())


@pytest.mark.parametrize("temperature", [math.exp(-2), 0.5])
def test_is_the_contrast_of_features_and_class_means(temperature):
    batch = random_batch()
    value = PrototypeImageContrast(temperature)(batch)
    expected = prototype_image_contrast(batch.image_features, batch.class_means, batch.labels, temperature)
    assert torch.equal(value, expected)
    if temperature == math.exp(-2):
        assert torch.equal(PrototypeImageContrast()(batch), expected)


def test_rows_are_balanced_softmax_with_the_batchs_counts():
    batch = random_batch()
    e, p, labels = unit_rows(batch.image_features), unit_rows(batch.class_means), batch.labels
    logits, counts = e @ p.T / 0.5, labels.bincount(minlength=5)
    seen = counts > 0
    position = seen.cumsum(0) - 1
    rows = (
        BalancedSoftmax()(GeometryBatch(logits=logits[:, seen], labels=position[labels], class_counts=counts[seen]))
        + counts[labels].double().log().mean()
    )
    columns = (logits.logsumexp(0)[labels] - logits[torch.arange(7), labels]).mean()
    assert PrototypeImageContrast(0.5)(batch).item() == pytest.approx(((rows + columns) / 2).item(), abs=1e-14)


def test_classes_not_seen_are_left_out_with_their_samples():
    full = random_batch()
    batch = without(full, 2, 3)
    kept = torch.tensor([label not in (2, 3) for label in LABELS])
    few = dataclasses.replace(full, image_features=full.image_features[kept], labels=full.labels[kept])
    term = PrototypeImageContrast()
    value = term(batch)
    assert value.item() == pytest.approx(term(few).item(), abs=1e-14)
    of_x, of_means = torch.autograd.grad(value, (batch.image_features, batch.class_means))
    assert of_x[~kept].abs().max() == 0
    assert of_x[kept].abs().min() > 0
    assert of_means.isfinite().all()


@pytest.mark.parametrize("last_seen", [True, False])
def test_padding_is_left_out(last_seen):
    batch = random_batch((0, 2, -1, 1, -1))
    batch = batch if last_seen else without(batch, 4)
    rows = [0, 1, 3]
    few = dataclasses.replace(batch, image_features=batch.image_features[rows], labels=batch.labels[rows])
    term = PrototypeImageContrast()
    assert term(batch).item() == pytest.approx(term(few).item(), abs=1e-14)


def test_all_left_out_is_zero_on_the_graph():
    batch = without(random_batch((2, 2, 3)), 2, 3)
    value = PrototypeImageContrast()(batch)
    assert value.item() == 0
    value.backward()
    assert torch.equal(batch.image_features.grad, torch.zeros_like(batch.image_features))
    assert torch.equal(batch.class_means.grad, torch.zeros_like(batch.class_means))


def test_settings():
    term = PrototypeImageContrast()
    assert (term.name, term.requires, term.temperature) == ("prototype_image", ("class_means",), math.exp(-2))
    assert term.factor() == 1
    assert PrototypeImageContrast(weight=lambda t: 2 * t).factor(0.5) == 1
    assert PrototypeImageContrast(budget=3.0).budget == 3
    with pytest.raises(ValueError, match="exactly one"):
        PrototypeImageContrast(weight=1.0, budget=3.0)
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"temperature={temperature}"):
            PrototypeImageContrast(temperature)
    with pytest.raises(ValueError, match="prototype_image.*5.*no.*5"):
        PrototypeImageContrast()(dataclasses.replace(random_batch(), labels=torch.tensor([0, 1, 2, 3, 4, 5, 0])))
    with pytest.raises(ValueError, match="in -1..4, got -2"):
        PrototypeImageContrast()(dataclasses.replace(random_batch(), labels=torch.tensor([0, 1, 2, 3, 4, -2, 0])))
