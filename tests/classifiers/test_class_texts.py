"""Texts of a class in place of its name: in zero-shot classification, in files, and under prompts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from peft_ncgeo import ZeroShotClassifier
from peft_ncgeo.classifiers import zero_shot
from peft_ncgeo.data import class_prompts
from peft_ncgeo.hub import load_adapter, save_adapter
from peft_ncgeo.models.text_setting import TextSetting, remember_text_setting

from ..conftest import NAMES, tiny_clip, tiny_images, tiny_processor
from ..training.runs import prompted_clip

TEXTS = {
    "red cat": ["a cat, red in the tree", "the photo of the red cat", "red"],
    "black_fish": ["a {} in the white tree"],
}
IMAGES = tiny_images(6)["image"][:]


def written(name: str) -> list[str]:
    """The texts of a class as they should be read."""
    own = {"red cat": TEXTS["red cat"], "black fish": ["a black fish in the white tree"]}
    return own.get(name, [f"a photo of a {name}."])


@torch.no_grad()
def by_hand(model, names=NAMES, before=()) -> np.ndarray:
    """The mean of the directions of each class's texts, each text encoded alone, without padding."""
    rows = []
    for name in names:
        directions = []
        for text in written(name):
            ids = tiny_processor().tokenizer(text).input_ids
            own = text != f"a photo of a {name}."  # in the template, prompts replace its first words
            ids = [ids[0], *(before if own else ()), *ids[1:]]
            feature = model.get_text_features(input_ids=torch.tensor([ids])).pooler_output[0].double().numpy()
            directions.append(feature / np.linalg.norm(feature))
        mean = np.mean(directions, axis=0)
        rows.append(mean / np.linalg.norm(mean))
    return np.stack(rows)


@pytest.mark.parametrize("chunk", [256, 3])
def test_features_are_the_direction_of_the_mean(monkeypatch, chunk):
    """In pieces of three too, which cut the texts of a class apart."""
    monkeypatch.setattr(zero_shot, "_CHUNK", chunk)
    classifier = ZeroShotClassifier(tiny_clip(), tiny_processor(), class_texts=TEXTS)
    found, expected = classifier.text_features(NAMES), by_hand(tiny_clip())
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    model = tiny_clip()
    image = model.get_image_features(**tiny_processor()(images=IMAGES, return_tensors="pt")).pooler_output.detach()
    image = image.double().numpy() / np.linalg.norm(image.double().numpy(), axis=1, keepdims=True)
    logits = model.logit_scale.exp().item() * image @ expected.T
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(classifier.predict_proba(IMAGES, NAMES).numpy(), probabilities, atol=1e-4)
    others = ["white panda", "green bird"]  # without texts of their own
    plain = ZeroShotClassifier(model, tiny_processor()).text_features(others)
    torch.testing.assert_close(classifier.text_features(others), plain)


@pytest.mark.slow
def test_prompts_stand_in_front_of_all_words(tmp_path):
    """Under an adapter with texts of its own, loaded again; packed as in rows of their own."""
    model = prompted_clip().eval()
    remember_text_setting(model, TextSetting(None, tuple(NAMES), class_texts=TEXTS), ["default"])
    classifier = ZeroShotClassifier(model, tiny_processor())
    slots = model.peft_config["default"].placeholder_ids or [6, 7, 8, 6]
    found = classifier.text_features(NAMES).numpy()
    np.testing.assert_allclose(found, by_hand(model.get_base_model(), before=slots), atol=1e-5)
    save_adapter(model, tmp_path, tiny_processor())
    content = json.loads((tmp_path / "geometry.json").read_text())
    assert content["class_texts"] == TEXTS
    assert "a cat, red in the tree" in (tmp_path / "README.md").read_text()
    again = ZeroShotClassifier(load_adapter(tmp_path, tiny_clip()), tiny_processor())
    np.testing.assert_allclose(again.text_features(NAMES).numpy(), found, atol=1e-6)
    without = ZeroShotClassifier(again.model, tiny_processor(), class_texts={})
    assert not np.allclose(without.text_features(NAMES).numpy(), found)
    (tmp_path / "geometry.json").write_text(json.dumps({**content, "class_texts": {"red cat": []}}))
    with pytest.raises(ValueError, match="geometry.json.*'red cat'"):
        load_adapter(tmp_path, tiny_clip())


@pytest.mark.slow
def test_texts_are_refused_by_name():
    for texts, expected in (
        ({"red cat": "a red cat"}, "'red cat'.*list of texts"),
        ({"red cat": []}, "'red cat'.*list of texts"),
        ({"red cat": ["red", "red"]}, "'red cat'.*'red' twice"),
        ({"red cat": [" "]}, "'red cat'.*not a text"),
        ({"red cat": ["red"], "red_cat": ["red"]}, "'red_cat' twice"),
        (["red cat"], "dict"),
        ({"red cat": ["a " * 15]}, "Text.*'red cat'.*cut off: it has 17 tokens.*16"),
        ({"red cat": ["red <eos> cat"]}, "Text.*'red cat'.*begins or ends"),
        ({"red cat": ["a cat"], "blue dog": ["a cat"]}, "'red cat' and 'blue dog' give the same text"),
    ):
        with pytest.raises((TypeError, ValueError), match=expected):
            class_prompts(NAMES, "a {}.", 0, tiny_processor().tokenizer, model=tiny_clip(), class_texts=texts)
