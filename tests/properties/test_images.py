"""Images of any mode, size and kind, whole or broken: probabilities of their pixels, or a refusal that names one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from hypothesis import event, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from peft import get_peft_model
from PIL import Image as PILImage

from peft_ncgeo import CoPAConfig, ZeroShotClassifier, adapt
from peft_ncgeo.data.images import LabelledImages, crop_flip, to_rgb
from peft_ncgeo.data.reading import read_image

from ..conftest import NAMES, pixels, tiny_clip, tiny_images, tiny_processor, tiny_vit
from ..profiles import cases
from ..training.runs import lora_clip, trainer
from .outcomes import said_well

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
BYTES = {"L": 1, "P": 1, "LA": 2, "La": 2, "PA": 2, "RGB": 3, "YCbCr": 3, "HSV": 3, "LAB": 3}  # a pixel
BYTES |= {"RGBA": 4, "RGBa": 4, "RGBX": 4, "CMYK": 4, "F": 4, "I": 4, "I;16": 2, "I;16L": 2, "I;16B": 2}
SIZES = [(0, 0), (0, 5), (5, 0), (1, 1), (1, 9), (9, 1), (3, 7), (7, 3), (2, 2), (600, 3), (3, 600)]


@st.composite
def whole_images(draw, modes=("1", *BYTES), sizes=SIZES):
    mode, (width, height) = draw(st.sampled_from(modes)), draw(st.sampled_from(sizes))
    seed = draw(st.integers(0, 99))
    if mode == "1" or not width * height:
        return PILImage.new(mode, (width, height), None if mode == "LAB" else seed % 2)
    content = np.random.default_rng(seed).integers(0, 256, width * height * BYTES[mode], dtype=np.uint8)
    if mode == "I" and seed % 3:  # of 16 bits; else of 32
        content.view(np.int32)[:] &= 0xFFFF
    return PILImage.frombytes(mode, (width, height), content.tobytes())


def encoded(image: PILImage.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.convert("RGB").save(stream, kind)
    return stream.getvalue()


GOOD = tiny_images(3)["image"][:]
FILES = {kind: encoded(GOOD[0], kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")}


@st.composite
def file_contents(draw):
    """Files of images: whole, cut, or with some bytes changed; or no such files at all."""
    content = bytearray(FILES[draw(st.sampled_from(sorted(FILES)))])
    for at, byte in draw(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=2)):
        content[int(at * (len(content) - 1))] = byte
    cut = draw(st.just(1.0) | st.floats(0, 1))
    return draw(st.just(bytes(content[: int(cut * len(content))])) | st.binary(max_size=9))


def opened(content: bytes) -> Any:
    """As Pillow opens a file, which is read later; None where it sees at once that it is none."""
    try:
        return PILImage.open(io.BytesIO(content))
    except Exception:
        return None


no_images = (
    st.none() | st.integers() | st.text(max_size=3) | st.binary(max_size=3) | st.just(Path("missing.png"))
    | arrays.arrays(st.sampled_from(["u1", "f4", "i8", "?", "c8"]), arrays.array_shapes(max_dims=3, max_side=4))
    | st.sampled_from([torch.zeros(3, 4, 4), torch.zeros(0), {"image": GOOD[0]}, [GOOD[0]], float("nan")])
).map(lambda value: value)  # fmt: skip  # as one kind among others, not as six
images = whole_images() | file_contents().map(opened)


@cases(5)
@given(image=whole_images() | images | no_images)
@example(image=PILImage.new("RGB", (0, 5)))
@example(image=PILImage.fromarray(np.full((2, 2), 70_000, dtype=np.int32)))
@example(image=PILImage.fromarray(np.full((2, 2), 200, dtype=np.int32)))
@example(image=PILImage.fromarray(np.full((2, 2), 4_000, dtype=np.int32)))
def test_any_image_as_rgb(image):
    found = said_well(lambda: to_rgb(image))
    event(f"taken: {found is not None}")
    if found is None:
        return
    assert (found.mode, found.size) == ("RGB", image.size)
    assert all(found.size)
    values, rgb = np.asarray(image), np.asarray(found)
    if image.mode == "RGB":
        assert np.array_equal(rgb, values)
    if image.mode in ("1", "L"):
        assert np.array_equal(rgb, np.repeat(values[..., None] * (255 if image.mode == "1" else 1), 3, axis=2))
    if image.mode.startswith("I"):
        white = 255 if values.max() <= 255 else 65535
        assert values.min() >= 0
        assert white / 2 < values.max() <= white or not values.any()
        assert np.abs(values * (255 / white) - rgb[..., 0]).max() < 1
    if image.mode in ("RGBX", "RGBA"):
        assert np.array_equal(rgb, values[..., :3])


@pytest.fixture(scope="module")
def zero_shot() -> ZeroShotClassifier:
    return ZeroShotClassifier(tiny_clip(), tiny_processor())


@pytest.fixture(scope="module")
def few_shot():
    model = get_peft_model(tiny_vit(), CoPAConfig())
    return adapt(model, GOOD * 2, [0, 1, 2] * 2, steps=2, processor=tiny_processor())


batches = st.lists(whole_images(["RGB", "L", "RGBA", "P", "I;16"], SIZES[3:]), max_size=4)
odd_batches = st.lists(images | st.sampled_from(GOOD), max_size=3) | st.lists(no_images | images, max_size=3)


@cases(1.8)
@given(given=batches | odd_batches | images | no_images, size=st.sampled_from([64, 1, 2, 0, -3, 1.5]))
@example(given=np.arange(6, dtype=np.uint8).reshape(2, 3), size=64)
@pytest.mark.parametrize("kind", ["zero_shot", "few_shot"])
def test_each_image_has_the_probabilities_of_its_own_pixels(request, kind, given, size):
    """The other images and the batch size do not matter; inputs that are not images are refused."""
    classifier = request.getfixturevalue(kind)
    ask = (lambda i, n: classifier.predict_proba(i, NAMES, n)) if kind == "zero_shot" else classifier.predict_proba
    found = said_well(lambda: ask(given, size))
    event(f"taken: {found is not None}")
    if found is None:
        return
    alone = [given] if isinstance(given, PILImage.Image | np.ndarray) else list(given)
    assert len(found) == len(alone)
    assert found.isfinite().all()
    for row, image in zip(found, alone, strict=True):
        copy = PILImage.fromarray(np.asarray(read_image(image)))
        torch.testing.assert_close(row, ask([copy], 64)[0], atol=1e-5, rtol=1e-4)


tensors = arrays.arrays(
    st.sampled_from(["f4", "f8", "f2", "u1", "i8", "?"]),
    st.just((2, 3, 16, 16)) | st.sampled_from([(0, 3, 16, 16), (3, 16, 16), (2, 1, 16, 16), (2, 3, 8, 8), (2,), ()]),
    elements=st.just(1),
)  # fmt: skip


@cases(1.2)
@given(values=tensors, odd=st.sampled_from([None, None, float("nan"), float("inf")]))
def test_pixels_of_any_kind(few_shot, values, odd):
    given = torch.from_numpy(values.copy())
    if odd is not None and given.is_floating_point() and given.numel():
        given.view(-1)[-1] = odd
    found = said_well(lambda: few_shot.predict_proba(given))
    if found is not None:
        assert odd is None
        torch.testing.assert_close(found, few_shot.predict_proba(torch.ones(len(given), 3, 16, 16)))


cells = st.none() | file_contents().map(lambda content: {"bytes": content, "path": None})
cells |= st.just({"bytes": None, "path": "missing.png"})
cells |= whole_images(["RGB", "L", "1", "RGBA"], SIZES[3:]).map(lambda i: {"bytes": encoded(i, "PNG"), "path": None})


def column(content: list[Any]) -> Dataset:
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES[:2])})
    return Dataset.from_dict({"image": content, "label": [i % 2 for i in range(len(content))]}, features=features)


@cases(1.6)
@given(cell=cells)
def test_a_cell_of_a_data_set(cell):
    found = said_well(lambda: LabelledImages(column([cell]), "image", "label")[0]["image"], ValueError)
    event(f"taken: {found is not None}")
    if found is not None:
        whole = PILImage.open(io.BytesIO(cell["bytes"])).convert("RGB")
        assert found.tobytes() == whole.tobytes()


@pytest.fixture(scope="module")
def tuned():
    return lora_clip()


@pytest.mark.slow
@cases(0.1)
@given(cell=cells)
def test_training_stops_at_a_broken_image_and_names_it(tmp_path_factory, tuned, cell):
    good = {"bytes": FILES["PNG"], "path": None}
    run = trainer(tmp_path_factory.getbasetemp(), tuned, train=column([good] * 5 + [cell] + [good] * 2), max_steps=1)
    readable = said_well(lambda: LabelledImages(run.train_dataset, "image", "label")[5]) is not None
    assert (said_well(run.train, ValueError) is not None) == readable


@cases(1.2)
@given(size=st.tuples(st.integers(1, 40), st.integers(1, 40)) | st.sampled_from(SIZES[3:]), seed=st.integers(0, 10**9))
def test_a_view_has_the_size_and_the_colours_asked_for(size, seed):
    view = crop_flip(PILImage.new("RGB", size, (9, 100, 200)), np.random.default_rng(seed), (16, 12))
    assert view.size == (16, 12)
    assert set(view.get_flattened_data() if hasattr(view, "get_flattened_data") else view.getdata()) == {(9, 100, 200)}


words = st.just(["a", "b", "a"]) | st.permutations([2, -1, 10**20]) | st.permutations([True, True, False])
labels = words | st.lists(st.none() | st.floats() | st.booleans() | st.binary(max_size=1), max_size=4)
labels |= st.lists(st.integers(0, 1) | st.sampled_from(["a", ""]), min_size=3, max_size=3)
KINDS = {"list": list, "array": np.array, "tensor": torch.tensor, "dict": dict.fromkeys, "set": set, "text": str}


@cases(2)
@given(
    labels=labels,
    kind=st.sampled_from(["list", "list", "list", *KINDS]),
    settings=st.just({}) | st.fixed_dictionaries({}, optional={
        "steps": st.sampled_from([0, 1, -1, 1.5, True, "2", None]),
        "lr": st.sampled_from([0, 0.1, -1, "a", float("nan"), 1e30, None]),
        "weight_decay": st.sampled_from([0, -1, None]),
        "adapter_lr": st.sampled_from([0.1, -1, "a"]),
        "optimizer": st.sampled_from([torch.optim.SGD, torch.optim.LBFGS, None, "adam"]),
        "batch_size": st.sampled_from([1, 0, None, 2.5]),
    }),
)  # fmt: skip
def test_labels_and_settings_of_an_adaptation(backbone, labels, kind, settings):
    try:
        given = KINDS[kind](labels)
    except (TypeError, ValueError, RuntimeError):
        return  # no such array
    images = pixels(3)
    found = said_well(lambda: adapt(backbone, images, given, **{"steps": 1, **settings}))
    event(f"taken: {found is not None}")
    if found is not None:
        labels = [label.item() if hasattr(label, "item") else label for label in given]  # an array may turn 1 into "1"
        assert found.classes == sorted(set(labels))
        assert set(found.predict(images)) <= set(labels)
        means = found.prototypes[found.classes.index(labels[0])]
        own = [i for i, label in enumerate(labels) if label == labels[0]]
        torch.testing.assert_close(means, found.features(images)[own].mean(0))


@pytest.fixture(scope="module")
def backbone():
    return tiny_vit()
