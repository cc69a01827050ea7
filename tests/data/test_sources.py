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


def test_imagenet_and_its_variants_share_clips_names():
    """Labels are synonyms, WordNet numbers or numbers; the expected names are those of CLIP's published list."""
    imagenet, a, v2 = (DatasetSource.read(FILES[0].parent / f"imagenet{part}.yaml") for part in ("", "_a", "_v2"))
    numbers = [f"{i}" for i in range(1000)]
    names = v2.prompt_names(numbers)
    assert (names[0], names[7], names[134], names[517], names[999]) == (
        *("tench", "rooster", "crane bird", "construction crane", "toilet paper"),
    )
    assert len(set(names)) == 1000
    assert v2.prompt_names(sorted(numbers))[:3] == [names[0], names[1], names[10]]
    assert imagenet.prompt_names([f"synonym {999 - i}, other" for i in range(1000)]) == names
    assert a.prompt_names(["n01498041", "n01514668"]) == ["stingray", "rooster"]
    assert a.prompt_names(["rooster", "stingray"]) == ["rooster", "stingray"]  # a copy with the prompts' names


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


def test_lists_of_names_that_do_not_fit(tmp_path):
    described = source(class_names=str(tmp_path / "names.txt"))
    with pytest.raises(ValueError, match="cannot be read"):
        described.prompt_names(["a1", "b2"])
    for text, names, message in (
        ("a1 ant\nb2 bee\n", ["a1", "c3"], "do not list class 'c3'"),
        ("a1 ant\nb2 bee\n", ["wasp", "worm"], "do not list class 'wasp'"),  # sorted: an order of their own
        ("a1 ant\nb2\n", ["a1", "b2"], "must have one line"),
        ("a1 ant\na1 bee\n", ["a1", "b2"], "must have one line"),
    ):
        (tmp_path / "names.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            described.prompt_names(names)


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
