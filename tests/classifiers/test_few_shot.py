"""Tests of the predictions of few-shot classifiers."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch

from peft_ncgeo import CoPAConfig
from peft_ncgeo.classifiers.few_shot import FewShotClassifier
from peft_ncgeo.few_shot.adapt import adapt
from peft_ncgeo.geometry.heads import Heads

from ..conftest import tiny_images, tiny_processor, tiny_vit
from ..contracts.copa_backbones import BACKBONES
from ..errors import message
from ..losses.batches import unit_rows
from .few_shot_classifiers import CONFIGS, LABELS, assert_same, few_shot, images


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("temperature", [None, 0.05])
def test_probabilities_are_a_softmax_of_cosines(fields, temperature):
    """Recomputed in numpy from the classifier's tensors; rows sum to 1."""
    classifier = few_shot(**{**fields, **({} if temperature is None else {"temperature": temperature})})
    tau = temperature or fields.get("temperature", math.exp(-2))
    features, prototypes = (t.double().numpy() for t in (classifier.features(images()), classifier.prototypes))
    theta, phi = (head.double().numpy() for head in classifier.heads)
    logits = unit_rows(features @ theta) @ unit_rows(prototypes @ phi).T / tau
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = classifier.predict_proba(images())
    assert found.dtype == torch.float32
    assert found.shape == (30, 3)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(found.double().sum(1), 1, atol=1e-6)
    assert classifier.predict(images()) == [classifier.classes[i] for i in logits.argmax(1)]
    assert found.std(0).max() > 1e-4  # the images differ


def test_features_are_those_before_the_head():
    classifier = few_shot()
    expected = BACKBONES["vit"].feature(tiny_vit(), images())
    torch.testing.assert_close(classifier.features(images()), expected, atol=1e-6, rtol=1e-5)
    assert not classifier.features(images()).requires_grad


def test_a_classifier_made_by_hand():
    """Identity heads and two given prototypes: the nearest by cosine, however long they are."""
    features = BACKBONES["vit"].feature(tiny_vit(), images()).detach()
    prototypes = features[[3, 8]] * torch.tensor([[100.0], [0.01]])
    classifier = FewShotClassifier(tiny_vit(), Heads.identity(features), prototypes, ["far", "near"])
    nearest = (unit_rows(features) @ unit_rows(features[[3, 8]]).T).argmax(1)
    assert classifier.predict(images()) == [["far", "near"][i] for i in nearest]
    assert (classifier.metrics, classifier.temperature) == ({}, math.exp(-2))
    with pytest.raises(ValueError, match="There are 2 prototypes for 3 classes"):
        FewShotClassifier(tiny_vit(), Heads.identity(features), prototypes, ["a", "b", "c"])


def test_pictures_one_or_many_in_batches():
    pictures, processor = list(tiny_images(9)["image"]), tiny_processor()
    classifier = adapt(tiny_vit(), pictures, LABELS, processor=processor, steps=3)
    whole = classifier.predict_proba(pictures)
    torch.testing.assert_close(classifier.predict_proba(pictures, batch_size=2), whole, atol=1e-6, rtol=1e-5)
    assert classifier.predict(pictures[4]) == [classifier.predict(pictures)[4]]
    values = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    assert torch.equal(classifier.predict_proba(values), whole)


@pytest.mark.parametrize(
    ("given", "error", "expected"),
    [
        (images(1)[0], ValueError, "Pixels must be floating-point numbers (N, C, H, W)"),
        (list(images(2)), TypeError, "got Tensor."),
        (list(tiny_images(2)["image"]), ValueError, "No image processor"),
    ],
    ids=["one_image", "tensors", "no_processor"],
)
def test_images_that_are_none(saved, given, error, expected):
    assert expected in message(lambda: saved[0].predict(given), error)


@pytest.mark.parametrize("way", ["switched", "disabled"])
def test_a_classifier_stays_whichever_adapter_is_active(way):
    """It holds weights of its own; with heads alone it does stay."""
    classifier = few_shot(residual_adapters=True)
    model, before = classifier.model, classifier.predict_proba(images())
    if way == "switched":
        model.add_adapter("other", CoPAConfig(residual_adapters=True))
        model.set_adapter("other")
        assert torch.equal(classifier.predict_proba(images()), before)
    else:
        with model.disable_adapter():
            assert torch.equal(classifier.predict_proba(images()), before)


@pytest.mark.parametrize("way", ["switched", "disabled"])
def test_heads_stay_whichever_adapter_is_active(way):
    classifier = few_shot()
    model, before = classifier.model, classifier.predict_proba(images())
    if way == "switched":
        model.add_adapter("other", CoPAConfig())
        model.set_adapter("other")
        assert torch.equal(classifier.predict_proba(images()), before)
    else:
        with model.disable_adapter():
            assert torch.equal(classifier.predict_proba(images()), before)


@pytest.mark.parametrize("way", ["unloaded", "deleted"])
@pytest.mark.filterwarnings("ignore:.*active which is now deleted")
def test_without_its_adapter_a_classifier_of_heads_goes_on_and_others_say_so(way):
    for residual in (False, True):
        classifier = few_shot(residual_adapters=residual)
        model, before = classifier.model, classifier.predict_proba(images())
        if way == "unloaded":
            model.unload()
        else:
            model.add_adapter("other", CoPAConfig(residual_adapters=residual))
            model.delete_adapter("default")
        if residual:
            assert "'default' is no longer in the model" in message(lambda c=classifier: c.predict(images()))
        else:
            assert torch.equal(classifier.predict_proba(images()), before)


def test_a_pickled_classifier(saved):
    assert_same(pickle.loads(pickle.dumps(saved[0])), saved[0])
