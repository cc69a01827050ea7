"""Binary cross-entropy and ASL: published settings, weights of classes, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit

from peft_ncgeo.losses import GeometryBatch, MultiLabelLoss


def test_values_and_gradients_at_every_logit():
    """Against formulas in float64, with the paper's exponents; slopes of far logits are finite."""
    z = np.array([[-300.0, -2.0, 0.3], [1.5, 40.0, 300.0]])
    y, weights = np.array([[0, 1, 0], [1, 0, 0]]), np.array([1.0, 3.0, 0.5])
    p = expit(z)
    plain = y * np.log(expit(z)) * weights + (1 - y) * -np.logaddexp(0, z)
    q = np.maximum(p - 0.05, 0)
    asymmetric = y * np.log(p) + (1 - y) * q**4 * np.log1p(-q)
    focal = y * (1 - p) ** 0.5 * np.log(p) + (1 - y) * np.maximum(p - 0.3, 0) ** 0.5 * np.log1p(
        -np.maximum(p - 0.3, 0)
    )
    for loss, expected in (
        (MultiLabelLoss(pos_weight=weights), plain),
        (MultiLabelLoss(asymmetric=True), asymmetric),
        (MultiLabelLoss(asymmetric=True, gamma_neg=0.5, gamma_pos=0.5, clip=0.3), focal),
        (MultiLabelLoss(asymmetric=True, gamma_neg=0, gamma_pos=0, clip=0, pos_weight=weights.tolist()), plain),
    ):
        logits = torch.tensor(z, requires_grad=True)
        value = loss(GeometryBatch(logits=logits, multi_hot=torch.tensor(y)))
        assert float(value) == pytest.approx(-expected.mean(), rel=1e-6)
        value.backward()
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: MultiLabelLoss(gamma_neg=2), "gamma_neg.*asymmetric=True"),
        (lambda: MultiLabelLoss(asymmetric=True, clip=1.0), "clip"),
        (lambda: MultiLabelLoss(asymmetric=True, gamma_pos=-1), "gamma_pos"),
        (lambda: MultiLabelLoss(pos_weight=[1.0, -2.0]), r"pos_weight\[1\]"),
        (lambda: MultiLabelLoss(pos_weight=[1.0, 2.0])(_batch([[0, 1, 0]])), "pos_weight has 2"),
        (lambda: MultiLabelLoss()(_batch([[0, 1, 2]])), "multi_hot must hold 0 and 1"),
    ],
)
def test_refused(make, word):
    with pytest.raises(ValueError, match=word):
        make()


def _batch(rows) -> GeometryBatch:
    return GeometryBatch(logits=torch.zeros(1, 3), multi_hot=torch.tensor(rows))
