from __future__ import annotations

from functools import partial

import numpy as np
import torch
from PIL import Image

from peft_ncgeo.data.images import ImageCollator, LabelledImages, crop_flip, input_size

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


def test_images_of_any_mode_become_rgb():
    for mode in ("L", "RGBA", "P", "1", "CMYK", "I;16"):
        images = LabelledImages([{"i": Image.new(mode, (20, 20)), "y": 1}], "i", "y")
        batch = ImageCollator(tiny_processor().image_processor)([images[0], images[0]])
        assert batch["pixel_values"].shape == (2, 3, 16, 16)
        assert batch["labels"].tolist() == [1, 1]
        assert torch.isfinite(batch["pixel_values"]).all()


def test_input_size():
    assert input_size(tiny_processor().image_processor) == (16, 16)
