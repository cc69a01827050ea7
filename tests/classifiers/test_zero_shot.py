from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from peft_ncgeo import NPTConfig, ZeroShotClassifier
from peft_ncgeo.classifiers import zero_shot
from peft_ncgeo.evaluation import harmonic_mean
from peft_ncgeo.geometry.sphere import cosine_logits
from peft_ncgeo.metrics.accuracy import accuracy, balanced_accuracy

from ..conftest import NAMES, tiny_clip, tiny_images, tiny_processor, tiny_vit

IMAGES = tiny_images(7)["image"][:]


def classifier(**fields) -> ZeroShotClassifier:
    torch.manual_seed(0)
    fields = {"num_text_tokens": 4, "num_vision_tokens": 2, "text_init": [20, 21, 22, 23], **fields}
    return ZeroShotClassifier(get_peft_model(tiny_clip(), NPTConfig(**fields)), tiny_processor())


@torch.no_grad()
def test_probabilities_equal_clips_own():
    model, processor = tiny_clip(), tiny_processor()
    expected = model(
        **processor(text=[f"a photo of a {n}." for n in NAMES], images=IMAGES, return_tensors="pt", padding=True)
    ).logits_per_image.softmax(-1)
    got = ZeroShotClassifier(model, processor).predict_proba(IMAGES, NAMES, batch_size=3)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_predictions_are_names():
    c = classifier()
    probabilities = c.predict_proba(IMAGES, NAMES)
    assert probabilities.shape == (7, 5)
    assert c.predict(IMAGES, NAMES) == [NAMES[i] for i in probabilities.argmax(1)]
    assert c.predict(IMAGES[0], NAMES) == c.predict(IMAGES[:1], NAMES)
    assert c.predict([], NAMES) == []
    assert c.predict_proba([], NAMES).shape == (0, 5)


def test_the_first_image_with_damaged_features_is_named(monkeypatch):
    real, damage = zero_shot.encode_images, iter([1.0, 1.0, float("nan"), float("nan")])
    monkeypatch.setattr(zero_shot, "encode_images", lambda model, **given: real(model, **given) * next(damage))
    with pytest.raises(ValueError, match="The.*image 4.*not finite"):
        ZeroShotClassifier(tiny_clip(), tiny_processor()).predict_proba(IMAGES, NAMES, batch_size=2)


def test_text_features_are_kept_until_something_changes():
    c = classifier()
    first = c.text_features(NAMES)
    assert c.text_features(list(NAMES)) is first
    assert c.text_features(NAMES[:3]).shape[0] == 3
    assert c.text_features(NAMES) is first
    with torch.no_grad():
        next(p for p in c.model.parameters() if p.requires_grad).add_(1.0)
    changed = c.text_features(NAMES)
    prompt = next(p for p in c.model.parameters() if p.requires_grad)
    prompt.data.add_(1.0)  # a write that autograd does not count
    changed, before = c.text_features(NAMES), changed
    assert not torch.allclose(changed, before)
    with torch.inference_mode():
        assert c.text_features(NAMES) is changed
    assert not torch.allclose(changed, first)
    with c.model.disable_adapter():
        base = c.text_features(NAMES)
        torch.testing.assert_close(base, ZeroShotClassifier(tiny_clip(), tiny_processor()).text_features(NAMES))
    c.model.add_adapter("other", NPTConfig(num_text_tokens=6, template="a photo of the {}."))
    c.model.set_adapter("other")
    assert c.template == "a photo of the {}."
    assert not torch.allclose(c.text_features(NAMES), changed)


def test_from_pretrained_in_three_ways(tmp_path):
    c = classifier()
    expected = c.predict_proba(IMAGES, NAMES)
    tiny_clip().save_pretrained(tmp_path / "base")
    tiny_processor().save_pretrained(tmp_path / "base")
    c.model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    c.model.save_pretrained(tmp_path / "adapter")
    for base_model in (None, str(tmp_path / "base")):
        loaded = ZeroShotClassifier.from_pretrained(tmp_path / "adapter", base_model)
        assert torch.equal(loaded.predict_proba(IMAGES, NAMES), expected)
    with pytest.raises(ValueError, match="No processor beside the adapter"):
        ZeroShotClassifier.from_pretrained(tmp_path / "adapter", tiny_clip())
    loaded = ZeroShotClassifier.from_pretrained(tmp_path / "adapter", tiny_clip(), tiny_processor())
    assert torch.equal(loaded.predict_proba(IMAGES, NAMES), expected)
    tiny_processor().save_pretrained(tmp_path / "adapter")
    loaded = ZeroShotClassifier.from_pretrained(tmp_path / "adapter", tiny_clip())
    assert torch.equal(loaded.predict_proba(IMAGES, NAMES), expected)


def test_refusals():
    with pytest.raises(ValueError, match="ViTModel gives no text features"):
        ZeroShotClassifier(tiny_vit(), tiny_processor())
    with pytest.raises(ValueError, match="at least two class names"):
        classifier().predict(IMAGES, ["cat"])
    with pytest.raises(ValueError, match="Duplicate class names"):
        classifier().predict(IMAGES, ["cat", "cat"])
    with pytest.raises(TypeError, match="class names must.*names.*'cat'"):
        classifier().predict(IMAGES, "cat")
    with pytest.raises(TypeError, match="images must be paths.*got int"):
        classifier().predict([3], NAMES)


def test_metrics():
    assert accuracy([0, 1, 1, 2], [0, 1, 0, 2]) == 0.75
    assert balanced_accuracy([0, 1, 1, 2], [0, 1, 0, 2]) == pytest.approx((0.5 + 1 + 1) / 3)
    assert harmonic_mean(0.5, 0.25) == pytest.approx(1 / 3)
    assert harmonic_mean(0.0, 0.0) == 0


def test_adapters_added_anew_are_never_taken_for_the_old():
    c = classifier()
    for seed in range(5):
        torch.manual_seed(seed)
        before = c.text_features(NAMES)
        c.model.delete_adapter("default")
        c.model.add_adapter("default", NPTConfig(num_text_tokens=4, init_std=1.0))
        c.model.set_adapter("default")
        assert not torch.allclose(c.text_features(NAMES), before)


def test_a_base_model_in_training_mode_is_put_into_evaluation_mode():
    """Also where the `PeftModel` around it is in evaluation mode already."""
    c = classifier()
    base = c.model.get_base_model()
    for layer in (layer for tower in (base.text_model, base.vision_model) for layer in tower.encoder.layers):
        layer.self_attn.dropout = 0.5
    expected = c.predict_proba(IMAGES, NAMES)
    base.train()
    assert not c.model.training
    assert torch.equal(c.predict_proba(IMAGES, NAMES), expected)


def test_prediction_is_in_evaluation_mode():
    c = classifier()
    c.model.train()
    c.predict(IMAGES, NAMES)
    assert not c.model.training


def test_autocast_does_not_reach_the_logits():
    c = classifier()
    c.text_features(NAMES)
    images = c.predict_proba(IMAGES, NAMES)
    f, g = torch.randn(2, 8), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        logits = cosine_logits(f, g, torch.tensor(4.6))
    assert logits.dtype == images.dtype == torch.float32
    torch.testing.assert_close(logits, cosine_logits(f, g, torch.tensor(4.6)))


class Calls(TorchDispatchMode):
    """Counts the operations on tensors."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


def test_known_texts_cost_nothing_on_a_plain_model():
    """Its weights may ask for gradients, as `from_pretrained` leaves them; they are not compared in every call."""
    classifier = ZeroShotClassifier(tiny_clip().requires_grad_(True), tiny_processor())
    first = classifier.text_features(NAMES)
    with Calls() as calls:
        assert classifier.text_features(NAMES) is first
    assert calls.number == 0
