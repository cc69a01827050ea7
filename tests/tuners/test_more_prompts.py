"""Coupled prompts, later first layers, other models, and names of older Transformers."""

from __future__ import annotations

import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTForImageClassification,
)

from peft_ncgeo import NPTConfig
from peft_ncgeo.models.image_encoder import encode_images

from ..conftest import (
    TEXT,
    VISION,
    VIT,
    pixels,
    texts,
    tiny,
    tiny_clip,
    tiny_vit,
    tiny_vit_classifier,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*all of them get prompts")


@torch.no_grad()
@pytest.mark.parametrize("first_layer", [0, 1])
def test_coupled_prompts_equal_a_recomputation(first_layer):
    """MaPLe: a layer's vision prompt is a linear map of that layer's text prompt."""
    torch.manual_seed(0)
    config = NPTConfig.maple(text_init=[6, 7], text_depth=2, vision_depth=2, first_layer=first_layer)
    model = get_peft_model(tiny_clip(attn_implementation="eager"), config).double().eval()
    named = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters()}
    places = ["embeddings", "encoder.layers.1", "encoder.layers.2"][first_layer : first_layer + 2]

    def prompt(place):
        text = named[f"text_model.{place}.ncgeo_npt_prompt.default"]
        linear = f"vision_model.{place}.ncgeo_npt_coupling.default"
        return text @ named[f"{linear}.weight"].T + named[f"{linear}.bias"]

    vision = tiny_clip(attn_implementation="eager").double().vision_model
    h = vision.embeddings(pixels().double())
    if first_layer == 0:
        h = torch.cat([h, prompt("embeddings").expand(len(h), -1, -1)], 1)
    h = vision.pre_layrnorm(h)
    for i, layer in enumerate(vision.encoder.layers):
        place = f"encoder.layers.{i}"
        if i == first_layer > 0:
            h = torch.cat([h, prompt(place).expand(len(h), -1, -1)], 1)
        elif place in places:
            h[:, -2:] = prompt(place)
        h = layer(h, attention_mask=None)
    expected = tiny_clip().double().visual_projection(vision.post_layernorm(h[:, 0]))
    torch.testing.assert_close(encode_images(model, pixels().double()), expected)


@torch.no_grad()
def test_a_later_first_layer_leaves_the_layers_below_alone():
    seen = {}
    model = get_peft_model(
        tiny_clip(), NPTConfig.ivlp(text_init=[6], text_depth=1, vision_depth=1, first_layer=2, pack_text=False)
    ).eval()
    base = tiny_clip()
    for key, clip in (("prompted", model.get_base_model()), ("base", base)):
        for tower in ("text_model", "vision_model"):
            layer = getattr(clip, tower).encoder.layers[1]
            layer.register_forward_hook(lambda _, __, out, key=key, tower=tower: seen.update({(key, tower): out}))
        clip.get_text_features(**texts(4))
        clip.get_image_features(pixel_values=pixels())
    for tower in ("text_model", "vision_model"):
        assert torch.equal(seen["prompted", tower], seen["base", tower])
    assert not torch.allclose(encode_images(model, pixels()), encode_images(base, pixels()), atol=1e-3)


def test_coupled_source_is_followed_into_copies():
    """The text prompt is shared with the vision tower, not copied into it."""
    model = get_peft_model(tiny_clip(), NPTConfig.maple(text_init=[6, 7], text_depth=1, vision_depth=1))
    before = encode_images(model, pixels())
    before.sum().backward()
    prompt = dict(model.named_parameters())["base_model.model.text_model.embeddings.ncgeo_npt_prompt.default"]
    assert prompt.grad.abs().max() > 0  # from images alone
    assert len([name for name, _ in model.named_parameters() if "ncgeo_npt_prompt" in name]) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coupling": "tied"}, "coupling='tied' must be"),
        ({"coupling": "coupled", "num_text_tokens": 2, "num_vision_tokens": 3}, r"equal numbers .* got \(2, 3\)"),
        (
            {"coupling": "coupled", "num_text_tokens": 2, "num_vision_tokens": 2, "vision_depth": 2},
            r"vision_depth <= text_depth, got text, vision \(1, 2\)",
        ),
        ({"num_text_tokens": 1, "first_layer": -1}, "first_layer=-1 must be a whole number of at least 0"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        NPTConfig(**fields)


def test_first_layer_beyond_the_tower():
    with pytest.raises(ValueError, match="first_layer=3.*3 layers"):
        get_peft_model(tiny_clip(), NPTConfig(num_text_tokens=2, first_layer=3))
    with pytest.warns(UserWarning, match=r"fewer layers .*\(text_depth=3 > 2\)"):
        get_peft_model(tiny_clip(), NPTConfig(num_text_tokens=2, first_layer=1, text_depth=3))


def clip_text():
    return tiny(CLIPTextModel, CLIPTextConfig(**TEXT))


def clip_vision():
    return tiny(CLIPVisionModel, CLIPVisionConfig(**VISION))


def deit():
    return tiny(DeiTForImageClassification, DeiTConfig(**VIT))


OLD_NAMES = {
    "vit": (tiny_vit, lambda key: re.sub(r"(?<!encoder\.)layers\.", "encoder.layer.", key)),
    "vit_classifier": (tiny_vit_classifier, lambda key: key.replace("vit.layers.", "vit.encoder.layer.")),
    "deit": (deit, lambda key: key.replace("deit.layers.", "deit.encoder.layer.")),
    "clip_text": (clip_text, lambda key: key.replace("base_model.model.", "base_model.model.text_model.")),
    "clip_vision": (clip_vision, lambda key: key.replace("base_model.model.", "base_model.model.vision_model.")),
}


@torch.no_grad()
@pytest.mark.parametrize("name", OLD_NAMES)
@pytest.mark.parametrize("native", [False, True])
def test_adapters_under_transformers_4_names_load(name, native, tmp_path):
    build, old_name = OLD_NAMES[name]
    tokens = (
        {"num_text_tokens": 3, "text_depth": 2} if name == "clip_text" else {"num_vision_tokens": 3, "vision_depth": 2}
    )
    model = get_peft_model(build(), NPTConfig(**tokens)).eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    new = load_file(file)
    old = {old_name(key): value for key, value in new.items()}
    assert old.keys() != new.keys()
    save_file(old, file)
    if native:
        loaded = build()
        info = loaded.load_adapter(tmp_path)
        assert not info.missing_keys
    else:
        loaded = PeftModel.from_pretrained(build(), tmp_path)
    inputs = texts(4) if name == "clip_text" else {"pixel_values": pixels()}
    for got, expected in zip(loaded(**inputs).values(), model(**inputs).values(), strict=True):
        assert torch.equal(got, expected)
