"""Labels and images of a support set: what is read, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from datasets import Value
from peft import get_peft_model
from PIL import Image as PILImage
from transformers import BertConfig, BertModel, ViTModel

from peft_ncgeo import CoPAConfig
from peft_ncgeo.few_shot.adapt import adapt
from peft_ncgeo.few_shot.episodes import fit_heads

from ..conftest import pixels, tiny, tiny_images, tiny_processor, tiny_vit
from ..contracts.copa_backbones import adapted, first_token
from ..errors import message
from .support import LABELS, NINE, assert_as_before, means, snapshot

WORDS = ["two", "nil", "one", "one", "nil", "two", "two", "two", "nil"]  # as LABELS, in another order of classes


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (LABELS, [0, 1, 2]),
        ([17 if c == 2 else 3 - c for c in LABELS], [2, 3, 17]),
        ([-c for c in LABELS], [-2, -1, 0]),
        (np.array(LABELS), [0, 1, 2]),
        (list(np.array(LABELS, dtype=np.int16)), [0, 1, 2]),
        (torch.tensor(LABELS), [0, 1, 2]),
        (torch.tensor(LABELS, dtype=torch.uint8), [0, 1, 2]),
        (list(torch.tensor(LABELS)), [0, 1, 2]),
        (WORDS, ["nil", "one", "two"]),
        (tuple(WORDS), ["nil", "one", "two"]),
        (np.array(WORDS), ["nil", "one", "two"]),
        ([c == 2 for c in LABELS], [False, True]),
    ],
    ids=[
        "ints",
        "sparse",
        "negative",
        "array",
        "numpy",
        "tensor",
        "uint8",
        "tensors",
        "words",
        "tuple",
        "numpy_words",
        "bools",
    ],
)
def test_labels_of_every_kind(labels, classes):
    """The classifier answers with them, as plain Python numbers and words."""
    images, others = pixels(9, seed=4), pixels(40, seed=5)
    classifier = adapt(tiny_vit(), images, labels, steps=5)
    assert classifier.classes == classes
    assert {type(name) for name in classifier.classes} == {type(classes[0])}
    plain = [label.item() if hasattr(label, "item") else label for label in labels]
    places = torch.tensor([classes.index(label) for label in plain])
    features = first_token(tiny_vit(), images).detach()
    torch.testing.assert_close(classifier.prototypes, means(features, places), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(classifier.heads.image, fit_heads(features, places, 5).image, atol=1e-5, rtol=0)
    predicted = classifier.predict(others)
    assert [type(name) for name in predicted] == [type(classes[0])] * 40
    found = classifier.heads.scores(first_token(tiny_vit(), others), classifier.prototypes).argmax(1)
    assert predicted == [classes[i] for i in found.tolist()]
    assert len(set(predicted)) == len(classes)


def picture(mode: str, seed: int) -> PILImage.Image:
    """Random; sixteen bits with all of their range."""
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        return PILImage.fromarray(rng.integers(0, 65536, (20, 24)).astype(np.uint16))
    return PILImage.fromarray(rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)).convert(mode)


def as_rgb(image: PILImage.Image) -> PILImage.Image:
    if image.mode == "I;16":
        image = PILImage.fromarray((np.asarray(image).astype(np.float64) // 257).astype(np.uint8))
    return image.convert("RGB")


def test_images_of_every_mode():
    modes = ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "YCbCr"]
    images = [picture(mode, i) for i, mode in enumerate(modes)]
    assert [image.mode for image in images] == modes
    processor = tiny_processor()
    values = processor.image_processor(images=[as_rgb(image) for image in images], return_tensors="pt")["pixel_values"]
    assert len({value.flatten()[:50].sum().item() for value in values}) == len(modes)
    expected = adapt(tiny_vit(), values, LABELS, steps=5)
    for given in (images, tuple(images), iter(images)):
        for kind in (processor, processor.image_processor):
            if given is not images and kind is processor:
                continue
            found = adapt(tiny_vit(), given, LABELS, steps=5, processor=kind)
            assert torch.equal(found.heads.image, expected.heads.image)
            assert torch.equal(found.predict_proba(images), expected.predict_proba(values))
    assert found.predict(images[3]) == [expected.predict(values[3:4])[0]]


def test_columns_of_a_data_set():
    images = tiny_images(9)
    labels = images["label"]
    found = adapt(tiny_vit(), images["image"], labels, steps=5, processor=tiny_processor())
    expected = adapt(tiny_vit(), list(images["image"]), list(labels), steps=5, processor=tiny_processor())
    assert found.classes == [0, 1, 2, 3, 4]
    assert torch.equal(found.heads.image, expected.heads.image)
    assert found.predict(images["image"]) == expected.predict(list(images["image"]))
    words = images.cast_column("label", Value("string"))
    named = adapt(tiny_vit(), words["image"], words["label"], steps=5, processor=tiny_processor())
    assert named.classes == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("residual", [False, True])
def test_the_processor_that_lies_where_the_model_came_from(residual, tmp_path):
    tiny_vit().save_pretrained(tmp_path)
    processor = tiny_processor().image_processor
    processor.save_pretrained(tmp_path)
    model = get_peft_model(ViTModel.from_pretrained(tmp_path), CoPAConfig(residual_adapters=residual))
    images = list(tiny_images(9)["image"])
    found = adapt(model, images, LABELS, steps=3)
    expected = adapt(model, images, LABELS, steps=3, processor=processor)
    assert torch.equal(found.heads.image, expected.heads.image)
    assert found.predict(images) == expected.predict(images)


def with_nan(place: int) -> torch.Tensor:
    images = pixels(9, seed=4)
    images[place, 1, 3, 3] = math.nan
    return images


def tiny_bert():
    return tiny(BertModel, BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9))


BAD = {
    "one_class": (ValueError, NINE, [1] * 9, {}, "at least two classes, got [1]"),
    "fewer_labels": (ValueError, NINE, LABELS[:8], {}, "There are 9 support images and 8 labels"),
    "more_labels": (ValueError, NINE[:8], LABELS, {}, "There are 8 support images and 9 labels"),
    "no_list": (ValueError, [], LABELS, {}, "There are no images"),
    "no_tensor": (ValueError, NINE[:0], LABELS, {}, "There are no images"),
    "no_labels": (ValueError, NINE, [], {}, "at least two classes, got []"),
    "paths": (ValueError, ["a.png"] * 9, LABELS, {}, "Image 0 ('a.png'): There is no such file"),
    "arrays": (ValueError, NINE.numpy(), LABELS, {}, "Image 0: An array must be uint8"),
    "tensors": (TypeError, list(NINE), LABELS, {}, "got Tensor."),
    "rows": (TypeError, tiny_images(9), LABELS, {}, "got dict."),
    "none": (TypeError, None, LABELS, {}, "or pixels (N, C, H, W), got NoneType."),
    "three_dims": (ValueError, NINE[:, 0], LABELS, {}, "Pixels must be floating-point numbers (N, C, H, W)"),
    "mixed": (TypeError, NINE, [*LABELS[:8], "nil"], {}, "all whole numbers or all words, got int, str."),
    "mixed_bool": (TypeError, NINE, [*LABELS[:8], True], {}, "all whole numbers or all words, got bool, int."),
    "floats": (TypeError, NINE, torch.tensor(LABELS).float(), {}, "all whole numbers or all words, got float."),
    "missing": (TypeError, NINE, [*LABELS[:8], None], {}, "all whole numbers or all words, got NoneType, int."),
    "tuples": (TypeError, NINE, [(c,) for c in LABELS], {}, "all whole numbers or all words, got tuple."),
    "steps": (ValueError, NINE, LABELS, {"steps": -1}, "steps=-1 must be a whole number of at least 0."),
    "half_a_step": (TypeError, NINE, LABELS, {"steps": 1.5}, "steps=1.5 must be a whole number of at least 0."),
    "no_batch": (ValueError, NINE, LABELS, {"batch_size": 0}, "batch_size=0 must be a whole number of at least 1."),
    "bytes": (ValueError, NINE.to(torch.uint8), LABELS, {}, "Pixels must be floating-point numbers"),
    "label_rows": (ValueError, NINE, torch.zeros(9, 2), {}, "support_labels must be a list of labels"),
    "lr": (ValueError, NINE, LABELS, {"lr": -1.0}, "lr=-1.0 must be a finite number of at least 0."),
    "nan": (ValueError, with_nan(6), LABELS, {}, "The features of support image 6 are not finite"),
    "nan_batches": (ValueError, with_nan(6), LABELS, {"batch_size": 4}, "support image 6 are not finite"),
    "no_processor": (
        ValueError,
        [picture("RGB", i) for i in range(9)],
        LABELS,
        {},
        "No image processor",
    ),
    "float_picture": (
        ValueError,
        [picture("F", i) for i in range(9)],
        LABELS,
        {"processor": tiny_processor()},
        "An image holds floating-point numbers",
    ),
    "diverging": (
        ValueError,
        NINE,
        LABELS,
        {"lr": 1e20, "steps": 5},
        "The loss or the features are not finite after 5 steps; lower lr=1e+20",
    ),
}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(case, residual):
    """And leaves the adapter, far from its start, and the model's modes as they were."""
    error, images, labels, settings, expected = BAD[case]
    model = adapted(tiny_vit(), CoPAConfig(residual_adapters=residual)).train()
    before = snapshot(model)
    assert expected in message(lambda: adapt(model, images, labels, **settings), error)
    assert_as_before(model, before)


def test_an_unknown_backbone():
    text = message(lambda: adapt(tiny_bert(), NINE, LABELS))
    assert text.startswith("The pooled feature of BertModel is not known")


def test_heads_that_turn_infinite_on_a_bare_backbone():
    model = tiny_vit()
    before = snapshot(model)
    with pytest.raises(ValueError, match="The.*not finite.*9"):
        adapt(model, NINE, LABELS, lr=1e20, steps=9)
    assert_as_before(model, before)
