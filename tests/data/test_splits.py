from __future__ import annotations

import pytest

from peft_ncgeo.data import base_new_split, few_shot

from ..conftest import NAMES, tiny_images


def test_base_new_split_halves_the_classes():
    split = base_new_split(tiny_images(25))
    assert list(split) == ["base", "new"]
    assert split["base"].features["label"].names == NAMES[:3]  # ceil(5 / 2)
    assert split["new"].features["label"].names == NAMES[3:]
    assert sorted(set(split["new"]["label"])) == [0, 1]
    assert len(split["base"]) + len(split["new"]) == 25
    original = tiny_images(25)
    black_fish = [im.tobytes() for im, y in zip(original["image"], original["label"], strict=True) if y == 3]
    assert [im.tobytes() for im, y in zip(split["new"]["image"], split["new"]["label"], strict=True) if y == 0] == (
        black_fish
    )


def test_base_new_split_needs_two_classes_in_each_half():
    with pytest.raises(ValueError, match="at least 4 classes"):
        base_new_split(tiny_images(6, ["cat", "dog", "bird"]))


def test_few_shot_draws_the_same_number_of_every_class():
    dataset = tiny_images(50)
    shots = few_shot(dataset, 3, seed=1)
    assert sorted(shots["label"]) == sorted(list(range(5)) * 3)
    assert shots["label"] == few_shot(dataset, 3, seed=1)["label"]
    pictures = [[im.tobytes() for im in few_shot(dataset, 3, seed=s)["image"]] for s in (1, 1, 2)]
    assert pictures[0] == pictures[1] != pictures[2]
    assert len(set(pictures[0])) == 15


@pytest.mark.parametrize(("shots", "message"), [(0, "shots=0"), (6, "Class 'red cat' has 5 samples, fewer than")])
def test_few_shot_refuses(shots, message):
    with pytest.raises(ValueError, match=message):
        few_shot(tiny_images(25), shots)
