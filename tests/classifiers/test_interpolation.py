"""Interpolation between the frozen and the tuned model, against weights and outputs mixed by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import CLIPVisionModelWithProjection

from peft_ncgeo import ImageClassifier, NPTConfig, PrototypeConfig
from peft_ncgeo.hub import export_classifier, load_adapter, save_adapter
from peft_ncgeo.training import interpolate, sweep_interpolation

from ..conftest import NAMES, pixels, tiny_clip, tiny_images, tiny_processor, tiny_vit_classifier
from ..papers.test_clip_lora import Layer, pattern

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def randomised(model: nn.Module) -> nn.Module:
    """Move everything that trains away from its start."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def lora(**fields):
    return randomised(get_peft_model(tiny_clip(), LoraConfig(r=2, target_modules=["q_proj", "fc1"], **fields)))


def norms():
    return randomised(get_peft_model(tiny_clip(), LNTuningConfig(target_modules=["layer_norm1", "layer_norm2"])))


def headed():
    clip = ImageClassifier.from_backbone(tiny_clip(), NAMES, head="cosine", init="texts", processor=tiny_processor())
    return randomised(get_peft_model(clip, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"])))


def resnet_like():
    """A head of several layers with a batch norm, whose statistics are buffers."""
    model = tiny_vit_classifier()
    model.classifier = nn.Sequential(nn.BatchNorm1d(model.config.hidden_size), model.classifier)
    tuned = randomised(get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"])))
    head = tuned.base_model.model.classifier.modules_to_save["default"][0]
    head.running_mean += 1.0
    head.num_batches_tracked += 5
    return tuned


MODELS = {
    "LoRA": lora,
    "LoRA with bias": lambda: lora(lora_bias=True),
    "norms": norms,
    "head": headed,
    "bn": resnet_like,
}


def merged_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """All weights of the plain model that computes what the tuned one does."""
    return copy.deepcopy(model).merge_and_unload().state_dict()


def base_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """All weights of the model below the adapter."""
    state = model.get_base_model().state_dict()
    own = {name: value for name, value in state.items() if not {"default", "second"} & set(name.split("."))}
    return {
        n.replace(".base_layer.", ".").replace(".original_module.", "."): value.clone() for n, value in own.items()
    }


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_weights_are_those_of_the_mixture(make, fraction):
    model = make()
    frozen, tuned = base_weights(model), merged_weights(model)
    assert frozen.keys() == tuned.keys()
    assert any(not torch.equal(frozen[name], tuned[name]) for name in frozen)
    interpolate(model, fraction)
    for name, mixed in merged_weights(model).items():
        if mixed.is_floating_point():
            expected = (1 - fraction) * frozen[name].double() + fraction * tuned[name].double()
            torch.testing.assert_close(mixed.double(), expected, atol=1e-6, rtol=1e-5)
        else:
            assert torch.equal(mixed, tuned[name])
    for name, value in base_weights(model).items():
        assert torch.equal(value, frozen[name]), "the base model never changes"


def test_published_numbers():
    model = get_peft_model(Layer(), LoraConfig(r=2, lora_alpha=1, use_rslora=True, target_modules=["q_proj"])).double()
    layer = model.base_model.model.q_proj
    x, weight, a, b = (torch.tensor(pattern(*shape)) for shape in ((2, 4, 1), (3, 4, 6), (2, 4, 2), (3, 2, 3)))
    with torch.no_grad():
        layer.base_layer.weight.copy_(weight)
        layer.base_layer.bias.zero_()
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b)
        both = (model(x) + layer.base_layer(x)) / 2
        interpolate(model, 0.5)
        mixed = model(x)
    assert float(mixed.sum()) == pytest.approx(-1.759341, abs=5e-7)
    np.testing.assert_allclose(mixed.numpy(), both.numpy(), atol=1e-14)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_undo_restores_every_bit(make):
    model = make()
    before = copy.deepcopy(model.state_dict())
    mixed = interpolate(model, 0.0)
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    mixed.undo()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_adapter_in_half_precision_is_mixed_in_single():
    model = lora().bfloat16()
    (name, before) = next((n, p.detach().clone()) for n, p in model.named_parameters() if "lora_B" in n)
    interpolate(model, 0.7)
    assert torch.equal(model.get_parameter(name), (before.float() * 0.7).bfloat16())


def test_saved_loaded_and_exported_as_it_is(tmp_path):
    model, images = lora(), pixels()
    interpolate(model, 0.4)
    with torch.no_grad():
        expected = model.get_image_features(images).pooler_output
    save_adapter(model, tmp_path / "adapter", tiny_processor())
    export_classifier(model, NAMES, tmp_path / "exported", tiny_processor())
    loaded = load_adapter(tmp_path / "adapter", tiny_clip())
    with torch.no_grad():
        torch.testing.assert_close(loaded.get_image_features(images).pooler_output, expected)
    exported = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "exported")
    with torch.no_grad():
        torch.testing.assert_close(exported(images).image_embeds, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [lora, headed], ids=["texts", "head"])
def test_a_sweep_says_what_each_fraction_gives(make):
    model, images, processor = make(), tiny_images(20), tiny_processor()
    before = copy.deepcopy(model.state_dict())
    rows = sweep_interpolation(model, images, iter([0.0, 0.5, 1.0]), processor)
    assert [row["fraction"] for row in rows] == [0.0, 0.5, 1.0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    labels = np.array(images["label"])
    for row in rows:
        mixed = interpolate(model, row["fraction"])
        inputs = processor.image_processor(images=images["image"][:], return_tensors="pt")
        with torch.no_grad():
            if make is lora:
                texts = processor.tokenizer([f"a photo of a {n}." for n in NAMES], padding=True, return_tensors="pt")
                logits = model(
                    **inputs, input_ids=texts.input_ids, attention_mask=texts.attention_mask
                ).logits_per_image
            else:
                logits = model(**inputs).logits
        predicted = logits.argmax(-1).numpy()
        mixed.undo()
        assert row["accuracy"] == pytest.approx((predicted == labels).mean())
        recalls = [(predicted[labels == k] == k).mean() for k in range(len(NAMES))]
        assert row["balanced_accuracy"] == pytest.approx(np.mean(recalls))


def test_one_of_several_adapters():
    model = lora()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    before = copy.deepcopy(model.state_dict())
    assert interpolate(model, 0.5, "second").adapter_name == "second"
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_B.second" in name for name in changed)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="Several adapters"):
        interpolate(model, 0.5)


def merged():
    model = lora()
    model.merge_adapter()
    return model


REFUSED = {
    "prompts": (lambda: get_peft_model(tiny_clip(), NPTConfig.vpt()), "cannot be mixed"),
    "prototypes": (
        lambda: get_peft_model(tiny_vit_classifier(), PrototypeConfig(projection_dim=8)),
        "cannot be mixed",
    ),
    "IA3": (
        lambda: get_peft_model(tiny_clip(), IA3Config(target_modules=["q_proj", "fc1"], feedforward_modules=["fc1"])),
        "cannot be mixed",
    ),
    "DoRA": (lambda: lora(use_dora=True), "not proportional"),
    "PiSSA": (lambda: lora(init_lora_weights="pissa"), "pissa"),
    "tokens": (
        lambda: get_peft_model(
            tiny_clip(), LoraConfig(target_modules=["q_proj"], trainable_token_indices={"token_embedding": [1]})
        ),
        "cannot be mixed",
    ),
    "merged": (merged, "unmerge"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_mixture_is_refused_and_unchanged(make, message):
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message) as refused:
        interpolate(model, 0.5)
    assert "\n" not in str(refused.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bad_arguments():
    with pytest.raises(TypeError, match="PeftModel"):
        interpolate(tiny_clip(), 0.5)
    with pytest.raises(ValueError, match="no adapter 'x'"):
        interpolate(lora(), 0.5, "x")
    for fraction in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="0 to 1"):
            interpolate(lora(), fraction)
