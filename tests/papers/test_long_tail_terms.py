"""Classification terms for long tails, against plain numpy in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from peft_ncgeo.losses import LDAM, BalancedSoftmax, CrossEntropy, LogitAdjustment

from ..losses.batches import LABELS, random_batch


def cross_entropy(logits: np.ndarray) -> float:
    return float(np.mean([np.log(np.exp(row).sum()) - row[y] for row, y in zip(logits, LABELS, strict=True)]))


def parts():
    batch = random_batch()
    return batch, batch.logits.detach().numpy(), batch.class_counts.numpy()


def test_cross_entropy():
    batch, logits, _ = parts()
    assert CrossEntropy()(batch).item() == pytest.approx(cross_entropy(logits), rel=1e-12)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_logit_adjustment(tau):
    """Menon et al., equation 10."""
    batch, logits, counts = parts()
    expected = cross_entropy(logits + tau * np.log(counts / counts.sum()))
    assert LogitAdjustment(tau)(batch).item() == pytest.approx(expected, rel=1e-12)


def test_balanced_softmax():
    """Ren et al., equation 4."""
    batch, logits, counts = parts()
    p = counts * np.exp(logits) / (counts * np.exp(logits)).sum(1, keepdims=True)
    expected = -np.mean(np.log(p[np.arange(len(LABELS)), list(LABELS)]))
    assert BalancedSoftmax()(batch).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("scale", "logit_scale"), [(None, 2.0), (None, None), (30.0, 2.0)])
def test_ldam(scale, logit_scale):
    """Cao et al., equation 13: the largest margin is 0.5, the others fall with n^(1/4)."""
    batch, logits, counts = parts()
    batch.logit_scale = None if logit_scale is None else torch.tensor(logit_scale, dtype=torch.float64)
    margins = 0.5 * counts.min() ** 0.25 / counts**0.25
    factor = scale or (np.exp(logit_scale) if logit_scale else 1.0)
    moved = logits.copy()
    for i, y in enumerate(LABELS):
        moved[i, y] -= factor * margins[y]
    assert LDAM(scale=scale)(batch).item() == pytest.approx(cross_entropy(moved), rel=1e-12)


@pytest.mark.parametrize("term", [LogitAdjustment(), BalancedSoftmax(), LDAM()])
def test_equal_counts_change_no_gradient_but_ldams(term):
    """With equal counts every class gets the same offset; LDAM keeps its margin."""
    batch, plain = random_batch(), random_batch()
    batch.class_counts = torch.full((5,), 7)
    term(batch).backward()
    CrossEntropy()(plain).backward()
    same = torch.allclose(batch.logits.grad, plain.logits.grad, atol=1e-12)
    assert same == (not isinstance(term, LDAM))


@pytest.mark.parametrize("term", [LogitAdjustment(), BalancedSoftmax(), LDAM()])
def test_a_class_without_training_samples_is_named(term):
    batch = dataclasses.replace(random_batch(), class_counts=torch.tensor([4, 3, 0, 2, 1]))
    with pytest.raises(ValueError, match="Class 2 has no training samples"):
        term(batch)
