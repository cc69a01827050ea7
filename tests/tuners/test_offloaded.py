"""Adapters on a base whose weights Accelerate keeps on disk, against the same base in memory."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CLIPModel, ViTForImageClassification

from peft_ncgeo import AdaptFormerConfig, CoPAConfig, NPTConfig, PrototypeConfig, ZeroShotClassifier, adapt
from peft_ncgeo.hub import load_adapter
from peft_ncgeo.losses import OTPreservation
from peft_ncgeo.training import align_classifier

from ..conftest import NAMES, tiny_clip, tiny_images, tiny_processor, tiny_vit_classifier
from ..training.runs import trainer, weights

DEPTHS = {"text_depth": 2, "vision_depth": 2}
PROMPTS = {
    "independent": NPTConfig(num_text_tokens=4, num_vision_tokens=2, text_init=[6, 7, 8, 6], **DEPTHS),
    "coupled": NPTConfig(text_init=[6, 7], num_text_tokens=2, num_vision_tokens=2, coupling="coupled", **DEPTHS),
}
SMALL = {"visual_projection": "cpu", "text_projection": "cpu", "logit_scale": "cpu"}
MAPS = {
    "vision": {**SMALL, "text_model": "cpu", "vision_model": "disk"},
    "both": {**SMALL, "text_model": "disk", "vision_model": "disk", "visual_projection": "disk"},
    "all": {  # but for one part of each model, since older Accelerate refuses a whole model on disk
        **dict.fromkeys(("text_model", "vision_model", "visual_projection"), "disk"),
        **dict.fromkeys(("vit.embeddings", "vit.layers", "classifier"), "disk"),
        **{"text_projection": "cpu", "logit_scale": "cpu", "vit.layernorm": "cpu"},
    },
}
IMAGES = tiny_images(8)
LORA = LoraConfig(target_modules=["q_proj"])
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following device_map keys", "ignore:.*was renamed from"),
    pytest.mark.slow,
]


@pytest.fixture
def offloaded(tmp_path):
    """A base with parts on disk."""

    def load(device_map, build=tiny_clip):
        base = tmp_path / build.__name__
        build().save_pretrained(base)
        kind = CLIPModel if build is tiny_clip else ViTForImageClassification
        folder = tmp_path / "offloaded"
        return kind.from_pretrained(base, device_map=device_map, offload_folder=folder)

    return load


def probabilities(model):
    return ZeroShotClassifier(model, tiny_processor()).predict_proba(IMAGES["image"][:], NAMES)


def seeded(base, config):
    torch.manual_seed(0)
    return get_peft_model(base, config)


@pytest.mark.parametrize("place", ["vision", "both"])
@pytest.mark.parametrize("prompts", PROMPTS)
def test_prompts_work_as_in_memory(tmp_path, offloaded, prompts, place):
    config = PROMPTS[prompts]
    trained, answers = [], []
    for base in (tiny_clip(), offloaded(MAPS[place])):
        model = seeded(base, config)
        assert not any(parameter.is_meta for name, parameter in model.named_parameters() if "ncgeo" in name)
        run = trainer(tmp_path, model, [OTPreservation(weight=1.0)], max_steps=2)
        run.train()
        trained.append(weights(model))
        answers.append(probabilities(model))
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())
    assert torch.equal(*answers)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(probabilities(load_adapter(tmp_path / "adapter", offloaded(MAPS[place]))), answers[0])


@pytest.mark.parametrize("config", [None, CoPAConfig(), CoPAConfig(residual_adapters=True)])
def test_few_images_are_enough_there_too(offloaded, config):
    answers = []
    for base in (tiny_vit_classifier(), offloaded(MAPS["all"], tiny_vit_classifier)):
        model = base if config is None else get_peft_model(base, config)
        found = adapt(model, IMAGES["image"][:], IMAGES["label"][:], steps=3, processor=tiny_processor())
        answers.append(found.predict_proba(IMAGES["image"][:]))
    assert torch.equal(*answers)


@torch.no_grad()
def test_bottleneck_adapters_work_as_in_memory(offloaded):
    answers = []
    for base in (tiny_clip(), offloaded(MAPS["both"])):
        model = seeded(base, AdaptFormerConfig(bottleneck_dim=2))
        for name, parameter in model.named_parameters():
            if "ncgeo_adaptformer_up" in name:
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(parameter.numel()))
        answers.append(probabilities(model))
    torch.testing.assert_close(*answers)
    assert not torch.allclose(answers[0], probabilities(tiny_clip()), atol=1e-3)


def test_threads_do_not_take_weights_from_each_other(offloaded):
    """Accelerate brings weights into the one model and takes them out again, whoever else is running it."""
    zero_shot = ZeroShotClassifier(seeded(offloaded(MAPS["both"]), PROMPTS["independent"]), tiny_processor())
    vit, vit_map = tiny_vit_classifier, {"vit": "disk", "classifier": "cpu"}
    few_shot = adapt(
        offloaded(MAPS["all"], vit), IMAGES["image"][:], IMAGES["label"][:], 2, processor=tiny_processor()
    )
    aligned = align_classifier(offloaded(vit_map, vit), IMAGES, 0.5, tiny_processor())
    lists = [[f"{word} {name}" for name in NAMES] for word in ("red", "green", "blue", "black")]

    def ask(i):
        image = IMAGES[i % 8]["image"]
        return zero_shot.predict_proba(image, lists[i % 4]), few_shot.predict_proba(image), aligned.predict(image)

    expected = [ask(i) for i in range(24)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads take turns often
    try:
        zero_shot = ZeroShotClassifier(zero_shot.model, tiny_processor())  # which knows no texts yet
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(24)))
    finally:
        sys.setswitchinterval(before)
    for (words, shots, names), (own_words, own_shots, own_names) in zip(answers, expected, strict=True):
        torch.testing.assert_close(words, own_words)
        torch.testing.assert_close(shots, own_shots)
        assert names == own_names


def test_what_cannot_work_is_refused(tmp_path, offloaded):
    """A weight that is nowhere gives what lies in memory: other answers each time, or none that are numbers."""
    vit, lora = tiny_vit_classifier, get_peft_model(tiny_clip(), LORA)
    lora.save_pretrained(tmp_path / "lora")
    head = NPTConfig(num_vision_tokens=2, modules_to_save=["classifier"])
    refused = {
        "a LoRA's weights": lambda: probabilities(get_peft_model(offloaded(MAPS["vision"]), LORA)),
        "in training": lambda: trainer(tmp_path, get_peft_model(offloaded(MAPS["vision"]), LORA)),
        "from a file": lambda: load_adapter(tmp_path / "lora", offloaded(MAPS["vision"])),
        "a head": lambda: trainer(tmp_path, get_peft_model(offloaded(MAPS["all"], vit), head)),
        "the whole": lambda: trainer(tmp_path, get_peft_model(offloaded({"": "disk"}, vit), PrototypeConfig())),
        "scale": lambda: probabilities(offloaded({"": "disk"})),
        "alignment": lambda: align_classifier(offloaded(MAPS["all"], vit), IMAGES, 0.5, tiny_processor()),
    }
    for name, call in refused.items():
        with pytest.raises(ValueError, match="device_map|disk_offload") as error:
            call()
        assert "\n" not in str(error.value), name
        assert "does not fit" not in str(error.value), name
