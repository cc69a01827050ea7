"""Fixed prototypes in supervised contrastive learning (arXiv 2310.00893), against plain numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_ncgeo.geometry import minority_margin, simplex_etf
from peft_ncgeo.losses import CrossEntropy, GeometryBatch, PrototypeSupCon

from ..losses.batches import LABELS, random_batch, unit_rows


def concatenated(h: np.ndarray, labels, w: np.ndarray, copies: int, tau: float) -> np.ndarray:
    """l_i of every anchor by supervised contrastive learning on a batch that holds the copies; nan where left out."""
    rows = np.concatenate([h, *([w] * copies)])
    classes = np.concatenate([labels, np.tile(np.arange(len(w)), copies)])
    values = np.full(len(h), np.nan)
    for i in range(len(h)):
        others = np.arange(len(rows)) != i
        similar = rows[others] @ h[i] / tau
        positive = classes[others] == labels[i]
        if positive.any():
            values[i] = np.log(np.exp(similar).sum()) - similar[positive].mean()
    return values


def counted(h: np.ndarray, labels: np.ndarray, w: np.ndarray, copies: float, tau: float) -> np.ndarray:
    """The same with copies counted, an anchor at a time."""
    values = []
    for i in range(len(h)):
        others = np.delete(h, i, axis=0) @ h[i]
        positive = np.delete(labels, i) == labels[i]
        total = np.exp(others / tau).sum() + copies * np.exp(w @ h[i] / tau).sum()
        near = others[positive].sum() + copies * (w[labels[i]] @ h[i])
        values.append(np.log(total) - near / (tau * (positive.sum() + copies)))
    return np.array(values)


def value(batch: GeometryBatch, **arguments) -> float:
    return PrototypeSupCon(**arguments)(batch).item()


@pytest.mark.parametrize("given", [True, False], ids=["given", "of_the_head"])
@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("copies", [0, 1, 2, 7, 100])
def test_equals_concatenated_copies(copies, tau, given):
    batch = random_batch()
    w = batch.classifier_weight.detach()
    h = unit_rows(batch.image_features.detach().numpy())
    per_anchor = concatenated(h, np.array(LABELS), unit_rows(w.numpy()), copies, tau)
    assert np.isnan(per_anchor).sum() == (2 if copies == 0 else 0)  # classes 1 and 4 have one sample
    arguments = {"prototypes": 3 * w} if given else {}
    if given:
        batch.classifier_weight = None
    ours = value(batch, copies=copies, temperature=tau, **arguments)
    assert ours == pytest.approx(np.nanmean(per_anchor), rel=1e-12)


@pytest.mark.parametrize("copies", [0.1, 1, 3.3])
def test_copies_may_be_a_fraction(copies):
    batch = random_batch()
    h, w = (unit_rows(x.detach().numpy()) for x in (batch.image_features, batch.classifier_weight))
    expected = counted(h, np.array(LABELS), w, copies, 0.2).mean()
    assert value(batch, copies=copies, temperature=0.2) == pytest.approx(expected, rel=1e-12)


def test_anchors_with_nothing_near_are_left_out():
    batch, rest = random_batch(labels=(0, 2, 2, 0)), random_batch(labels=(0, 2, 2, 0))
    with_prototypes = value(rest, copies=1, temperature=0.5)
    rest.labels = torch.tensor([0, 2, 2, 3])  # the last one and now the first are alone
    h = unit_rows(batch.image_features.detach().numpy())
    expected = concatenated(h, np.array([0, 2, 2, 3]), np.zeros((0, 6)), 0, 0.5)
    np.testing.assert_array_equal(np.isnan(expected), [True, False, False, True])
    assert value(rest, copies=0, temperature=0.5) == pytest.approx(expected[1:3].mean(), rel=1e-12)
    assert value(rest, copies=1, temperature=0.5) != pytest.approx(with_prototypes)  # with prototypes nobody is alone


def test_all_left_out_is_zero_on_the_graph():
    batch = random_batch(labels=(0, 1, 4))
    loss = PrototypeSupCon(copies=0, temperature=0.1)(batch)
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(batch.image_features.grad, torch.zeros_like(batch.image_features))


def bound(classes: int = 10, batch: int = 64, dim: int = 16, seed: int = 0):
    """Embeddings, labels and ETF prototypes."""
    rng = np.random.default_rng(seed)
    h = unit_rows(rng.standard_normal((batch, dim)))
    return h, rng.integers(0, classes, batch), simplex_etf(classes, dim, seed=seed).numpy()


def test_many_copies_tend_to_cross_entropy():
    """`l_i - log n_w` to cross-entropy with classifier w and normalised features, with an error of O(1/n_w)."""
    largest, own = [], []
    for seed in range(9):
        h, labels, w = bound(seed=seed)
        logits = h @ w.T / 0.1
        ce = np.log(np.exp(logits).sum(1)) - logits[np.arange(64), labels]
        batch = GeometryBatch(image_features=torch.from_numpy(h), labels=torch.from_numpy(labels))
        batch.logits = torch.from_numpy(logits)
        limit, errors = CrossEntropy()(batch).item(), []
        for copies in (1e3, 1e4, 1e5, 1e6):
            values = counted(h, labels, w, copies, 0.1)
            ours = value(batch, prototypes=torch.from_numpy(w), copies=copies, temperature=0.1)
            assert ours == pytest.approx(values.mean(), rel=1e-12)
            assert ours - np.log(copies) - limit == pytest.approx((values - np.log(copies) - ce).mean(), abs=1e-12)
            errors.append(abs(values - np.log(copies) - ce).max())
            own.append(ours - np.log(copies) - limit)
        np.testing.assert_allclose(np.array(errors[:-1]) / errors[1:], 10, rtol=0.1)
        largest.append(errors[0])
    # the design's ranges, one run each; single runs reach from 0.05 to 0.13 and from 0.007 to 0.021
    assert 0.06 <= np.median(largest) <= 0.12
    assert 0.007 <= np.median(own[::4]) <= 0.018


def distance(features: torch.Tensor, labels: torch.Tensor, w: torch.Tensor) -> float:
    """Delta_G*: Gram matrices of the uncentred class means of h and of the prototypes, each of norm 1."""
    h, y = unit_rows(features.detach().numpy()), labels.numpy()
    means = np.array([h[y == c].mean(0) for c in range(len(w))])
    grams = [x @ x.T / np.linalg.norm(x @ x.T) for x in (means, w.numpy())]
    return float(np.linalg.norm(grams[0] - grams[1]))


def trained_freely(copies: float, w: torch.Tensor, tau: float = 1.0, steps: int = 400) -> float:
    """Delta_G* of unconstrained features, five classes of 40 samples and five of 4, at the loss's minimum."""
    counts = torch.tensor([40] * 5 + [4] * 5)
    labels = torch.repeat_interleave(torch.arange(10), counts)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(len(labels), w.shape[1], dtype=torch.float64, generator=generator).requires_grad_()
    term = PrototypeSupCon(prototypes=w, copies=copies, temperature=tau)
    optimizer = torch.optim.Adam([features], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        term(GeometryBatch(image_features=features, labels=labels)).backward()
        optimizer.step()
    return distance(features, labels, w)


@pytest.mark.slow
def test_more_copies_bring_features_to_the_prototypes_geometry():
    w = simplex_etf(10, 16, seed=0)
    curve = [trained_freely(copies, w) for copies in (0, 10, 50, 100, 1000)]
    assert curve == sorted(curve, reverse=True)
    # the design's numbers, read to two digits from a run of its own
    np.testing.assert_allclose(curve[:4], [0.42, 0.24, 0.16, 0.11], atol=0.01)
    assert curve[4] == pytest.approx(0.015, abs=0.001)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_only_symmetric_prototypes_are_where_features_come_to_rest(tau):
    """In the limit a feature on its prototype feels `sum_c p_c w_c`, which points along it for an ETF alone."""
    for w, at_rest in ((simplex_etf(10, 16), True), (minority_margin([40] * 5 + [4] * 5, 16), False)):
        w = w.numpy()
        p = np.exp(w @ w.T / tau)
        pull = (p / p.sum(1, keepdims=True)) @ w
        aside = np.linalg.norm(pull - (pull * w).sum(1, keepdims=True) * w, axis=1)
        assert (aside.max() < 1e-14) == at_rest


def test_wider_angles_for_the_minority_are_approached():
    w = minority_margin([40] * 5 + [4] * 5, 16, strength=0.5)
    curve = [trained_freely(copies, w, steps=300) for copies in (0, 10, 1000)]
    assert curve == sorted(curve, reverse=True)
    assert curve[2] == pytest.approx(0.237, abs=0.01)  # no nearer than this: see above


def tensors_kept(copies: float, batch: int, classes: int, dim: int) -> dict[int, int]:
    """Numbers in each storage that backward keeps."""
    h, labels, w = bound(classes, batch, dim)
    features = torch.from_numpy(h).requires_grad_()
    sizes: dict[int, int] = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = PrototypeSupCon(prototypes=torch.from_numpy(w), copies=copies, temperature=0.1)(
            GeometryBatch(image_features=features, labels=torch.from_numpy(labels))
        )
    loss.backward()
    return sizes


@pytest.mark.parametrize(("batch", "classes", "dim"), [(64, 10, 16), (32, 100, 128)])
def test_cost_does_not_depend_on_the_copies(batch, classes, dim):
    few, many = (tensors_kept(copies, batch, classes, dim) for copies in (10, 1000))
    assert sorted(few.values()) == sorted(many.values())
    assert max(many.values()) <= max(batch * (batch + classes), (batch + classes) * dim)


def test_gradient_to_trained_prototypes_equals_finite_differences():
    batch = random_batch()
    PrototypeSupCon(copies=3, temperature=0.5)(batch).backward()
    h, w = unit_rows(batch.image_features.detach().numpy()), batch.classifier_weight.detach().numpy()

    def total(rows):
        return np.mean(concatenated(h, np.array(LABELS), unit_rows(rows), 3, 0.5))

    expected, step = np.zeros_like(w), 1e-5
    for index in np.ndindex(w.shape):
        change = np.zeros_like(w)
        change[index] = step
        expected[index] = (total(w + change) - total(w - change)) / (2 * step)
    np.testing.assert_allclose(batch.classifier_weight.grad, expected, atol=1e-9)
    assert abs(expected[3]).max() > 1e-3  # also of the class that is absent


def test_fixed_prototypes_get_no_gradient():
    batch, w = random_batch(), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    term = PrototypeSupCon(prototypes=w, copies=3, temperature=0.5)
    term(batch).backward()
    assert batch.image_features.grad.abs().max() > 0
    assert w.grad is None
    assert batch.classifier_weight.grad is None
    assert not list(term.parameters())


def test_settings_come_from_the_head_unless_given():
    class Head:
        copies, temperature = 7, 0.3

    batch = random_batch()
    term = PrototypeSupCon(copies=2)
    term.bind(Head())
    assert term(batch).item() == value(batch, copies=2, temperature=0.3)
    term = PrototypeSupCon()
    term.bind(Head())
    assert term(batch).item() == value(batch, copies=7, temperature=0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"copies": -1}, "copies=-1"),
        ({"copies": float("nan")}, "copies=nan"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": float("inf")}, "temperature=inf"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PrototypeSupCon(**arguments)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="give copies"):
        PrototypeSupCon(temperature=0.1)(random_batch())
    with pytest.raises(ValueError, match="give temperature"):
        PrototypeSupCon(copies=1)(random_batch())
    with pytest.raises(ValueError, match="label 4 has no prototype among 3"):
        PrototypeSupCon(prototypes=torch.eye(3, 6), copies=1, temperature=0.1)(random_batch())
