"""Classes by name: a selection, other names, and a part for validation."""

from __future__ import annotations

import pytest
from datasets import DatasetDict

from peft_ncgeo.data import rename_classes, select_classes, split_validation

from ..conftest import NAMES, tiny_images


def rows(dataset) -> list[tuple[bytes, str]]:
    names = dataset.features["label"].names
    return [(row["image"].tobytes(), names[row["label"]]) for row in dataset]


@pytest.mark.slow
def test_selected_classes_keep_their_images_and_names():
    dataset = tiny_images(12)
    chosen = select_classes(dataset, ["white panda", "blue dog"])
    assert chosen.features["label"].names == ["white panda", "blue dog"]
    assert rows(chosen) == [row for row in rows(dataset) if row[1] in ("white panda", "blue dog")]
    parts = select_classes(DatasetDict(train=dataset, test=dataset.select(range(5))), ["red cat"])
    assert (len(parts["train"]), len(parts["test"])) == (3, 1)
    for names, expected in ((["lion"], "'lion'"), (["red cat"] * 2, "twice"), ([], "at least one")):
        with pytest.raises(ValueError, match=expected):
            select_classes(dataset, names)


@pytest.mark.slow
def test_renamed_classes_keep_their_images():
    dataset = tiny_images(12)
    renamed = rename_classes(dataset, {"blue dog": "poodle"})
    assert renamed.features["label"].names == [NAMES[0], "poodle", *NAMES[2:]]
    assert rows(renamed) == [(image, "poodle" if name == "blue dog" else name) for image, name in rows(dataset)]
    for names, expected in (({"lion": "cat"}, "'lion'"), ({"blue dog": "red cat"}, "Two classes.*'red cat'")):
        with pytest.raises(ValueError, match=expected):
            rename_classes(dataset, names)


def test_validation_has_a_share_of_every_class_that_can_give_one():
    whole = tiny_images(60, NAMES[:3]).select([*range(48), 48, 51, 49])  # 18, 17 and 16 images
    labels = whole["label"][:]
    assert [labels.count(k) for k in range(3)] == [18, 17, 16]
    rare = whole.select([i for i, label in enumerate(labels) if label != 2 or labels[: i + 1].count(2) == 1])
    rare = rare.select([i for i, y in enumerate(rare["label"][:]) if y != 1 or rare["label"][: i + 1].count(1) <= 2])
    with pytest.warns(UserWarning, match="'green bird'.*one image"):
        parts = split_validation(DatasetDict(train=rare, test=whole), share=0.2)
    counts = [[parts[part]["label"][:].count(k) for k in range(3)] for part in ("train", "validation")]
    assert counts == [[14, 1, 1], [4, 1, 0]]  # of 18, 2 and 1
    assert sorted(rows(parts["train"]) + rows(parts["validation"])) == sorted(rows(rare))
    assert len(parts["test"]) == len(whole)
    shuffled = split_validation(whole.shuffle(seed=1))["validation"]
    assert sorted(rows(split_validation(whole)["validation"])) == sorted(rows(shuffled))
    assert sorted(rows(split_validation(whole, seed=1)["validation"])) != sorted(rows(shuffled))
    with pytest.raises(ValueError, match="No class has two images"):
        split_validation(whole.select([0, 1, 2]))
    with pytest.raises(ValueError, match="'validation' already"):
        split_validation(parts)
    with pytest.raises(ValueError, match="share"):
        split_validation(whole, share=1.0)
