"""Prototype-image contrast against the N x N cross-entropy that it stands for, and the gap, in plain float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from peft_ncgeo.geometry import loss_against_gap, modality_gap, prototype_image_contrast, shared_head_gap_bound

from ..losses.batches import unit_rows
from .test_simplex import points

TEMPERATURE = math.exp(-2)
BALANCED = torch.arange(6).repeat(5)
IMBALANCED = torch.tensor([0] * 13 + [1] * 7 + [2] * 4 + [3] * 3 + [4] * 2 + [5])
ABSENT = torch.tensor([5, 1, 1, 5, 5, 3, 1, 5])  # classes 0, 2 and 4
CASES = {"balanced": BALANCED, "imbalanced": IMBALANCED, "absent": ABSENT, "one_class": torch.tensor([2, 2, 2])}


def drawn(labels: torch.Tensor, classes: int = 6, dim: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return points(len(labels), dim, seed=seed).requires_grad_(), points(classes, dim, seed=seed + 1).requires_grad_()


def in_full(instances, prototypes, labels, temperature=TEMPERATURE) -> torch.Tensor:
    """The published form: one N x N matrix of logits and two cross-entropies."""
    logits = unit_rows(instances) @ unit_rows(prototypes)[labels].T / temperature
    own = torch.arange(len(labels))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def gradients(value: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(value.sum(), inputs)


@pytest.mark.parametrize("temperature", [TEMPERATURE, 0.01, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_full_matrix(name, temperature):
    labels = CASES[name]
    x, p = drawn(labels)
    value, full = prototype_image_contrast(x, p, labels, temperature), in_full(x, p, labels, temperature)
    assert value.shape == ()
    assert value.item() == pytest.approx(full.item(), abs=1e-13)
    for ours, expected in zip(gradients(value, x, p), gradients(full, x, p), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_default_temperature_and_size_of_a_real_episode():
    labels = torch.randint(0, 50, (500,), generator=torch.Generator().manual_seed(0))
    x, p = drawn(labels, classes=50, dim=128)
    assert prototype_image_contrast(x, p, labels).item() == pytest.approx(in_full(x, p, labels).item(), abs=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_lower_bound(name):
    labels = CASES[name]
    floor = labels.bincount()[labels].double().log().mean().item()
    for seed in range(5):
        assert prototype_image_contrast(*drawn(labels, seed=seed), labels, 0.1).item() > floor - 1e-14
    # each sample on its prototype, prototypes orthogonal
    p = torch.eye(6, 8, dtype=torch.float64)
    assert prototype_image_contrast(p[labels], p, labels, 0.01).item() == pytest.approx(floor, abs=1e-14)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -1e300])
def test_padding_and_absent_classes_count_for_nothing(bad):
    x, p = drawn(ABSENT)
    expected = prototype_image_contrast(x, p, ABSENT)
    wanted = gradients(expected, x, p)
    present = [1, 3, 5]
    labels = torch.full((12,), -1)
    rows = [0, 2, 3, 5, 6, 8, 9, 11]
    labels[rows] = ABSENT
    padded = torch.full((12, 8), bad, dtype=torch.float64)
    padded[rows] = x.detach()
    prototypes = torch.full((6, 8), bad, dtype=torch.float64)
    prototypes[present] = p.detach()[present]
    padded.requires_grad_(), prototypes.requires_grad_()
    value = prototype_image_contrast(padded, prototypes, labels)
    assert value.item() == pytest.approx(expected.item(), abs=1e-14)
    of_x, of_p = gradients(value, padded, prototypes)
    torch.testing.assert_close(of_x[rows], wanted[0], rtol=0, atol=1e-14)
    torch.testing.assert_close(of_p, wanted[1], rtol=0, atol=1e-14)  # 0 for absent classes
    assert of_p[[0, 2, 4]].abs().max() == 0
    assert of_x[[1, 4, 7, 10]].abs().max() == 0


def test_a_batch_of_episodes_equals_one_by_one():
    """Of several sizes, one of them empty, with two leading axes."""
    sizes = [30, 8, 0, 17, 3, 1]
    labels = torch.full((6, 30), -1)
    for i, size in enumerate(sizes):
        labels[i, :size] = torch.randint(0, 6 - i // 2, (size,), generator=torch.Generator().manual_seed(i))
    x, p = points(6, 30, 8).requires_grad_(), points(6, 6, 8, seed=1).requires_grad_()
    values = prototype_image_contrast(x, p, labels)
    assert values.shape == (6,)
    of_x, of_p = gradients(values, x, p)
    for i, size in enumerate(sizes):
        if not size:
            assert values[i] == 0
            assert of_x[i].abs().max() == of_p[i].abs().max() == 0
            continue
        alone = in_full(x[i, :size], p[i], labels[i, :size])
        assert values[i].item() == pytest.approx(alone.item(), abs=1e-13)
        for ours, expected in zip((of_x, of_p), gradients(alone, x, p), strict=True):
            torch.testing.assert_close(ours[i], expected[i], rtol=0, atol=1e-12)
    pairs = prototype_image_contrast(x.unflatten(0, (2, 3)), p.unflatten(0, (2, 3)), labels.unflatten(0, (2, 3)))
    torch.testing.assert_close(pairs.flatten(), values, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (0,), (3, 0), (0, 4)], ids=str)
def test_no_samples_give_zero_on_the_graph(shape, dtype):
    x = torch.full((*shape, 5), math.nan, dtype=dtype, requires_grad=True)
    p = torch.full((*shape[:-1], 2, 5), math.nan, dtype=dtype, requires_grad=True)
    value = prototype_image_contrast(x, p, torch.full(shape, -1))
    assert torch.equal(value, torch.zeros(shape[:-1], dtype=dtype))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in gradients(value, x, p))


@pytest.mark.parametrize("name", CASES)
def test_gradients_by_finite_differences(name):
    labels = CASES[name][:9].clone()
    labels[1] = -1
    x, p = drawn(labels, dim=3)
    assert torch.autograd.gradcheck(lambda x, p: prototype_image_contrast(x, p, labels), (x, p))
    if name == "absent":
        assert torch.autograd.gradgradcheck(lambda x, p: prototype_image_contrast(x, p, labels), (x, p))


@pytest.mark.parametrize("temperature", [1e-4, 1e-2, 1e4])
def test_float32_at_any_temperature(temperature):
    x, p = (points.detach().float().requires_grad_() for points in drawn(IMBALANCED))
    value = prototype_image_contrast(x, p, IMBALANCED, temperature)
    wide = in_full(x.double(), p.double(), IMBALANCED, temperature)
    assert value.item() == pytest.approx(wide.item(), rel=1e-5)
    assert all(grad.isfinite().all() for grad in gradients(value, x, p))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_features_and_autocast(dtype):
    x, p = (points.detach().to(dtype).requires_grad_() for points in drawn(IMBALANCED))
    value = prototype_image_contrast(x, p, IMBALANCED)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(in_full(x.double(), p.double(), IMBALANCED).item(), abs=2e-6)
    assert [grad.dtype for grad in gradients(value, x, p)] == [dtype, dtype]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prototype_image_contrast(x, p, IMBALANCED), value)
        head = points(8, 4, seed=3).to(dtype)
        bound = shared_head_gap_bound(x, p, head)
        gaps, losses = loss_against_gap(x, p, IMBALANCED, [0.0])
    assert bound.dtype == gaps.dtype == losses.dtype == torch.float32
    assert bound.item() == pytest.approx(shared_head_gap_bound(x.double(), p.double(), head.double()).item(), rel=1e-5)
    torch.testing.assert_close(losses[0], value)
    assert prototype_image_contrast(x.float(), p.double(), IMBALANCED).dtype == torch.float64


def test_strided_inputs_are_left_as_they_are():
    x, p = points(8, 30).T, points(6, 16, seed=1)[:, ::2]
    kept = x.clone(), p.clone()
    labels = BALANCED.clone()
    labels[3] = -1
    value = prototype_image_contrast(x, p, labels)
    torch.testing.assert_close(value, prototype_image_contrast(kept[0].contiguous(), kept[1].contiguous(), labels))
    assert torch.equal(x, kept[0])
    assert torch.equal(p, kept[1])
    assert int(labels[3]) == -1


def test_what_does_not_fit():
    x, p, labels = points(4, 3), points(5, 3), torch.tensor([0, 1, 4, -1])
    for arguments, message in (
        ((x[0], p, labels), r"shapes \(..., N, d\)"),
        ((x[None], p, labels[None]), r"shapes \(..., N, d\)"),
        ((x.expand(2, 4, 3), p.expand(3, 5, 3), labels.expand(2, 4)), r"shapes \(..., N, d\)"),
        ((x, p[:, :2], labels), r"shape \(..., K, 3\)"),
        ((x, p[:0], labels), "K >= 1"),
        ((x, p, labels[:3]), r"int64 of shape \(4,\)"),
        ((x, p, labels.double()), "int64.*float64"),
        ((x, p, labels + 1), r"in -1..4, got 5"),
        ((x, p, labels - 1), r"in -1..4, got -2"),
        ((x, p, labels, 0.0), "temperature=0.0"),
        ((x, p, labels, -1.0), "temperature=-1.0"),
        ((x, p, labels, math.nan), "temperature=nan"),
        ((x, p, labels, math.inf), "temperature=inf"),
    ):
        with pytest.raises(ValueError, match=message):
            prototype_image_contrast(*arguments)
    with pytest.raises(ValueError, match="temperature=0"):
        loss_against_gap(x, p, labels, [0.0], temperature=0)
    with pytest.raises(ValueError, match=r"shape \(N, d\)"):
        loss_against_gap(x[None], p[None], labels[None], [0.0])
    with pytest.raises(ValueError, match="No sample"):
        loss_against_gap(x, p, torch.full((4,), -1), [0.0])
    for shifts in ([], 0.5, [[0.0]], [0.0, math.nan]):
        with pytest.raises(ValueError, match="shifts must be"):
            loss_against_gap(x, p, labels, shifts)
    head = points(3, 2)
    for arguments, message in (
        ((x[0], p, head), r"shapes \(N, d\) and \(K, d\)"),
        ((x, p[:, :2], head), r"shapes \(N, d\) and \(K, d\)"),
        ((x[:0], p, head), "a row each, got 0 and 5"),
        ((x, p, head.T), r"head must have shape \(3, d_out\)"),
        ((x, p, head[:, :0]), "head must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            shared_head_gap_bound(*arguments)


def bound_by_hand(x: np.ndarray, p: np.ndarray, head: np.ndarray) -> float:
    delta = x.mean(0) - p.mean(0)
    cosines = [abs(delta @ column) / np.linalg.norm(delta) / np.linalg.norm(column) for column in head.T]
    return max(cosines) * np.linalg.norm(head) * np.linalg.norm(delta)


@pytest.mark.parametrize("width", [1, 5, 12])
def test_bound_by_hand_holds_before_normalisation(width):
    for seed in range(20):
        x, p, head = points(30, 8, seed=seed), points(6, 8, seed=100 + seed), points(8, width, seed=200 + seed)
        bound = shared_head_gap_bound(x, p, head).item()
        assert bound == pytest.approx(bound_by_hand(x.numpy(), p.numpy(), head.numpy()), rel=1e-13)
        gap = ((x @ head).mean(0) - (p @ head).mean(0)).norm().item()
        assert gap <= bound * (1 + 1e-14)
        if width == 1:
            assert gap == pytest.approx(bound, rel=1e-13)  # one column: nothing is lost


def class_means(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.stack([x[labels == c].mean(0) for c in range(6)])


def test_bound_does_not_hold_after_normalisation():
    """Class means of equally many samples: Delta is 0, and with it the bound, but not the gap on the sphere."""
    x, head = points(30, 8), points(8, 5, seed=2)
    p = class_means(x, BALANCED)
    assert shared_head_gap_bound(x, p, head).item() < 1e-14
    assert modality_gap(x @ head, p @ head).item() == pytest.approx(0.216, abs=1e-3)
    x = points(30, 8, seed=1)
    p = class_means(x, IMBALANCED)  # and where Delta is not 0
    assert 0.01 < shared_head_gap_bound(x, p, 0.01 * head).item() < modality_gap(x @ head, p @ head).item()


def test_bound_at_zero():
    x, p, head = (tensor.requires_grad_() for tensor in (points(4, 3), points(2, 3, seed=1), points(3, 4, seed=2)))
    for towards in (x, p.mean(0) + torch.ones(3)):
        widened = torch.cat([torch.zeros(3, 1), head, torch.zeros(3, 2)], 1)
        rows = towards.expand(4, 3)
        torch.testing.assert_close(shared_head_gap_bound(rows, p, widened), shared_head_gap_bound(rows, p, head))
    assert torch.autograd.gradcheck(shared_head_gap_bound, (x, p, head))
    for inputs in ((x, x, head), (x, p, 0 * head)):
        value = shared_head_gap_bound(*inputs)
        assert value.item() == 0
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(value, (x, head)))


def test_sweep_of_the_gap():
    x, p = points(30, 8) + 0.7, points(6, 8, seed=1) - 0.2
    labels = IMBALANCED.clone()
    shifts = [-1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 5.0]
    gaps, losses = loss_against_gap(x, p, labels, shifts, 0.2)
    assert gaps.shape == losses.shape == (7,)
    e, q = unit_rows(x), unit_rows(p)
    gap = e.mean(0) - q.mean(0)
    for t, *found in zip(shifts, gaps.tolist(), losses.tolist(), strict=True):
        images, classes = unit_rows(e + t / 2 * gap), unit_rows(q - t / 2 * gap)
        assert found[0] == pytest.approx((images.mean(0) - classes.mean(0)).norm().item(), abs=1e-14)
        assert found[1] == pytest.approx(in_full(images, classes, labels, 0.2).item(), abs=1e-13)
    assert gaps[2].item() == pytest.approx(modality_gap(x, p).item(), abs=1e-14)
    assert losses[2].item() == pytest.approx(prototype_image_contrast(x, p, labels, 0.2).item(), abs=1e-14)
    assert (gaps.diff() > 0).all()
    assert gaps[0] < 0.2 * gaps[2]
    again = loss_against_gap(x, p, labels, torch.tensor(shifts), 0.2)
    torch.testing.assert_close(again, (gaps, losses))


def test_sweep_leaves_out_padding_and_absent_classes():
    x, p = (rows.detach().clone() for rows in drawn(ABSENT))
    gaps, losses = loss_against_gap(x, p[[1, 3, 5]], torch.tensor([2, 0, 0, 2, 2, 1, 0, 2]), [-1.0, 0.0, 1.0])
    p[[0, 2, 4]] = math.nan
    x = torch.cat([x, torch.full((2, 8), math.nan)])
    found = loss_against_gap(x, p, torch.cat([ABSENT, torch.tensor([-1, -1])]), [-1.0, 0.0, 1.0])
    torch.testing.assert_close(found, (gaps, losses), rtol=0, atol=1e-14)
    assert gaps[1].item() == pytest.approx(modality_gap(x[:8], p[[1, 3, 5]]).item(), abs=1e-14)


def test_sweep_without_a_gap_does_nothing():
    p = torch.eye(4, dtype=torch.float64)
    labels = torch.arange(4).repeat(2)
    gaps, losses = loss_against_gap(p[labels], p, labels, [-1.0, 0.0, 3.0])
    assert gaps.max() < 1e-15
    torch.testing.assert_close(losses, losses[1].expand(3), rtol=0, atol=1e-15)
