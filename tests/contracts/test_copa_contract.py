"""What CoPA's heads and residual maps promise beside what every adapter does: where they sit and what they compute."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from transformers import (
    BertConfig,
    BertModel,
    CLIPForImageClassification,
    CLIPTextModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTModel,
    Dinov2ForImageClassification,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from peft_ncgeo import CoPAConfig, NPTConfig
from peft_ncgeo.classifiers.image_features import ImageFeatures
from peft_ncgeo.models.adapters import unwrap
from peft_ncgeo.models.towers import find_pooling, find_residual_places
from peft_ncgeo.tuners.copa import CoPALayer, Residual

from ..conftest import VIT, pixels, tiny, tiny_clip, tiny_vit, tiny_vit_classifier
from .test_peft_contract import CLIP, DINO, RESNET, SIGLIP, SIGLIP_VISION, clip_part

BOTTLENECK = ResNetConfig(
    embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1], layer_type="bottleneck", downsample_in_bottleneck=True
)


@dataclass
class Backbone:
    """Where its feature is, by paths written down here, and how its own output gives the feature."""

    build: Callable
    path: str
    width: int
    output: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
    places: tuple[str, ...] = ()  # of residual maps

    def feature(self, model, images=None) -> torch.Tensor:
        """What leaves the model at its pooling (B, d), an active adapter's head included."""
        return self.output(unwrap(model), pixels() if images is None else images).flatten(1)


def pooler_output(model, images):
    return model(pixel_values=images).pooler_output


def first_token(model, images):
    return model(pixel_values=images).last_hidden_state[:, 0]


def places(layers: str, count: int, *parts: str) -> tuple[str, ...]:
    return tuple(f"{layers}.{i}.{part}" for i in range(count) for part in parts)


def convolutions(stages: str, inside: str = "encoder.stages") -> tuple[str, ...]:
    """`stage.block.convolution` as digits."""
    return tuple(f"{inside}.{s}.layers.{b}.layer.{c}.convolution" for s, b, c in stages.split())


BACKBONES = {
    "clip": Backbone(
        tiny_clip,
        "visual_projection",
        24,
        lambda model, images: model.get_image_features(pixel_values=images).pooler_output,
        places("vision_model.encoder.layers", 4, "self_attn", "mlp"),
    ),
    "clip_vision": Backbone(
        clip_part(CLIPVisionModel, CLIP.vision_config),
        "post_layernorm",
        40,
        pooler_output,
        places("encoder.layers", 4, "self_attn", "mlp"),
    ),
    "clip_projection": Backbone(
        clip_part(CLIPVisionModelWithProjection, CLIP.vision_config),
        "visual_projection",
        24,
        lambda model, images: model(pixel_values=images).image_embeds,
        places("vision_model.encoder.layers", 4, "self_attn", "mlp"),
    ),
    "clip_classifier": Backbone(
        clip_part(CLIPForImageClassification, CLIP),
        "vision_model.post_layernorm",
        40,
        lambda model, images: model.vision_model(pixel_values=images).pooler_output,
        places("vision_model.encoder.layers", 4, "self_attn", "mlp"),
    ),
    "siglip": Backbone(
        clip_part(SiglipModel, SIGLIP),
        "vision_model.head",
        40,
        lambda model, images: model.get_image_features(pixel_values=images).pooler_output,
        places("vision_model.encoder.layers", 4, "self_attn", "mlp"),
    ),
    "siglip_vision": Backbone(
        clip_part(SiglipVisionModel, SiglipVisionConfig(**SIGLIP_VISION)),
        "head",
        40,
        pooler_output,
        places("encoder.layers", 4, "self_attn", "mlp"),
    ),
    "vit": Backbone(tiny_vit, "layernorm", 32, first_token, places("layers", 3, "attention", "mlp")),
    "vit_classifier": Backbone(
        tiny_vit_classifier,
        "vit.layernorm",
        32,
        lambda model, images: first_token(model.vit, images),
        places("vit.layers", 3, "attention", "mlp"),
    ),
    "deit": Backbone(
        clip_part(DeiTModel, DeiTConfig(**VIT)), "layernorm", 32, first_token, places("layers", 3, "attention", "mlp")
    ),
    "deit_classifier": Backbone(
        clip_part(DeiTForImageClassification, DeiTConfig(**VIT)),
        "deit.layernorm",
        32,
        lambda model, images: first_token(model.deit, images),
        places("deit.layers", 3, "attention", "mlp"),
    ),
    "dinov2": Backbone(
        clip_part(Dinov2Model, DINO), "layernorm", 32, first_token, places("encoder.layer", 3, "attention", "mlp")
    ),
    "dinov2_classifier": Backbone(
        clip_part(Dinov2ForImageClassification, DINO),
        "dinov2.layernorm",
        32,
        lambda model, images: first_token(model.dinov2, images),
        places("dinov2.encoder.layer", 3, "attention", "mlp"),
    ),
    "resnet": Backbone(clip_part(ResNetModel, RESNET), "pooler", 16, pooler_output, convolutions("000 001 100 101")),
    "resnet_classifier": Backbone(
        clip_part(ResNetForImageClassification, RESNET),
        "resnet.pooler",
        16,
        lambda model, images: pooler_output(model.resnet, images),
        convolutions("000 001 100 101", "resnet.encoder.stages"),
    ),
    "bottleneck": Backbone(  # 1x1, 3x3, 1x1: only the middle ones
        clip_part(ResNetModel, BOTTLENECK), "pooler", 32, pooler_output, convolutions("001 011 101")
    ),
}


@pytest.fixture(params=BACKBONES, scope="module")
def backbone(request) -> Backbone:
    return BACKBONES[request.param]


def adapted(base, config: CoPAConfig | None = None, seed: int = 1, far: float = 0.05) -> PeftModel:
    """A model far from its start."""
    torch.manual_seed(seed)
    model = get_peft_model(base, config or CoPAConfig())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ncgeo_copa_" in name:
                parameter.add_(torch.randn_like(parameter) * far)
    return model.eval()


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


def message(call, error=ValueError) -> str:
    with pytest.raises(error) as info:
        call()
    text = str(info.value)
    assert "\n" not in text
    return text


# The config


def test_defaults():
    config = CoPAConfig()
    assert config.temperature == pytest.approx(math.exp(-2), rel=1e-12)
    assert CoPAConfig(shared=True).temperature == 0.1
    assert CoPAConfig(shared=True, temperature=0.5).temperature == 0.5
    assert (config.num_features, config.shared, config.residual_adapters) == (None, False, False)
    assert get_peft_model(tiny_vit(), config).peft_config["default"].num_features == 32


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"temperature": 0}, "temperature=0 must be 1e-6 to 1e6."),
        ({"temperature": 0.0}, "temperature=0.0 must be 1e-6 to 1e6."),
        ({"temperature": -0.5}, "temperature=-0.5 must be 1e-6 to 1e6."),
        ({"temperature": math.nan}, "temperature=nan must be 1e-6 to 1e6."),
        ({"temperature": math.inf}, "temperature=inf must be 1e-6 to 1e6."),
        ({"temperature": "warm"}, "temperature='warm' must be 1e-6 to 1e6."),
        ({"num_features": 0}, "num_features=0 must be a whole number of at least 1 and at most 1,000,000."),
        ({"num_features": -3}, "num_features=-3 must be a whole number of at least 1 and at most 1,000,000."),
        ({"num_features": True}, "num_features=True must be a whole number of at least 1 and at most 1,000,000."),
        ({"num_features": 32.0}, "num_features=32.0 must be a whole number of at least 1 and at most 1,000,000."),
        ({"num_features": "32"}, "num_features='32' must be a whole number of at least 1 and at most 1,000,000."),
    ],
    ids=str,
)
def test_values_out_of_range(fields, expected):
    assert message(lambda: CoPAConfig(**fields), (TypeError, ValueError)) == expected


@pytest.mark.parametrize(
    "fields", [{}, {"shared": True}, {"residual_adapters": True, "temperature": 0.7, "num_features": 32}], ids=str
)
def test_config_round_trip(fields, tmp_path):
    config = CoPAConfig(**fields)
    adapted(tiny_vit(), config).save_pretrained(tmp_path)
    loaded, ignored = CoPAConfig.from_pretrained(tmp_path), {"inference_mode", "auto_mapping"}
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "NCGEO_COPA"
    assert written["num_features"] == 32
    for name, value in config.to_dict().items():
        if name not in ignored:
            assert getattr(loaded, name) == value, name
            assert written[name] == value, name
    again = CoPAConfig(**{k: v for k, v in config.to_dict().items() if k not in {*ignored, "peft_version"}})
    assert again.to_dict() == {**config.to_dict(), **{k: again.to_dict()[k] for k in (*ignored, "peft_version")}}


def tiny_bert():
    return tiny(
        BertModel,
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8),
    )


@pytest.mark.parametrize(
    ("build", "fields", "expected"),
    [
        (tiny_bert, {}, "The pooled feature of BertModel is not known; use one of these backbones: CLIP, SigLIP"),
        (
            clip_part(CLIPTextModel, CLIP.text_config),
            {"residual_adapters": True},
            "The pooled feature of CLIPTextModel is not known",
        ),
        (tiny_vit, {"num_features": 31}, "num_features=31, but the features of ViTModel have 32."),
        (tiny_clip, {"num_features": 40}, "num_features=40, but the features of CLIPModel have 24."),
    ],
    ids=["bert", "clip_text", "vit_width", "clip_width"],
)
def test_a_refused_model_stays_as_it_is(build, fields, expected):
    model, untouched = build(), build()
    assert message(lambda: get_peft_model(model, CoPAConfig(**fields))).startswith(expected)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in untouched.named_modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, value in untouched.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not hasattr(model, "peft_config")


# Where the feature and the residual maps are


@torch.no_grad()
def test_where_the_feature_is(backbone):
    """At paths written down, bare and with adapters in place, with the numbers of the model's own output."""
    base = backbone.build().requires_grad_(False)  # SigLIP's pooling takes another path where weights need gradients
    assert find_pooling(base) == (backbone.path, backbone.width)
    expected = backbone.feature(base)
    assert expected.shape == (3, backbone.width)
    encoder = ImageFeatures(base)
    assert encoder.width == backbone.width
    assert torch.equal(encoder(pixels()), expected)
    assert torch.equal(encoder.embed(pixels(), batch_size=3), expected)
    torch.testing.assert_close(encoder.embed(pixels(), batch_size=2), expected, atol=1e-6, rtol=1e-5)
    model = adapted(base)
    assert find_pooling(model.get_base_model()) == (backbone.path, backbone.width)
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
        assert find_pooling(model.get_base_model()) == (backbone.path, backbone.width)
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
    assert find_pooling(base) == (backbone.path, backbone.width)
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


# What they compute


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


# How many numbers are trained


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
