"""Temperatures at which nothing is left of the cosines: refused, or the nearest class is answered all the same."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model

from peft_ncgeo import CoPAConfig, FewShotClassifier, PrototypeConfig, ZeroShotClassifier, adapt
from peft_ncgeo.classifiers.image_features import ImageFeatures
from peft_ncgeo.geometry import prototype_image_contrast
from peft_ncgeo.geometry.heads import Heads
from peft_ncgeo.hub import export_classifier, load_adapter
from peft_ncgeo.losses import PrototypeImageContrast, PrototypeSupCon
from peft_ncgeo.training import align_classifier

from ..conftest import NAMES, pixels, tiny_clip, tiny_images, tiny_processor, tiny_vit, tiny_vit_classifier

HEADS = Heads(torch.eye(32), torch.eye(32))


def few_shot(temperature):
    prototypes = ImageFeatures(tiny_vit())(pixels(9)).detach()
    return FewShotClassifier(tiny_vit(), HEADS, prototypes, range(9), temperature)


TAKEN_BY = {
    "CoPAConfig": lambda tau: CoPAConfig(temperature=tau),
    "PrototypeConfig": lambda tau: PrototypeConfig(temperature=tau),
    "PrototypeImageContrast": lambda tau: PrototypeImageContrast(temperature=tau),
    "PrototypeSupCon": lambda tau: PrototypeSupCon(temperature=tau),
    "prototype_image_contrast": lambda tau: prototype_image_contrast(
        torch.eye(3), torch.eye(3), torch.arange(3), temperature=tau
    ),
    "FewShotClassifier": few_shot,
}


@pytest.mark.parametrize("taken_by", TAKEN_BY)
@pytest.mark.parametrize("temperature", [0, -1, 1e-300, 1e-45, 1e-7, 1e7, 1e300, float("nan"), float("inf")])
def test_a_temperature_out_of_range(taken_by, temperature):
    with pytest.raises(ValueError, match="temperature=.* must be 1e-6 to 1e6"):
        TAKEN_BY[taken_by](temperature)


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_the_nearest_class_at_the_ends_of_the_range(temperature):
    classifier, images = few_shot(temperature), pixels(9)[:8]
    features = classifier.features(images).double()
    expected = torch.nn.functional.cosine_similarity(features[:, None], classifier.prototypes.double(), dim=-1)
    assert classifier.predict(images) == expected.argmax(1).tolist()
    probabilities = classifier.predict_proba(images)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(8))
    assert classifier.predict(images) == list(range(8))  # an image is nearest to its own feature
    head = get_peft_model(tiny_vit_classifier(), PrototypeConfig(temperature=temperature)).eval()
    cosines = get_peft_model(tiny_vit_classifier(), PrototypeConfig(temperature=1.0)).eval()
    cosines.load_state_dict(head.state_dict())
    logits = head(pixel_values=images).logits
    assert logits.isfinite().all()
    assert torch.equal(logits.argmax(1), cosines(pixel_values=images).logits.argmax(1))


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e40])
def test_a_downloaded_config(tmp_path, temperature):
    adapt(get_peft_model(tiny_vit(), CoPAConfig()), pixels(4), [0, 1, 0, 1], steps=1).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "temperature": temperature}))
    for load in (load_adapter, FewShotClassifier.from_pretrained):
        with pytest.raises(ValueError, match="damaged: temperature=.* must be"):
            load(tmp_path, tiny_vit())


def scaled(logit_scale):
    model = tiny_clip()
    model.logit_scale.data.fill_(logit_scale)
    return model


def test_a_clip_that_multiplies_cosines_by_infinity(tmp_path):
    """Finite itself, its scale is not: exp(200)."""
    images = tiny_images(4)["image"][:]
    classifier = ZeroShotClassifier(scaled(200.0), tiny_processor())
    for call in (classifier.predict, classifier.predict_proba):
        with pytest.raises(ValueError, match="logits of image .* are not finite"):
            call(images, NAMES)
    with pytest.raises(ValueError, match="logit_scale.* is not finite"):
        export_classifier(scaled(200.0), NAMES, tmp_path / "export", tiny_processor())


@pytest.mark.parametrize("logit_scale", [-20.0, 60.0])
def test_names_are_those_of_the_largest_cosine(logit_scale):
    images, usual = tiny_images(12)["image"][:], ZeroShotClassifier(tiny_clip(), tiny_processor())
    expected = usual.predict(images, NAMES)
    assert NAMES[0] not in expected  # which argmax answers where all are the same
    assert ZeroShotClassifier(scaled(logit_scale), tiny_processor()).predict(images, NAMES) == expected


def test_aligned_texts_whatever_the_scale():
    data = tiny_images(12)
    usual, extreme = (align_classifier(scaled(s), data, 0.3, tiny_processor()) for s in (2.0, 200.0))
    assert extreme.accuracy_after == usual.accuracy_after
    assert extreme.predict(data["image"][:]) == usual.predict(data["image"][:])
    assert len(set(usual.predict(data["image"][:]))) > 1
