"""NPT (arXiv 2306.15955), both versions, against plain numpy in float64."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from peft_ncgeo.geometry import simplex_etf
from peft_ncgeo.losses import GeometricDebiasing, GeometryBatch, LanguageCollapse, ModalityIsomorphism

from ..losses.batches import LABELS, random_batch, unit_rows


def numbers(batch, *fields):
    return [getattr(batch, field).detach().numpy() for field in fields]


def test_language_collapse_by_hand():
    batch = random_batch()
    (text,) = numbers(batch, "text_features")
    g, k = unit_rows(text), 5
    expected = sum((g[i] @ g[j] + 1 / (k - 1)) ** 2 for i in range(k) for j in range(k) if i != j) / (k * (k - 1))
    assert LanguageCollapse(weight=0.25)(batch).item() == pytest.approx(expected, rel=1e-12)


def test_language_collapse_is_zero_on_an_etf_and_falls_to_it():
    batch = GeometryBatch(text_features=3 * simplex_etf(5, 7, seed=0))
    assert LanguageCollapse(weight=1.0)(batch).item() < 1e-28
    text = random_batch().text_features
    optimizer = torch.optim.Adam([text], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        value = LanguageCollapse(weight=1.0)(GeometryBatch(text_features=text))
        value.backward()
        optimizer.step()
    assert value.item() < 1e-6


def test_language_collapse_warns_of_its_floor_once_and_stays_above():
    text = random_batch(classes=5, dim=2).text_features
    term = LanguageCollapse(weight=1.0)
    with pytest.warns(UserWarning, match="5 classes.*2.*cannot.*ETF.*0.3125"):
        value = term(GeometryBatch(text_features=text))
    assert value.item() >= (25 / 2 - 5) / 20 - 1 / 16 - 1e-12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        term(GeometryBatch(text_features=text))


def test_equal_texts_warn_and_get_equal_gradients():
    text = random_batch().text_features.detach().clone()
    text[3] = text[1]
    text.requires_grad_()
    with pytest.warns(UserWarning, match="classes 1.*3.*same"):
        value = LanguageCollapse(weight=1.0)(GeometryBatch(text_features=text))
    value.backward()
    torch.testing.assert_close(text.grad[1], text.grad[3])


@pytest.mark.parametrize("anchor", [False, True])
def test_geometric_debiasing_by_hand(anchor):
    batch = random_batch()
    image, text = numbers(batch, "image_features", "text_features")
    classes = sorted(set(LABELS))
    labels = np.array(LABELS)
    means = [np.array([image[labels == c].mean(0) for c in classes]), text[classes]]
    grams = []
    for m in means:
        m = unit_rows(m - m.mean(0))
        grams.append(m @ m.T / np.linalg.norm(m @ m.T))
    expected = np.linalg.norm(grams[0] - grams[1])
    if anchor:
        n = len(classes)
        etf = n / (n - 1) * (np.eye(n) - 1 / n)
        expected += sum(np.linalg.norm(gram - etf / np.linalg.norm(etf)) for gram in grams)
    assert GeometricDebiasing(weight=1.0, anchor=anchor)(batch).item() == pytest.approx(expected, rel=1e-10)


def test_geometric_debiasing_sees_no_rotation_and_needs_three_classes():
    etf = simplex_etf(4, 6, seed=1)
    turned = 2 * simplex_etf(4, 6, seed=2) + 5  # another scale, rotation and centre
    batch = GeometryBatch(image_features=etf.requires_grad_(), text_features=turned, labels=torch.arange(4))
    value = GeometricDebiasing(weight=1.0, anchor=True)(batch)
    assert value.item() < 1e-13
    two = random_batch(labels=(1, 4, 4))
    value = GeometricDebiasing(weight=1.0)(two)
    assert value.item() == 0
    value.backward()
    assert two.image_features.grad.abs().max() == 0


def test_isomorphism_by_hand():
    batch = random_batch()
    image, text = map(unit_rows, numbers(batch, "image_features", "text_features"))
    per_class = {}
    for f, y in zip(image, LABELS, strict=True):
        per_class.setdefault(y, []).append(((f - text[y]) ** 2).sum())
    expected = np.mean([np.mean(v) for v in per_class.values()])
    assert ModalityIsomorphism(weight=0.15)(batch).item() == pytest.approx(expected, rel=1e-12)


def sinkhorn(cost: np.ndarray, epsilon: float) -> np.ndarray:
    """Plain scaling iterations between uniform marginals."""
    n, m = cost.shape
    kernel, u = np.exp(-cost / (epsilon * cost.mean())), np.ones(n)
    for _ in range(20000):
        v = 1 / m / (kernel.T @ u)
        u = 1 / n / (kernel @ v)
    return u[:, None] * kernel * v


@pytest.mark.parametrize("epsilon", [0.1, 0.5])
def test_isomorphism_by_sinkhorn_equals_class_by_class_iterations(epsilon):
    batch = random_batch()
    image, texts = map(unit_rows, numbers(batch, "image_features", "template_features"))
    values = []
    for c in sorted(set(LABELS)):
        mine = image[np.array(LABELS) == c]
        cost = ((texts[c][:, None] - mine[None]) ** 2).sum(-1)
        values.append((sinkhorn(cost, epsilon) * cost).sum())
    value = ModalityIsomorphism(weight=0.15, method="sinkhorn", epsilon=epsilon)(batch)
    assert value.item() == pytest.approx(np.mean(values), rel=2e-5)


def test_sinkhorns_gradient_is_that_of_its_constant_plan():
    batch, reference = random_batch(), random_batch()
    ModalityIsomorphism(weight=1.0, method="sinkhorn", epsilon=0.3)(batch).backward()
    image = reference.image_features / reference.image_features.norm(dim=1, keepdim=True)
    texts = reference.template_features / reference.template_features.norm(dim=-1, keepdim=True)
    total = 0
    for c in sorted(set(LABELS)):
        mine = image[torch.tensor(LABELS) == c]
        cost = (texts[c][:, None] - mine[None]).square().sum(-1)
        total = total + (torch.from_numpy(sinkhorn(cost.detach().numpy(), 0.3)) * cost).sum()
    (total / len(set(LABELS))).backward()
    for field in ("image_features", "template_features"):
        torch.testing.assert_close(getattr(batch, field).grad, getattr(reference, field).grad, atol=1e-5, rtol=1e-4)


def test_with_one_text_a_class_sinkhorn_equals_the_mean():
    batch = random_batch(templates=1)
    batch.template_features = batch.text_features[:, None]
    forced = ModalityIsomorphism(weight=1.0, method="sinkhorn")(batch)
    assert forced.item() == pytest.approx(ModalityIsomorphism(weight=1.0)(batch).item(), rel=1e-12)


def test_unknown_arguments_are_refused():
    with pytest.raises(ValueError, match="method='emd'"):
        ModalityIsomorphism(weight=1.0, method="emd")
    with pytest.raises(ValueError, match="epsilon"):
        ModalityIsomorphism(weight=1.0, epsilon=0.1)
    with pytest.raises(ValueError, match="epsilon"):
        ModalityIsomorphism(weight=1.0, method="sinkhorn", epsilon=-1)


def test_an_epsilon_that_does_not_converge_is_refused():
    with pytest.raises(ValueError, match="too small"):
        ModalityIsomorphism(weight=1.0, method="sinkhorn", epsilon=1e-5)(random_batch())
