"""Five crops of an image in a few-shot classifier: the mean of their scores."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from peft_ncgeo import CoPAConfig, adapt
from peft_ncgeo.data.crops import five_crops
from peft_ncgeo.few_shot import TipAdapter

from ..conftest import IMAGE_SIZE, NAMES, tiny_clip, tiny_images, tiny_processor, tiny_vit

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SUPPORT = tiny_images(10)


def copa():
    model, labels = get_peft_model(tiny_vit(), CoPAConfig()), SUPPORT["label"][:]
    return adapt(model, SUPPORT["image"][:], labels, steps=5, lr=0.05, processor=tiny_processor().image_processor)


def cached():
    options = {"class_names": NAMES, "head": TipAdapter(), "num_views": 1, "processor": tiny_processor()}
    return adapt(tiny_clip(), SUPPORT["image"][:], SUPPORT["label"][:], **options)


@pytest.mark.parametrize("batch_size", [2, 64])
@pytest.mark.parametrize("make", [copa, cached])
def test_scores_are_the_mean_over_the_crops(make, batch_size):
    classifier, images = make(), tiny_images(5, seed=4)["image"][:]
    process = tiny_processor().image_processor
    crops = [five_crops(image.convert("RGB"), (IMAGE_SIZE, IMAGE_SIZE)) for image in images]
    scores = []
    for views in zip(*crops, strict=True):
        pixels = process(images=list(views), do_resize=False, do_center_crop=False, return_tensors="pt")[
            "pixel_values"
        ]
        scores.append((classifier.predict_proba(pixels).log() * classifier.temperature).double())
    found = classifier.predict_proba(images, batch_size, num_test_views=5)
    # the logarithm of probabilities is the scores up to a number of each image
    expected = (torch.stack(scores).mean(0) / classifier.temperature).softmax(-1)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)
    names = [classifier.classes[i] for i in expected.argmax(-1).tolist()]
    assert classifier.predict(images, num_test_views=5) == names


def test_what_cannot_be_cropped_is_refused():
    classifier = cached()
    with pytest.raises(ValueError, match="PIL images"):
        classifier.predict(torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE), num_test_views=5)
    with pytest.raises(ValueError, match="must be 1"):
        classifier.predict(tiny_images(1)["image"][:], num_test_views=3)
