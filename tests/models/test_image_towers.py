"""Image towers with a place of their own for prompts, and pooled features, against what the models do themselves."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_ncgeo import CoPAConfig, NPTConfig, adapt
from peft_ncgeo.classifiers.image_features import ImageFeatures
from peft_ncgeo.models.image_encoder import encode_images
from peft_ncgeo.models.towers import find_pooling

from ..conftest import IMAGE_SIZE, pixels
from .test_families import BERT, DINO, IMAGE, STAGES, build

PROMPTS, REGISTERS = 3, 2


def dinov3(registers: int = REGISTERS):
    return build("DINOv3ViTModel", **IMAGE, num_register_tokens=registers)


def prompted(**fields):
    """DINOv3 with large prompts in its first layers, and the prompts."""
    model = get_peft_model(dinov3(), NPTConfig(num_vision_tokens=PROMPTS, init_std=0.5, **fields)).eval()
    return model, [p for name, p in model.named_parameters() if "ncgeo" in name]


# ---- DINOv3: prompts behind [CLS] and registers -------------------------------------------------------------------


@torch.no_grad()
def test_prompts_of_dinov3_do_what_more_registers_would():
    """Deep prompts are registers that each layer sets again."""
    model, (first, second) = prompted(vision_depth=2)
    other = dinov3(REGISTERS + PROMPTS)
    weights = model.get_base_model().state_dict()
    own = {key.replace(".base_layer", ""): value for key, value in weights.items() if "ncgeo" not in key}
    own["embeddings.register_tokens"] = torch.cat([own["embeddings.register_tokens"], first[None]], dim=1)
    other.load_state_dict(own)
    place = slice(1 + REGISTERS, 1 + REGISTERS + PROMPTS)

    def set_again(module, args):
        hidden_states = args[0].clone()
        hidden_states[:, place] = second
        return (hidden_states, *args[1:])

    other.model.layer[1].register_forward_pre_hook(set_again)
    expected, got = other(pixels()), model(pixels(), output_hidden_states=True)
    torch.testing.assert_close(got.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-5)
    rest = [expected.last_hidden_state[:, : place.start], expected.last_hidden_state[:, place.stop :]]
    torch.testing.assert_close(got.last_hidden_state, torch.cat(rest, dim=1), atol=1e-5, rtol=1e-5)
    assert torch.equal(got.hidden_states[0][:, place], first.expand(3, -1, -1))
    base = dinov3()(pixels())
    assert got.last_hidden_state.shape == base.last_hidden_state.shape
    assert not torch.allclose(got.pooler_output, base.pooler_output, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(model(pixels()).last_hidden_state, base.last_hidden_state)


@pytest.mark.parametrize("first_layer", [0, 1])
def test_prompts_of_dinov3_are_a_set_that_is_trained_and_saved(first_layer, tmp_path):
    model, prompts = prompted(vision_depth=2 - first_layer, first_layer=first_layer)
    out = model(pixels()).pooler_output
    out.square().sum().backward()
    assert len(prompts) == 2 - first_layer
    assert all(row.abs().max() > 0 for p in prompts for row in p.grad)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        again = PeftModel.from_pretrained(dinov3(), tmp_path).eval()
        assert torch.equal(again(pixels()).pooler_output, out)
        for prompt in prompts:
            prompt.copy_(prompt.flip(0))
        torch.testing.assert_close(model(pixels()).pooler_output, out, atol=1e-5, rtol=1e-5)
        prompts[0][0] += torch.randn(32)
        assert not torch.allclose(model(pixels()).pooler_output, out, atol=1e-3)


def test_dinov3_under_lora_and_residual_maps():
    model = get_peft_model(dinov3(), LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)).eval()
    torch.testing.assert_close(ImageFeatures(model)(pixels()), model(pixels()).pooler_output)
    model = get_peft_model(dinov3(), CoPAConfig(residual_adapters=True)).eval()
    model(pixels()).pooler_output.square().sum().backward()
    maps = [p for name, p in model.named_parameters() if "residual" in name]
    assert len(maps) == 4  # attention and MLP of two layers
    assert all(p.grad.abs().max() > 0 for p in maps)
    adapt(dinov3(), pixels(4), ["a", "b", "a", "b"], steps=2)


# ---- pooled features ----------------------------------------------------------------------------------------------

CONVOLUTIONS = {"hidden_sizes": [8, 8, 16, 24], "depths": [1] * 4}
BLOCKS = {"kernel_sizes": [3, 3], "in_channels": [32, 16], "out_channels": [16, 24], "strides": [1, 2]}
EFFICIENT = {**BLOCKS, "num_block_repeats": [1, 1], "expand_ratios": [1, 6], "image_size": 32}
ALIGN = {**EFFICIENT, "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 24}
HIERA = {"image_size": [32, 32], "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "patch_kernel": [7, 7]}
FOCAL = {"focal_levels": [1, 1], "focal_windows": [3, 3]}
BASE = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}

POOLED = {
    "DINOv3": dinov3,
    "DINOv3 ConvNeXt": lambda: build("DINOv3ConvNextModel", **CONVOLUTIONS),
    "Pixio": lambda: build("PixioModel", **DINO, n_cls_tokens=3),
    "BEiT": lambda: build("BeitModel", **IMAGE, use_relative_position_bias=True),
    "BEiT, [CLS]": lambda: build("BeitModel", **IMAGE, use_mean_pooling=False),
    "Swin": lambda: build("SwinModel", **STAGES),
    "Swin V2": lambda: build("Swinv2Model", **STAGES),
    "Hiera": lambda: build("HieraModel", **HIERA, num_query_pool=1, patch_stride=[4, 4], patch_padding=[3, 3]),
    "FocalNet": lambda: build("FocalNetModel", image_size=32, embed_dim=8, depths=[1, 1], **FOCAL),
    "ConvNeXt": lambda: build("ConvNextModel", **CONVOLUTIONS),
    "ConvNeXt V2": lambda: build("ConvNextV2Model", **CONVOLUTIONS),
    "EfficientNet": lambda: build("EfficientNetModel", **EFFICIENT, **BASE),
    "MobileNetV1": lambda: build("MobileNetV1Model", depth_multiplier=0.25),
    "MobileNetV2": lambda: build("MobileNetV2Model", depth_multiplier=0.25),
    "ALIGN": lambda: build("AlignVisionModel", **ALIGN),
    "ALIGN, whole": lambda: build("AlignModel", text_config=BERT, vision_config=ALIGN, projection_dim=24),
}


def images_for(model) -> torch.Tensor:
    config = getattr(model.config, "vision_config", model.config)
    size = IMAGE_SIZE if getattr(config, "image_size", None) == IMAGE_SIZE else 32
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


def own_feature(model) -> torch.Tensor:
    return getattr(model, "get_image_features", model)(pixel_values=images_for(model)).pooler_output


@pytest.mark.parametrize("name", POOLED)
@torch.no_grad()
def test_the_pooled_feature_is_the_model_s_own(name):
    base = POOLED[name]()
    expected = own_feature(base)
    got = ImageFeatures(base)(images_for(base))
    assert got.shape == (3, find_pooling(base).width)
    torch.testing.assert_close(got, expected.flatten(1))
    model = get_peft_model(base, CoPAConfig()).get_base_model()
    torch.testing.assert_close(own_feature(model), expected)
    head = next(p for key, p in model.named_parameters() if "image_head" in key)
    head.copy_(torch.randn_like(head))
    torch.testing.assert_close(own_feature(model).flatten(1), expected.flatten(1) @ head, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(ImageFeatures(model)(images_for(model)), got)  # the heads are left out


PVT = {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2], "image_size": 32}


@pytest.mark.parametrize("name", ["IJepa", "Pvt", "Data2VecVision", "Swin", "ConvNext"])
@torch.no_grad()
def test_the_pooled_feature_of_a_classifier_is_what_its_head_takes(name):
    sizes = {"IJepa": IMAGE, "Data2VecVision": IMAGE, "Swin": STAGES, "ConvNext": CONVOLUTIONS, "Pvt": PVT}[name]
    model = build(f"{name}ForImageClassification", **sizes, num_labels=3)
    images = images_for(model)
    torch.testing.assert_close(ImageFeatures(model)(images), encode_images(model, images))
