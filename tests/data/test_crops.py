"""Five crops of an image at test."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor, CLIPImageProcessor, ViTImageProcessor

from peft_ncgeo import ZeroShotClassifier
from peft_ncgeo.data.crops import check_crops, five_crops, view_inputs
from peft_ncgeo.training import align_classifier

from ..conftest import NAMES, tiny_clip, tiny_images, tiny_processor, tiny_vit_classifier
from ..errors import message

STATISTICS = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
PROCESSORS = {
    "crops itself": CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, **STATISTICS),
    "wider than its crop": BitImageProcessor(
        size={"shortest_edge": 12}, crop_size={"height": 8, "width": 8}, **STATISTICS
    ),
    "resizes alone": ViTImageProcessor(size={"height": 8, "width": 8}, **STATISTICS),
}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    numbers = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(numbers)


@pytest.mark.parametrize(
    ("image", "size", "resized"),
    [
        ((300, 300), (224, 224), (248, 248)),
        ((500, 375), (224, 224), (330, 248)),  # 330.67: as torchvision, which cuts
        ((375, 500), (224, 224), (248, 330)),
        ((40, 20), (12, 12), (26, 13)),
        ((30, 31), (56, 28), (62, 64)),  # 31 would not be high enough for the width
        ((1, 100), (12, 12), (13, 1300)),
    ],
)
def test_corners_and_centre_of_the_resized_image(image, size, resized):
    whole = np.asarray(noise(*image).resize(resized, Image.Resampling.BICUBIC))
    (width, height), (w, h) = resized, size
    crops = five_crops(noise(*image), size)
    assert [crop.size for crop in crops] == [size] * 5
    for crop, expected in zip(
        crops[:4], (whole[:h, :w], whole[:h, width - w :], whole[height - h :, :w], whole[height - h :, width - w :]),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(crop, expected)
    top, left = round((height - h) / 2), round((width - w) / 2)
    np.testing.assert_array_equal(crops[4], whole[top : top + h, left : left + w])


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_take_crops_as_they_are(name):
    images = [noise(30, 20), noise(17, 40, seed=1)]
    views = view_inputs(PROCESSORS[name], images, 5)
    assert [view["pixel_values"].shape for view in views] == [(2, 3, 8, 8)] * 5
    for i, image in enumerate(images):
        for view, crop in zip(views, five_crops(image, (8, 8)), strict=True):
            expected = (np.asarray(crop).transpose(2, 0, 1) / 255 - 0.5) / 0.25
            np.testing.assert_allclose(view["pixel_values"][i], expected, atol=1e-5)
    (only,) = view_inputs(PROCESSORS[name], images, 1)
    assert torch.equal(only["pixel_values"], PROCESSORS[name](images=images, return_tensors="pt")["pixel_values"])


def test_what_cannot_be_cropped_is_refused():
    for number in (0, 2, 3, True, 5.0, "5"):
        assert "num_test_views" in message(lambda n=number: view_inputs(None, [], n), (TypeError, ValueError))
    assert "size of images" in message(lambda: check_crops(SimpleNamespace(do_resize=True)))
    timm = SimpleNamespace(data_config={"input_size": (3, 8, 8)})
    assert "resize the crops again" in message(lambda: check_crops(timm))


def test_a_zero_shot_classifier_averages_logits():
    classifier, images = ZeroShotClassifier(tiny_clip(), tiny_processor()), tiny_images(6)["image"][:]
    crops = [five_crops(image.convert("RGB"), (16, 16)) for image in images]
    logits = torch.stack(
        [classifier.predict_proba([of_image[i] for of_image in crops], NAMES).log() for i in range(5)]
    )
    scores = logits - logits.mean(-1, keepdim=True)  # softmax leaves them but for a number of each image and view
    expected = scores.mean(0).softmax(-1)
    found = classifier.predict_proba(images, NAMES, batch_size=4, num_test_views=5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, classifier.predict_proba(images, NAMES), atol=1e-3)
    predicted = classifier.predict(images, NAMES, num_test_views=5)
    assert predicted == [NAMES[i] for i in expected.argmax(-1)]


def test_an_aligned_classifier_averages_scores():
    model, processor = tiny_vit_classifier(), tiny_processor().image_processor
    aligned, images = align_classifier(model, tiny_images(20), 0.5, processor), tiny_images(6)["image"][:]
    with torch.no_grad():
        logits = [model(**view).logits for view in view_inputs(processor, [i.convert("RGB") for i in images], 5)]
    best = torch.stack(logits).mean(0).argmax(-1)
    assert aligned.predict(images, num_test_views=5) == [NAMES[i] for i in best]
