"""SigLIP 2 with images of any number of patches: a mask and sizes go beside the pixels, everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image as PILImage
from transformers import Siglip2ImageProcessor

from peft_ncgeo import CoPAConfig, GeometryTrainer, GeometryTrainingArguments, NPTConfig, adapt
from peft_ncgeo.classifiers.image_features import ImageFeatures
from peft_ncgeo.losses import OTPreservation
from peft_ncgeo.models import encode_images
from peft_ncgeo.models.image_encoder import image_inputs
from peft_ncgeo.training import align_classifier
from peft_ncgeo.tuners.prompt_layer import _grow_mask

from .test_families import SIZES, build, refusal, siglip2

VISION = {**SIZES, "patch_size": 8, "num_patches": 16}
PROCESSOR = Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
NAMES = ["red", "green", "blue"]
SHAPES = [(40, 20), (20, 40), (32, 32)]  # of images; 15, 15 and 16 patches of at most 16


def images(count: int = 9) -> Dataset:
    rng = np.random.default_rng(0)
    labels = [i // 3 % 3 for i in range(count)]
    arrays = [rng.integers(0, 120, (*SHAPES[i % 3], 3)) + 135 * (np.arange(3) == k) for i, k in enumerate(labels)]
    return Dataset.from_dict(
        {
            "image": [PILImage.fromarray(a.astype(np.uint8)) for a in arrays],
            "label": [i // 3 % 3 for i in range(count)],
        },
        features=Features({"image": Image(), "label": ClassLabel(names=NAMES)}),
    )


def inputs(count: int = 3) -> dict[str, torch.Tensor]:
    found = image_inputs(PROCESSOR(images=images(count)["image"][:], return_tensors="pt"))
    assert not found["pixel_attention_mask"].all()  # some are padded
    return found


def tower(attention: str = "sdpa"):
    model = build("Siglip2VisionModel", **VISION)
    model.set_attn_implementation(attention)
    return model


def classifier():
    return build("Siglip2ForImageClassification", vision_config=VISION, num_labels=3)


# ---- prompts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_prompts_that_repeat_the_unpadded_tokens_change_nothing(attention):
    given = {name: value[:1] for name, value in inputs().items()}
    mask = given["pixel_attention_mask"][0].bool()
    assert not mask.all()
    base = tower(attention)
    tokens = base.embeddings(given["pixel_values"], given["spatial_shapes"])[0, mask]
    expected = base(**given)
    model = get_peft_model(base, NPTConfig(num_vision_tokens=len(tokens), vision_depth=1)).eval()
    (prompt,) = (p for name, p in model.named_parameters() if "ncgeo" in name)
    prompt.copy_(tokens)
    got = model(**given)
    torch.testing.assert_close(got.pooler_output, expected.pooler_output, atol=1e-4, rtol=1e-4)
    assert got.last_hidden_state.shape == expected.last_hidden_state.shape
    prompt.add_(torch.randn_like(prompt))
    assert not torch.allclose(model(**given).pooler_output, expected.pooler_output, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(**given).pooler_output, expected.pooler_output)


@pytest.mark.parametrize("first_layer", [0, 1])
def test_prompts_are_a_set_beside_the_patches_of_each_image(first_layer, tmp_path):
    config = NPTConfig(num_vision_tokens=3, vision_depth=2 - first_layer, first_layer=first_layer, init_std=0.5)
    model = get_peft_model(tower(), config).eval()
    prompts = [p for name, p in model.named_parameters() if "ncgeo" in name]
    given = inputs()
    out = model(**given).pooler_output
    out.square().sum().backward()
    assert all(row.abs().max() > 0 for p in prompts for row in p.grad)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        again = PeftModel.from_pretrained(tower(), tmp_path).eval()
        assert torch.equal(again(**given).pooler_output, out)
        for i in range(3):  # in a batch as alone
            alone = model(**{name: value[i : i + 1] for name, value in given.items()}).pooler_output
            torch.testing.assert_close(alone, out[i : i + 1], atol=1e-5, rtol=1e-5)
        noise = given["pixel_values"] + 9 * (given["pixel_attention_mask"] == 0)[..., None]
        torch.testing.assert_close(model(**{**given, "pixel_values": noise}).pooler_output, out)
        for prompt in prompts:
            prompt.copy_(prompt.flip(0))
        torch.testing.assert_close(model(**given).pooler_output, out, atol=1e-5, rtol=1e-5)


def test_a_mask_grows_by_tokens_that_all_see():
    hidden = torch.tensor([[1, 1, 0]])
    assert _grow_mask(hidden, 5).tolist() == [[1, 1, 0, 1, 1]]
    for four in (hidden.bool(), torch.where(hidden.bool(), 0.0, -9.0)):
        grown = _grow_mask(four[:, None, None].expand(1, 1, 3, 3), 5)
        assert grown.shape == (1, 1, 5, 5)
        seen = grown if grown.dtype == torch.bool else grown == 0
        assert seen[0, 0].tolist() == [[True, True, False, True, True]] * 5
    assert _grow_mask(None, 5) is None
    refusal(lambda: _grow_mask("blocks", 5), "sdpa")


# ---- every path that encodes images -------------------------------------------------------------------------------


@torch.no_grad()
def test_encoders_hand_on_what_stands_beside_the_pixels():
    model = siglip2()
    given = inputs()
    assert torch.equal(encode_images(model, **given), model.get_image_features(**given).pooler_output)
    refusal(lambda: encode_images(model, given["pixel_values"]), "pixel_attention_mask", ValueError)
    refusal(lambda: encode_images(classifier(), given["pixel_values"]), "pixel_attention_mask", ValueError)
    refusal(lambda: ImageFeatures(tower())(given["pixel_values"]), "pixel_attention_mask", ValueError)
    refusal(lambda: ImageFeatures(tower()).embed(torch.zeros(1, 3, 16, 16)), "pixel_attention_mask", ValueError)


def test_few_images(tmp_path):
    """With residual maps, whose gradient is computed in batches."""
    photographs = images()["image"][:]
    with torch.no_grad():
        expected = tower()(**inputs(9)).pooler_output
        torch.testing.assert_close(ImageFeatures(tower(), PROCESSOR).embed(photographs, batch_size=4), expected)
    model = get_peft_model(tower(), CoPAConfig(residual_adapters=True))
    found = adapt(model, photographs, list("aaabbbccc"), processor=PROCESSOR, steps=3, batch_size=4)
    assert len(found.predict(photographs)) == 9
    assert found.metrics["gap_before"] != found.metrics["gap_after"]


@pytest.mark.parametrize("config", [LoraConfig(target_modules="all-linear", r=2), NPTConfig(num_vision_tokens=2)])
def test_training_and_evaluation(config, tmp_path):
    """Two steps with a frozen teacher, whose features of all views are computed before."""
    config.modules_to_save = ["classifier"]
    model = get_peft_model(classifier(), config)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    arguments = GeometryTrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=9, learning_rate=1e-2, report_to="none"
    )
    losses, data = [OTPreservation(weight=1.0, modality="image")], images()
    run = GeometryTrainer(model, arguments, data, data, processing_class=PROCESSOR, losses=losses)
    run.train()
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    with torch.no_grad():
        with model.disable_adapter():
            own = encode_images(model, **inputs(9))
        torch.testing.assert_close(run.features.frozen_views.features, own, atol=1e-5, rtol=1e-5)
        logits = model.eval()(**inputs(9)).logits
    torch.testing.assert_close(torch.from_numpy(run.predict(data).predictions), logits, atol=1e-5, rtol=1e-5)
    accuracy = (logits.argmax(-1) == torch.tensor(data["label"])).float().mean()
    assert align_classifier(model, data, 0.5, PROCESSOR).accuracy_before == pytest.approx(float(accuracy))
    arguments.augmentation = "crop_flip"
    refusal(run.get_train_dataloader, "augmentation", ValueError)
