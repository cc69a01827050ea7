"""Checks of labelled image sets: one line says what is wrong, and a set mended as it says is accepted."""

from __future__ import annotations

import re
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, Image, Value

from peft_ncgeo.data.checks import check_dataset

from ..conftest import NAMES, tiny_images


def labelled(labels: list[Any], feature: Any = None) -> Dataset:
    return tiny_images(10).remove_columns("label").add_column("label", labels, feature=feature)


NUMBERS = [i % 5 for i in range(10)]
SOME_UNLABELLED = [*NUMBERS, None, -1]


def unlabelled_too() -> Dataset:
    images = tiny_images(12)
    return images.remove_columns("label").add_column("label", SOME_UNLABELLED, feature=images.features["label"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda: labelled(NUMBERS, Value("int64")), "Column 'label' is not a ClassLabel but int64; .*names"),
        (lambda: labelled([NAMES[i] for i in NUMBERS], Value("string")), "is not a ClassLabel but string"),
        (lambda: tiny_images(10).cast_column("image", Image(decode=False)), "'image' holds files .* not decoded"),
        (unlabelled_too, r"Sample 10 has label None, .* \(2 such samples\)"),
    ],
)
def test_the_mend_makes_a_set_that_is_taken(given, words):
    dataset = given()
    with pytest.raises(ValueError, match=words) as error:
        check_dataset(dataset)
    assert "\n" not in str(error.value)
    mend = re.search(r"dataset\.\w+\(.*\)(?=\.$)", str(error.value))[0].replace("names=[...]", f"names={NAMES}")
    mended = eval(mend, {"dataset": dataset, "datasets": datasets})
    assert sorted(check_dataset(mended)) == sorted(NAMES)
    assert [mended.features["label"].names[label] for label in mended["label"]] == [NAMES[i] for i in NUMBERS]


def test_integer_labels_are_never_given_numbers_for_names():
    for kind in ("int64", "uint8", "bool", "float32"):
        with pytest.raises(ValueError, match="not a ClassLabel") as error:
            check_dataset(labelled([i % 2 for i in range(10)], Value("int64")).cast_column("label", Value(kind)))
        assert "class_encode_column" not in str(error.value)


@pytest.mark.parametrize("inner", [Value("int64"), ClassLabel(names=NAMES), Value("string")])
def test_several_labels_an_image_are_refused_by_name(inner):
    labels = [["1", "2"] if inner == Value("string") else [1, 2] for _ in range(10)]
    several = Dataset.from_dict(
        {"image": tiny_images(10)["image"][:], "label": labels},
        features=datasets.Features({"image": Image(), "label": datasets.Sequence(inner)}),
    )
    with pytest.raises(ValueError, match="multi-label") as error:
        check_dataset(several)
    assert "class_encode_column" not in str(error.value)


def test_labels_that_begin_with_one_need_a_name_more():
    from_one = labelled([1 + i % 5 for i in range(10)], ClassLabel(names=NAMES))
    with pytest.raises(ValueError, match="Sample 4.*5.*outside.*5 class names .*names"):
        check_dataset(from_one)


def test_a_transform_may_decode_the_files_itself():
    closed = tiny_images(10).cast_column("image", Image(decode=False))
    opened = closed.with_transform(lambda rows: {**rows, "image": [None for _ in rows["image"]]})
    assert check_dataset(opened) == NAMES


def test_several_splits_and_streams_are_no_set():
    with pytest.raises(TypeError, match="got DatasetDict; pass one of its splits"):
        check_dataset(datasets.DatasetDict(train=tiny_images(10)))
    with pytest.raises(TypeError, match="got IterableDataset; load it without streaming"):
        check_dataset(tiny_images(10).to_iterable_dataset())
