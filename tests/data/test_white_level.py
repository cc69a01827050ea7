"""Grey images of whole numbers, as numpy and scikit-learn hand them out: as bright as their bytes, or refused."""

from __future__ import annotations

import re
import warnings
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from PIL import Image

from peft_ncgeo import ZeroShotClassifier, adapt
from peft_ncgeo.data.checks import check_dataset
from peft_ncgeo.data.images import LabelledImages, to_rgb
from peft_ncgeo.data.reading import rgb_images
from peft_ncgeo.evaluation import evaluate_base_new
from peft_ncgeo.training import align_classifier

from ..conftest import NAMES, tiny_clip, tiny_images, tiny_processor, tiny_vit

GREY = np.random.default_rng(0).integers(0, 256, (10, 20, 20))
GREY[3] //= 4  # too dark to tell by itself


def grey_column(arrays: Any) -> datasets.Dataset:
    features = tiny_images(1).features
    columns = {"image": list(arrays), "label": [i % 5 for i in range(len(arrays))]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of `datasets`, that it stores int64 as int32
        return datasets.Dataset.from_dict(columns, features=features)


def seen(arrays: Any) -> np.ndarray:
    labelled = LabelledImages(grey_column(arrays), "image", "label")
    return np.stack([np.asarray(labelled[i]["image"])[..., 0] for i in range(len(labelled))])


@pytest.mark.parametrize("kind", [np.int16, np.uint16, np.int32, np.int64])
def test_columns_of_whole_numbers_show_what_they_show_as_bytes(kind):
    assert np.array_equal(seen(GREY.astype(kind)), GREY)
    if kind != np.int16:
        assert np.array_equal(seen(GREY.astype(kind) * 257), GREY)
    assert not seen(np.zeros((2, 4, 4), kind)).any()


@pytest.mark.parametrize("kind", [np.int16, np.uint16, np.int32, np.int64])
def test_images_of_whole_numbers_are_classified_as_their_bytes_are(kind):
    bright = np.delete(GREY, 3, 0)
    images, same = (grey_column(bright.astype(k)) for k in (kind, np.uint8))
    clip, vit, processor = tiny_clip(), tiny_vit(), tiny_processor()
    zero_shot = ZeroShotClassifier(clip, processor)
    adapted = [adapt(vit, d["image"][:6], [0, 1, 2] * 2, steps=2, processor=processor) for d in (images, same)]
    aligned = [align_classifier(clip, d, 0.5, processor) for d in (images, same)]
    assert torch.equal(*(zero_shot.predict_proba(d["image"][:], NAMES) for d in (images, same)))
    assert torch.equal(*(c.predict_proba(d["image"][:]) for c, d in zip(adapted, (images, same), strict=True)))
    assert torch.equal(aligned[0].weight, aligned[1].weight)
    assert aligned[0].predict(images["image"][:]) == aligned[1].predict(same["image"][:])
    halves = [evaluate_base_new(zero_shot, {"base": d, "new": d}) for d in (images, same)]
    assert halves[0] == halves[1]


UNKNOWN = {
    "12 bits": (GREY.astype(np.uint16) * 16, 0, 4080),
    "4 bits": (GREY // 16, 0, 15),
    "15 bits": (GREY * 128, 0, 32640),
    "more than 16 bits": (GREY.astype(np.int32) * 300, 0, 76500),
    "negative": (GREY - 100, -100, 155),
    "floating-point": (GREY.astype(np.float32) / 255, 0, 1),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_numbers_that_do_not_tell_white_are_refused_with_a_mend(name):
    arrays, black, white = UNKNOWN[name]
    arrays[0, 0, :2] = black, white
    column = grey_column(arrays)
    for refuse in (check_dataset, lambda d: LabelledImages(d, "image", "label")):
        with pytest.raises(ValueError, match=f"Column 'image'.*{black}.*{white}") as error:
            refuse(column)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=f"An image.*{black}.*{white}"):
        to_rgb(column[0]["image"])
    # what it says to do, done
    told = re.search(r"dataset\.map\(.*\)(?=\.$)", str(error.value))[0]
    mended = eval(told, {"dataset": column, "PIL": PIL, "numpy": np, "BLACK": black, "WHITE": white})
    expected = np.stack([np.asarray(image, dtype=float) for image in column["image"][:]])
    expected = (expected - black) / (white - black) * 255
    labelled = LabelledImages(mended, "image", "label")
    found = np.stack([np.asarray(labelled[i]["image"])[..., 0] for i in range(10)])
    assert np.abs(found - expected).max() <= 1


def test_a_dark_image_alone_tells_nothing_and_in_its_column_does():
    dark = GREY[3] * 257
    assert np.array_equal(seen([GREY[0] * 257, dark])[1], GREY[3])
    for numbers in (GREY[3], dark):
        with pytest.raises(ValueError, match="Image 7.*An image.*whole"):
            rgb_images([Image.fromarray(numbers.astype(np.int32))], first=7)


def test_a_number_image_among_others_is_judged_by_itself(tmp_path):
    column = grey_column([GREY[0].astype(np.uint8), GREY[1], GREY[3]])
    labelled = LabelledImages(column, "image", "label")
    assert np.array_equal(np.asarray(labelled[1]["image"])[..., 0], GREY[1])
    with pytest.raises(ValueError, match="Sample 2 .* whole numbers from"):
        labelled[2]


def test_a_broken_image_does_not_keep_others_of_its_column_from_telling_white():
    column = grey_column(GREY).cast_column("image", datasets.Image(decode=False))
    rows = [{"image": {"bytes": b"no image", "path": None}, "label": 0}, *column]
    column = datasets.Dataset.from_list(rows, features=column.features).cast_column("image", datasets.Image())
    labelled = LabelledImages(column, "image", "label")
    assert np.array_equal(np.asarray(labelled[4]["image"])[..., 0], GREY[3])
    with pytest.raises(ValueError, match="Sample 0 gives no image"):
        labelled[0]
