from __future__ import annotations

from functools import partial

import datasets
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from transformers import CLIPImageProcessor
from transformers.image_utils import load_image

from peft_ncgeo import ZeroShotClassifier, adapt
from peft_ncgeo.data.images import ImageCollator, LabelledImages, crop_flip, to_rgb
from peft_ncgeo.data.processors import input_size

from ..conftest import NAMES, tiny_clip, tiny_images, tiny_processor, tiny_vit


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


def upright_and_sideways(folder) -> tuple[str, str]:
    """Files of one image, as it is and as phones store it: turned, with a note that says so."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = tiny_images(1)["image"][0].resize((24, 16))
    for name, stored, data in (("upright", image, None), ("sideways", image.rotate(90, expand=True), exif)):
        stored.save(folder / f"{name}.png", **({"exif": data} if data else {}))
    return str(folder / "upright.png"), str(folder / "sideways.png")


def test_an_image_is_turned_as_its_exif_data_say(tmp_path):
    upright, sideways = upright_and_sideways(tmp_path)
    found = to_rgb(Image.open(sideways))
    assert Image.open(sideways).size == (16, 24)
    assert found.tobytes() == Image.open(upright).tobytes()
    assert to_rgb(found).tobytes() == found.tobytes()  # once
    assert found.tobytes() == load_image(Image.open(sideways)).tobytes()  # as a pipeline of Transformers sees it
    decoded = datasets.Image().decode_example({"path": sideways, "bytes": None})
    assert to_rgb(decoded).tobytes() == found.tobytes()


def test_a_file_and_its_decoded_image_are_classified_alike(tmp_path):
    _, sideways = upright_and_sideways(tmp_path)
    decoded = datasets.Image().decode_example({"path": sideways, "bytes": None})
    zero_shot = ZeroShotClassifier(tiny_clip(), tiny_processor())
    few_shot = adapt(tiny_vit(), tiny_images(6)["image"][:], [0, 1, 2] * 2, steps=2, processor=tiny_processor())
    for probabilities in (lambda image: zero_shot.predict_proba(image, NAMES), few_shot.predict_proba):
        torch.testing.assert_close(probabilities(Image.open(sideways)), probabilities(decoded), rtol=0, atol=0)


def test_damaged_exif_data_turn_nothing():
    image = tiny_images(1)["image"][0].convert("RGB")
    image.info["exif"] = b"Exif\0\0garbage"
    assert to_rgb(image).tobytes() == to_rgb(image).tobytes() == image.tobytes()


def test_images_without_a_range_are_refused():
    with pytest.raises(ValueError, match="floating-point numbers from 0.5 to 0.5"):
        to_rgb(Image.new("F", (4, 4), 0.5))


def test_a_broken_image_is_named():
    images = tiny_images(3).cast_column("image", datasets.Image(decode=False))
    rows = [{**row, "image": {"bytes": b"no image", "path": None}} if i == 1 else row for i, row in enumerate(images)]
    broken = datasets.Dataset.from_list(rows, features=images.features)
    labelled = LabelledImages(broken.cast_column("image", datasets.Image()), "image", "label")
    assert labelled[0]["label"] == 0
    with pytest.raises(ValueError, match="Sample 1.*no image.*'image'.*no.*Unidentified"):
        labelled[1]


def test_array_formats_are_undone_and_transforms_kept():
    assert LabelledImages(tiny_images(3).with_format("torch"), "image", "label")[0]["image"].size == (20, 20)

    def darken(rows):
        return {**rows, "image": [Image.new("RGB", (8, 8)) for _ in rows["image"]]}

    dark = tiny_images(3).with_transform(darken)
    assert LabelledImages(dark, "image", "label")[0]["image"].size == (8, 8)


def test_input_size():
    assert input_size(tiny_processor().image_processor) == (16, 16)
    uncut = CLIPImageProcessor(size={"height": 16, "width": 12}, do_center_crop=False)  # its crop_size stays 224
    inputs = uncut(tiny_images(1)["image"][:], return_tensors="pt")["pixel_values"]
    assert input_size(uncut) == (inputs.shape[3], inputs.shape[2]) == (12, 16)


def test_collator():
    labelled = LabelledImages(tiny_images(4), "image", "label")
    batch = ImageCollator(tiny_processor().image_processor)([labelled[i] for i in range(4)])
    assert batch["pixel_values"].shape == (4, 3, 16, 16)
    assert batch["labels"].tolist() == [0, 1, 2, 3]
