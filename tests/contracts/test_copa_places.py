"""CoPA's heads and residual maps: where they stand, also beside other adapters, and how many numbers they are."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from transformers import (
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)

from peft_ncgeo import CoPAConfig, NPTConfig
from peft_ncgeo.classifiers.image_features import ImageFeatures
from peft_ncgeo.models.towers import find_pooling, find_residual_places
from peft_ncgeo.tuners.copa import CoPALayer, Residual

from ..conftest import pixels
from .copa_backbones import BACKBONES, BOTTLENECK, adapted


@torch.no_grad()
def test_where_the_feature_is(backbone):
    """At paths written down, bare and with adapters in place, with the numbers of the model's own output."""
    base = backbone.build().requires_grad_(False)  # SigLIP's pooling takes another path where weights need gradients
    assert find_pooling(base)[:2] == (backbone.path, backbone.width)
    expected = backbone.feature(base)
    assert expected.shape == (3, backbone.width)
    encoder = ImageFeatures(base)
    assert torch.equal(encoder(pixels()), expected)
    assert torch.equal(encoder.embed(pixels(), batch_size=3), expected)
    torch.testing.assert_close(encoder.embed(pixels(), batch_size=2), expected, atol=1e-6, rtol=1e-5)
    model = adapted(base)
    assert find_pooling(model.get_base_model())[:2] == (backbone.path, backbone.width)
    assert isinstance(model.get_base_model().get_submodule(backbone.path), CoPALayer)
    assert not torch.allclose(backbone.feature(model), expected, atol=1e-3)
    assert torch.equal(ImageFeatures(model)(pixels()), expected)  # the heads are left out
    with model.disable_adapter():
        assert torch.equal(ImageFeatures(model)(pixels()), expected)


def test_where_residual_maps_are(backbone):
    base = backbone.build()
    assert tuple(find_residual_places(base)) == backbone.places
    model = get_peft_model(base, CoPAConfig(residual_adapters=True))
    assert tuple(find_residual_places(model.get_base_model())) == backbone.places
    found = {name for name, module in model.get_base_model().named_modules() if isinstance(module, Residual)}
    assert found == set(backbone.places)


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "vit", "dinov2"])
def test_the_feature_under_other_adapters(name):
    """LoRA and prompts belong to the backbone."""
    backbone = BACKBONES[name]
    torch.manual_seed(2)
    targets = ["visual_projection", "q_proj"] if name == "clip" else r".*\.(q_proj|query)"
    lora = get_peft_model(backbone.build(), LoraConfig(target_modules=targets, r=2, init_lora_weights=False)).eval()
    prompted = get_peft_model(backbone.build(), NPTConfig.vpt(vision_depth=2)).eval()
    for model in (lora, prompted):
        assert find_pooling(model.get_base_model())[:2] == (backbone.path, backbone.width)
        expected = backbone.feature(model)
        assert torch.equal(ImageFeatures(model)(pixels()), expected)
        assert not torch.allclose(expected, backbone.feature(backbone.build()), atol=1e-3)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("name", ["clip", "vit"])
def test_heads_and_maps_beside_lora(name):
    backbone = BACKBONES[name]
    torch.manual_seed(2)
    lora = LoraConfig(target_modules=["visual_projection", "q_proj"] if name == "clip" else ["q_proj"], r=2)
    lora.init_lora_weights = False
    base = inject_adapter_in_model(lora, backbone.build(), adapter_name="lora")
    expected = backbone.feature(base)
    assert not torch.allclose(expected, backbone.feature(backbone.build()), atol=1e-3)
    model = get_peft_model(base, CoPAConfig(residual_adapters=True))
    assert find_pooling(base)[:2] == (backbone.path, backbone.width)
    assert {n for n, module in base.named_modules() if isinstance(module, Residual)} == set(backbone.places)
    for module in base.modules():
        if isinstance(module, Residual):
            module.weight.zero_()
    assert torch.equal(backbone.feature(model), expected)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_residual_maps_beside_lora_in_a_resnet():
    """The documented way to combine the two, README: LoRA injected first."""
    backbone = BACKBONES["resnet"]
    lora = LoraConfig(target_modules=["convolution"], r=2)
    base = inject_adapter_in_model(lora, backbone.build(), adapter_name="lora")
    assert tuple(find_residual_places(base)) == backbone.places
    get_peft_model(base, CoPAConfig(residual_adapters=True))
    found = {name for name, module in base.named_modules() if isinstance(module, Residual)}
    assert found == set(backbone.places)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 2 * 768**2),
        ({"shared": True}, 768**2),
        ({"residual_adapters": True}, 2 * 768**2 + 24 * 768**2),
        ({"residual_adapters": True, "shared": True}, 25 * 768**2),
    ],
    ids=str,
)
def test_parameters_of_vit_b_16(fields, expected):
    with torch.device("meta"):
        base = ViTModel(ViTConfig())
    assert base.config.patch_size == 16
    model = get_peft_model(base, CoPAConfig(**fields))
    assert model.get_nb_trainable_parameters()[0] == expected


def test_parameters_of_resnet_18():
    """Sixteen 1x1 convolutions beside the 3x3 ones, none beside the stem and the shortcuts."""
    with torch.device("meta"):
        base = ResNetModel(
            ResNetConfig(layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], embedding_size=64)
        )
    widths = [64, 64, 128, 256, 512]
    maps = sum(widths[i] * widths[i + 1] + 3 * widths[i + 1] ** 2 for i in range(4))
    model = get_peft_model(base, CoPAConfig(residual_adapters=True))
    assert model.get_nb_trainable_parameters()[0] == 2 * 512**2 + maps


def test_parameters_of_bottlenecks():
    """A quarter of the width inside, three layers."""
    model = get_peft_model(ResNetModel(BOTTLENECK), CoPAConfig(residual_adapters=True))
    assert model.get_nb_trainable_parameters()[0] == 2 * 32**2 + 2 * 4**2 + 8**2
