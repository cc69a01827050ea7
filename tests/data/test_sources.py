"""Data sets described by YAML files."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset, Image, Value

from peft_ncgeo.data import DatasetSource

from ..conftest import tiny_images

FILES = sorted((Path(__file__).parents[2] / "examples" / "datasets").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_file_is_read(path):
    source = DatasetSource.read(path)
    assert "{}" in source.template
    assert source.num_classes > 1
    assert source.test_split
    assert (source.train_split is None) == (source.shots is None and source.imbalance_factor is None)


def test_there_are_the_papers_sets():
    names = {path.stem for path in FILES}
    assert names >= {
        *("imagenet", "caltech101", "oxford_pets", "stanford_cars", "flowers102", "food101", "fgvc_aircraft"),
        *("sun397", "dtd", "eurosat", "ucf101", "cifar10", "cifar100", "imagenet_lt"),
    }


def source(**fields) -> DatasetSource:
    return DatasetSource(**{"path": "somewhere", "num_classes": 3, **fields})


def test_columns_and_names():
    images = tiny_images(9, ["red_cat", "BACKGROUND", "dog", "fish"]).rename_columns({"image": "img", "label": "fine"})
    images = images.add_column("other", [0] * 9)
    described = source(image_column="img", label_column="fine", class_names={"fish": "gold fish", "BACKGROUND": None})
    prepared = described.prepare(images)
    assert prepared.column_names == ["image", "label"]
    assert prepared.features["label"].names == ["red_cat", "dog", "gold fish"]
    assert prepared["label"][:] == [0, 1, 2, 0, 1, 2, 0]
    assert prepared[2]["image"].tobytes() == images[3]["img"].tobytes()


def test_labels_of_another_type_become_classes():
    images = tiny_images(6, ["a", "b", "c"])
    texts = images.cast_column("label", Value("int64"))
    prepared = source(class_names={"1": "cat", "0": "ant", "2": "dog"}).prepare(texts)
    assert prepared.features["label"].names == ["ant", "cat", "dog"]
    assert prepared["label"][:] == images["label"][:]


def test_integers_need_names():
    numbers = tiny_images(6, ["a", "b", "c"]).cast_column("label", Value("int64"))
    with pytest.raises(ValueError, match="gives class 1 no name; .* class_names"):
        source(class_names={"0": "ant", "2": "dog"}).prepare(numbers)


def test_digits_may_be_names():
    prepared = source().prepare(tiny_images(6, ["0", "1", "2"]))
    assert prepared.features["label"].names == ["0", "1", "2"]


def test_files_that_are_not_decoded_become_images():
    closed = tiny_images(6, ["a", "b", "c"]).cast_column("image", Image(decode=False))
    assert source().prepare(closed)[0]["image"].size == (20, 20)


def test_words_for_whole_lists():
    names = ["tench, Tinca tinca", "maillot", "maillot, tank suit", "Cardigan, Cardigan Welsh corgi", "cardigan"]
    assert source(class_names="first_synonym").prompt_names(names) == [
        "tench",
        "maillot",
        "tank suit",
        "Cardigan Welsh corgi",
        "cardigan",
    ]
    camel = source(class_names="split_camel_case").prompt_names(["ApplyEyeMakeup", "YoYo", "HandstandPushups"])
    assert camel == ["Apply Eye Makeup", "Yo Yo", "Handstand Pushups"]


def test_a_local_copy(tmp_path):
    """With a class whose name ends like that of a split."""
    images = tiny_images(6, ["ant", "bee", "cow_test"])
    for part in ("train", "test"):
        for i, row in enumerate(images):
            folder = tmp_path / part / images.features["label"].names[row["label"]]
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{i}.png")
    loaded = source(class_names={"cow_test": "brown cow"}).load("test", tmp_path)
    assert isinstance(loaded, Dataset)
    assert loaded.features["label"].names == ["ant", "bee", "brown cow"]
    assert len(loaded) == 6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_classes": 4}, "has 3 classes, .* 4"),
        ({"class_names": {"zebra": "horse"}}, "no class 'zebra' to rename"),
        ({"image_column": "jpg"}, "no column 'jpg'"),
    ],
)
def test_data_that_are_not_as_described(fields, message):
    with pytest.raises(ValueError, match=message):
        source(**fields).prepare(tiny_images(6, ["a", "b", "c"]))


def test_a_part_that_is_not_there():
    with pytest.raises(ValueError, match="no split to train on"):
        source(train_split=None).load("train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path: a\n", "lacks num_classes"),
        ("path: a\nnum_classes: 2\nclasses: 3", "unknown key 'classes'"),
        ("path: a\nnum_classes: 2\nclass_names: upper", "class_names=.upper. must be"),
        ("- a", "must hold keys"),
        ("path: [", "cannot be read"),
    ],
)
def test_damaged_files(tmp_path, text, message):
    path = tmp_path / "set.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        DatasetSource.read(path)
