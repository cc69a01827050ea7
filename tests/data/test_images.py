from __future__ import annotations

from functools import partial

import datasets
import numpy as np
import pytest
from PIL import Image

from peft_ncgeo.data.images import ImageCollator, LabelledImages, crop_flip, input_size, to_rgb

from ..conftest import tiny_images, tiny_processor


def view(seed: int, image: Image.Image | None = None) -> np.ndarray:
    image = image or tiny_images(1)["image"][0]
    return np.asarray(crop_flip(image, np.random.default_rng(seed), (16, 12)))


def test_crop_flip_gives_the_size_asked_for_and_other_views():
    assert view(0).shape == (12, 16, 3)
    assert np.array_equal(view(0), view(0))
    assert not np.array_equal(view(0), view(1))


def test_crop_flip_mirrors_half_of_the_time_and_stays_inside():
    left_dark = Image.fromarray(np.repeat(np.linspace(0, 200, 64, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2))
    views = np.stack([view(seed, left_dark) for seed in range(200)]).astype(float)
    mirrored = (views[:, :, -1].mean((1, 2)) < views[:, :, 0].mean((1, 2))).mean()
    assert 0.38 < mirrored < 0.62
    assert views.max() <= 200


def test_crop_flip_of_extreme_shapes():
    for size in ((1, 1), (3, 500), (500, 3)):
        assert view(0, Image.new("RGB", size)).shape == (12, 16, 3)


def test_views_depend_on_seed_epoch_and_index_alone():
    augment = partial(crop_flip, size=(16, 16))

    def image(index, epoch=0, seed=0):
        images = LabelledImages(tiny_images(10), "image", "label", augment, seed)
        images.set_epoch(epoch)
        return images[index]["image"].tobytes()

    assert image(3) == image(3)
    assert len({image(3), image(4), image(3, epoch=1), image(3, seed=1)}) == 4


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "CMYK", "I;16", "I"])
def test_images_of_any_mode_become_rgb(mode):
    ramp = np.linspace(0, 255, 400, dtype=np.uint8).reshape(20, 20)
    if mode.startswith("I"):
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
        image = image if mode == "I;16" else image.convert("I")
    else:
        image = Image.fromarray(ramp).convert(mode)
    assert image.mode == mode
    assert np.abs(np.asarray(to_rgb(image)).astype(int) - ramp[..., None]).max() <= 1


def test_images_without_a_range_are_refused():
    with pytest.raises(ValueError, match="floating-point numbers has no known range"):
        to_rgb(Image.new("F", (4, 4)))


def test_a_broken_image_is_named():
    images = tiny_images(3).cast_column("image", datasets.Image(decode=False))
    rows = [{**row, "image": {"bytes": b"no image", "path": None}} if i == 1 else row for i, row in enumerate(images)]
    broken = datasets.Dataset.from_list(rows, features=images.features)
    labelled = LabelledImages(broken.cast_column("image", datasets.Image()), "image", "label")
    assert labelled[0]["label"] == 0
    with pytest.raises(ValueError, match="Sample 1 gives no image in column 'image' or no label: Unidentified"):
        labelled[1]


def test_array_formats_are_undone_and_transforms_kept():
    assert LabelledImages(tiny_images(3).with_format("torch"), "image", "label")[0]["image"].size == (20, 20)

    def darken(rows):
        return {**rows, "image": [Image.new("RGB", (8, 8)) for _ in rows["image"]]}

    dark = tiny_images(3).with_transform(darken)
    assert LabelledImages(dark, "image", "label")[0]["image"].size == (8, 8)


def test_input_size():
    assert input_size(tiny_processor().image_processor) == (16, 16)


def test_collator():
    labelled = LabelledImages(tiny_images(4), "image", "label")
    batch = ImageCollator(tiny_processor().image_processor)([labelled[i] for i in range(4)])
    assert batch["pixel_values"].shape == (4, 3, 16, 16)
    assert batch["labels"].tolist() == [0, 1, 2, 3]
