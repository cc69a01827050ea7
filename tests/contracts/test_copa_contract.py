"""Tests of the outputs of CoPA's heads and residual maps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import (
    ResNetModel,
)

from peft_ncgeo import CoPAConfig
from peft_ncgeo.classifiers.image_features import ImageFeatures
from peft_ncgeo.models.adapters import unwrap
from peft_ncgeo.tuners.copa import CoPALayer

from ..cases import RESNET
from ..conftest import pixels, tiny_vit
from .copa_backbones import BACKBONES, Backbone, adapted, convolutions


def outputs(model, images=None) -> torch.Tensor:
    """All that the model's own call gives, as one row."""
    model, images = unwrap(model), pixels() if images is None else images
    run = getattr(model, "get_image_features", model)
    out = run(pixel_values=images, **({} if run is not model else {"output_hidden_states": True}))
    found = []
    for value in out.values():
        found += [part.flatten() for part in (value if isinstance(value, tuple) else (value,))]
    return torch.cat(found)


def heads_of(model) -> tuple[torch.Tensor, torch.Tensor]:
    layer = next(module for module in model.modules() if isinstance(module, CoPALayer))
    return tuple(head.detach().double() for head in layer.heads)


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True])
def test_fresh_heads_are_the_base_model(backbone, shared):
    """To the last bit, hidden states and logits too; images of seed 3 in case something remembers those of seed 0."""
    base = backbone.build().requires_grad_(False)
    expected = outputs(base, pixels(4, seed=3))
    model = get_peft_model(base, CoPAConfig(shared=shared))
    assert torch.equal(outputs(model, pixels(4, seed=3)), expected)
    image, prototype = heads_of(model)
    for head in (image, prototype):
        assert torch.equal(head, torch.eye(backbone.width, dtype=torch.float64))
    names = [name.split("ncgeo_copa_")[1] for name, _ in model.named_parameters() if "ncgeo_copa_" in name]
    assert names == ["image_head.default"] if shared else ["image_head.default", "prototype_head.default"]


def by_hooks(base, paths, add: Callable, images: torch.Tensor, backbone: Backbone) -> torch.Tensor:
    """The feature of a bare float64 model to whose modules at `paths` is added `add(path, h)`, by hooks alone."""
    handles = []
    for path in paths:

        def hook(module, args, kwargs, output, path=path):
            h = args[0] if args else kwargs["hidden_states"]
            if isinstance(output, tuple):
                return (output[0] + add(path, h), *output[1:])
            return output + add(path, h)

        handles.append(base.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
    feature = backbone.feature(base, images.double())
    for handle in handles:
        handle.remove()
    return feature


def strided(h: torch.Tensor, weight: torch.Tensor, stride: int) -> torch.Tensor:
    """A 1x1 convolution (out, in) with a stride as a sum over channels of every `stride`-th pixel."""
    return torch.einsum("bihw,oi->bohw", h[:, :, ::stride, ::stride], weight)


@torch.no_grad()
def test_fresh_maps_add_a_ten_thousandth(backbone):
    """`f(h) + 1e-4 h` at every place, through the whole backbone in float64."""
    model = get_peft_model(backbone.build(), CoPAConfig(residual_adapters=True))
    base, images = backbone.build().double(), pixels(4, seed=3)

    def add(path, h):
        module = base.get_submodule(path)
        if h.dim() < 4:
            return 1e-4 * h
        eye = torch.eye(module.out_channels, module.in_channels, dtype=torch.float64)  # more channels: zeros there
        return 1e-4 * strided(h, eye, module.stride[0])

    plain = backbone.feature(base, images.double())
    expected = by_hooks(base, backbone.places, add, images, backbone)
    assert 1e-6 < (expected - plain).abs().max() < 0.1
    assert not torch.equal(backbone.feature(model, images), backbone.feature(backbone.build(), images))
    # the maps hold 1e-4 in float32
    torch.testing.assert_close(backbone.feature(model.double(), images.double()), expected, atol=1e-8, rtol=0)


@torch.no_grad()
def test_trained_heads_and_maps_in_float64(backbone):
    """x Theta_I behind the backbone, f(h) + h A in it, with numbers of the test's own."""
    model, images = adapted(backbone.build(), CoPAConfig(residual_adapters=True)), pixels(4, seed=3)
    base = backbone.build().double()
    maps = {
        path: model.get_base_model().get_submodule(path).ncgeo_copa_residual["default"].double()
        for path in backbone.places
    }

    def add(path, h):
        weight, module = maps[path], base.get_submodule(path)
        if h.dim() < 4:
            return h @ weight
        assert weight.shape == (module.out_channels, module.in_channels, 1, 1)
        return strided(h, weight[:, :, 0, 0], module.stride[0])

    feature = by_hooks(base, backbone.places, add, images, backbone)
    image, prototype = heads_of(model)
    assert not torch.equal(image, prototype)
    torch.testing.assert_close(ImageFeatures(model)(images).double(), feature, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(backbone.feature(model, images).double(), feature @ image, atol=5e-5, rtol=1e-4)
    wrong = [
        (feature @ other - feature @ image).abs().max()
        for other in (prototype, image.T, torch.eye(len(image)).double())
    ]
    assert min(wrong) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(("name", "places"), [("vit", 5), ("dinov2", 5), ("clip_vision", 1), ("resnet", 1)])
def test_every_token_and_pixel_passes_the_head(name, places):
    """Heads work on the last index, in ResNet's (B, d, 1, 1) on the second."""
    backbone = BACKBONES[name]
    model, base = adapted(backbone.build()), backbone.build()
    out, plain = (m.get_submodule(backbone.path) for m in (model.get_base_model(), base))
    seen: list[torch.Tensor] = []
    for module in (out, plain):
        module.register_forward_hook(lambda _, args, output: seen.append(output))
    backbone.feature(model)
    backbone.feature(base)
    assert seen[0].shape == seen[1].shape
    assert seen[0].numel() == 3 * places * backbone.width
    rows = [value.double().squeeze() for value in seen]  # a ResNet's (3, d, 1, 1) to (3, d)
    np.testing.assert_allclose(rows[0], rows[1].numpy() @ heads_of(model)[0].numpy(), atol=1e-5)


def test_a_strided_convolution_and_its_map_fit_for_odd_sizes():
    """A 3x3 convolution of stride 2 with padding 1 and a 1x1 one of stride 2 end in equally many pixels."""
    model = adapted(ResNetModel(RESNET).eval(), CoPAConfig(residual_adapters=True))
    place = model.get_base_model().get_submodule(convolutions("100")[0])
    assert place.base_layer.stride == (2, 2)
    for size in (7, 8):
        h = torch.randn(2, 8, size, size, generator=torch.Generator().manual_seed(size))
        expected = place.base_layer(h).double() + strided(h.double(), place.weight[:, :, 0, 0].double(), 2)
        torch.testing.assert_close(place(h).double(), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_shared_head_serves_both_sides():
    model = adapted(tiny_vit(), CoPAConfig(shared=True, residual_adapters=True))
    image, prototype = heads_of(model)
    assert torch.equal(image, prototype)
    feature, out = ImageFeatures(model)(pixels()).double(), BACKBONES["vit"].feature(model)
    torch.testing.assert_close(out.double(), feature @ image, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_heads_and_maps_stay_float32_on_a_narrow_base():
    for name in ("vit", "resnet", "clip"):
        backbone = BACKBONES[name]
        model = adapted(backbone.build().bfloat16(), CoPAConfig(residual_adapters=True))
        ours = [parameter for name, parameter in model.named_parameters() if ".ncgeo_copa_" in name]
        assert all(parameter.dtype == torch.float32 for parameter in ours)
        assert backbone.feature(model, pixels().bfloat16()).dtype == torch.bfloat16
        features = ImageFeatures(model)(pixels())
        assert features.dtype == torch.float32
        full = ImageFeatures(adapted(backbone.build(), CoPAConfig(residual_adapters=True)))(pixels())
        torch.testing.assert_close(features, full, atol=0.1, rtol=0.1)
