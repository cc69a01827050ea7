"""LIFT's parts as its paper writes them, in plain numpy and float64, and the numbers that follow from its formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from peft_ncgeo import AdaptFormerConfig
from peft_ncgeo.classifiers.head_rows import before_projection
from peft_ncgeo.geometry.sphere import l2_normalize
from peft_ncgeo.losses import LogitAdjustment
from peft_ncgeo.losses.base import GeometryBatch
from peft_ncgeo.tuners.adaptformer import AdaptFormerLayer


def a(rows: int, columns: int, seed: int) -> np.ndarray:
    k = np.arange(rows * columns)
    return (((k * k + 3 * k + seed) % 13 - 6) / 6).reshape(rows, columns)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def adapter(norm: nn.LayerNorm, down: np.ndarray, up: np.ndarray) -> AdaptFormerLayer:
    """In float64, with norm and biases at their start."""
    layer = AdaptFormerLayer(norm, width=down.shape[1])
    layer.update_layer("default", len(down), inference_mode=False)
    layer.double()
    with torch.no_grad():
        layer.ncgeo_adaptformer_down["default"].weight.copy_(torch.from_numpy(down))
        layer.ncgeo_adaptformer_up["default"].weight.copy_(torch.from_numpy(up))
    return layer


@torch.no_grad()
def test_the_adapters_term():
    x, down, up = a(2, 6, 1), a(2, 6, 2), a(6, 2, 3)
    normal = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    expected = np.maximum(normal @ down.T, 0) @ up.T
    assert expected.sum() == pytest.approx(-16.417653, abs=5e-7)
    written = [-1.074672, -2.149345, -1.700395, 0.600470, -2.724561, -4.525970]
    np.testing.assert_allclose(expected[0], written, atol=5e-7)
    residual = torch.from_numpy(x.copy())
    norm = nn.LayerNorm(6, eps=1e-3).double()
    layer = adapter(norm, down, up)
    torch.testing.assert_close(layer(residual), norm(torch.from_numpy(x)))  # the norm reads x as it was
    np.testing.assert_allclose(residual, x + expected, atol=1e-12)
    layer.ncgeo_adaptformer_scale["default"].fill_(-0.5)
    layer.ncgeo_adaptformer_down["default"].bias.fill_(0.3)
    layer.ncgeo_adaptformer_up["default"].bias.fill_(0.1)
    moved = -0.5 * (np.maximum(normal @ down.T + 0.3, 0) @ up.T + 0.1)
    np.testing.assert_allclose(layer.term(torch.from_numpy(x), "default"), moved, atol=1e-12)


def test_a_head_before_the_projection_starts_from_texts():
    """With P (d, e) as LIFT writes it, the transpose of a linear layer's weight."""
    texts, p = unit(a(3, 4, 5)), a(6, 4, 7)
    expected = unit(texts @ p.T)
    np.testing.assert_allclose(expected[0], [0.743193, 0.242346, 0.145407, -0.387753, 0.113095, -0.452378], atol=5e-7)
    model = nn.Module()
    model.visual_projection = nn.Linear(6, 4, bias=False).double()
    with torch.no_grad():
        model.visual_projection.weight.copy_(torch.from_numpy(p.T))
        rows = l2_normalize(before_projection(model, torch.from_numpy(texts)))
    np.testing.assert_allclose(rows, expected, atol=1e-12)


def test_logit_adjustment_of_cosines():
    logits, labels = 25 * unit(a(6, 4, 1)) @ unit(a(3, 4, 5)).T, np.array([0, 0, 1, 1, 2, 2])
    counts = np.array([6, 3, 1])
    adjusted = logits + np.log(counts / counts.sum())
    expected = (np.log(np.exp(adjusted).sum(1)) - adjusted[np.arange(6), labels]).mean()
    assert expected == pytest.approx(2.692525, abs=5e-7)
    batch = GeometryBatch(
        logits=torch.from_numpy(logits), labels=torch.from_numpy(labels), class_counts=torch.from_numpy(counts)
    )
    assert float(LogitAdjustment()(batch)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("classes", "width", "parameters"),
    [(1000, 32, 617_868), (365, 8, None), (100, 4, 101_436), (8142, 256, None), (2, 1, None)],
)
def test_width_and_parameters_on_vit_b_16(classes, width, parameters):
    with torch.device("meta"):
        base = ViTForImageClassification(ViTConfig(num_labels=classes))
    assert (base.config.patch_size, len(base.vit.layers)) == (16, 12)
    model = get_peft_model(base, AdaptFormerConfig())
    assert model.peft_config["default"].bottleneck_dim == width
    expected = 12 * (2 * 768 * width + 3 * 768 + width + 1)
    assert expected == (parameters or expected)
    assert model.get_nb_trainable_parameters()[0] == expected


def test_where_adapters_start():
    """Down from N(0, 1 / 3d), Up and biases 0, the scale 1: the model is the base model."""
    torch.manual_seed(0)
    layer = AdaptFormerLayer(nn.LayerNorm(300), width=300)
    layer.update_layer("default", 200, inference_mode=False)
    found = {name.split("adaptformer_")[1]: p for name, p in layer.named_parameters() if "adaptformer_" in name}
    down = found.pop("down.default.weight")
    assert float(down.detach().std()) == pytest.approx((3 * 300) ** -0.5, rel=0.02)
    ones = {"norm.default.weight", "scale.default"}
    assert found.keys() == {*ones, "norm.default.bias", "down.default.bias", "up.default.weight", "up.default.bias"}
    assert all((p == (name in ones)).all() for name, p in found.items())
