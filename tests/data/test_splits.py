from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from peft_ncgeo.data import base_new_split, few_shot

from ..conftest import NAMES, tiny_images


def rows(dataset: datasets.Dataset) -> list[tuple[bytes, int]]:
    return [(row["image"].tobytes(), row["label"]) for row in dataset]


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


def test_base_new_split_keeps_the_order_of_the_rows():
    shuffled = tiny_images(25).shuffle(seed=3)
    assert rows(base_new_split(shuffled)["base"]) == [row for row in rows(shuffled) if row[1] < 3]


def test_base_new_split_needs_two_classes_in_each_half():
    with pytest.raises(ValueError, match="at least 4 classes"):
        base_new_split(tiny_images(6, ["cat", "dog", "bird"]))


def test_few_shot_draws_the_same_number_of_every_class():
    dataset = tiny_images(50)
    shots = few_shot(dataset, 3, seed=1)
    assert shots["label"] == [c for c in range(5) for _ in range(3)]
    pictures = [[im.tobytes() for im in few_shot(dataset, 3, seed=s)["image"]] for s in (1, 1, 2)]
    assert pictures[0] == pictures[1] != pictures[2]
    assert len(set(pictures[0])) == 15
    assert set(rows(shots)) < set(rows(dataset))


@pytest.mark.parametrize("seed", [0, 1])
def test_few_shot_does_not_depend_on_the_order_of_the_rows(seed):
    dataset = tiny_images(50)
    expected = rows(few_shot(dataset, 4, seed))
    assert rows(few_shot(dataset.shuffle(seed=3), 4, seed)) == expected
    assert rows(few_shot(dataset.select(range(49, -1, -1)).flatten_indices(), 4, seed)) == expected
    halves = [base_new_split(set_)["new"] for set_ in (dataset, dataset.shuffle(seed=3))]
    assert rows(few_shot(halves[0], 4, seed)) == rows(few_shot(halves[1], 4, seed))


def test_fewer_shots_are_among_more():
    drawn = [rows(few_shot(tiny_images(50), shots, seed=2)) for shots in (2, 3, 10)]
    assert set(drawn[0]) < set(drawn[1]) < set(drawn[2])
    assert drawn[2] == rows(few_shot(tiny_images(50), 10, seed=7))  # all there are, in an order without chance


def test_few_shot_decodes_no_image_and_keeps_the_format():
    calls = []

    def transform(batch):
        calls.append(len(batch["label"]))
        return {"label": batch["label"]}

    plain = tiny_images(25)
    shots = few_shot(plain.with_transform(transform), 2)
    broken = [{"image": {"bytes": b"no image %d" % i, "path": None}, "label": i % 5} for i in range(25)]
    assert len(few_shot(datasets.Dataset.from_list(broken, features=plain.features), 2)) == 10
    assert not calls
    assert shots[0] == {"label": 0}
    assert few_shot(plain.with_format("numpy", columns=["label"]), 2).format["columns"] == ["label"]


@pytest.mark.parametrize(
    ("shots", "seed", "message"),
    [
        (0, 0, "shots=0 must be a whole number of at least 1"),
        (2.0, 0, "shots=2.0 must be a whole number"),
        (2, -1, "seed=-1 must be a whole number of at least 0"),
        (6, 0, "Class 'red cat' has 5 samples, fewer than the 6 asked for; lower shots"),
    ],
)
def test_few_shot_refuses(shots, seed, message):
    with pytest.raises((TypeError, ValueError), match=message):
        few_shot(tiny_images(25), shots, seed)


def test_few_shot_names_the_class_that_is_too_small():
    dataset = tiny_images(25)
    labels = dataset["label"]
    fewer = dataset.select([i for i in range(25) if labels[i] != 3 or i == 8])
    with pytest.raises(ValueError, match="Class 'black fish' has 1 samples, fewer than the 2"):
        few_shot(fewer, 2)


def test_rows_without_a_label_are_never_drawn():
    dataset = tiny_images(50)
    labels = [None if i < 10 else -1 if i < 20 else label for i, label in enumerate(dataset["label"])]
    unlabelled = dataset.remove_columns("label").add_column("label", labels, feature=dataset.features["label"])
    assert rows(few_shot(unlabelled, 6)) == rows(few_shot(dataset.select(range(20, 50)), 6))


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Paths of 20 images that all look the same."""
    image = tiny_images(1)["image"][0]
    paths = [str(tmp_path / f"{(7 * i) % 20:02d}.png") for i in range(20)]
    for path in paths:
        image.save(path)
    return paths


def from_cells(cells: list, **columns) -> datasets.Dataset:
    features = tiny_images(2, ["cat", "dog"]).features
    features.update({name: datasets.Value("int64") for name in columns})
    labels = [i % 2 for i in range(len(cells))]
    return datasets.Dataset.from_dict({"image": cells, "label": labels, **columns}, features=features)


def stored(dataset: datasets.Dataset) -> list[dict]:
    return dataset.cast_column("image", datasets.Image(decode=False)).to_list()


def test_images_with_a_path_each_are_ranked_by_it(files):
    by_path = from_cells([{"path": path, "bytes": None} for path in files])
    expected = stored(few_shot(by_path, 4))
    assert stored(few_shot(by_path.shuffle(seed=3), 4)) == expected
    twice = from_cells([{"path": path, "bytes": None} for path in [*files, *files[:2]]])
    assert stored(few_shot(twice.shuffle(seed=3), 4)) == stored(few_shot(twice, 4))
    # whatever their bytes, where there are some
    with_bytes = from_cells([{"path": f"gone/{Path(p).name}", "bytes": b"%d" % i} for i, p in enumerate(files)])
    drawn = stored(few_shot(with_bytes, 4))
    assert all(row["image"]["bytes"] for row in drawn)
    assert [Path(row["image"]["path"]).name for row in drawn] == [Path(row["image"]["path"]).name for row in expected]
    ranks = []
    for c in (0, 1):
        known = sorted(files[c::2])
        ranks.append([known.index(row["image"]["path"]) for row in expected if row["label"] == c])
        assert ranks[c] == sorted(ranks[c])
    assert ranks[0] != ranks[1]  # each class has a draw of its own


def test_without_a_path_each_images_are_ranked_by_their_bytes():
    own = [f"gone/{i}.png" for i in range(20)]
    some_paths = [[None] * 20, [""] * 20, ["same.png"] * 20, [*own[:19], None], [*own[:19], own[0]]]
    drawn = []
    for seed, paths in enumerate(some_paths):
        dataset = from_cells([{"path": path, "bytes": b"%02d" % i} for i, path in enumerate(paths)])
        drawn.append([row["image"]["bytes"] for row in stored(few_shot(dataset.shuffle(seed=seed), 9))])
    assert drawn == [drawn[0]] * 5
    assert drawn[0][:9] != sorted(drawn[0][:9])  # by a hash, not by the bytes themselves


def test_equal_images_are_told_apart_by_the_other_columns():
    cells = [{"path": None, "bytes": b"%d" % (i // 10)} for i in range(40)]
    dataset = from_cells(cells, number=list(range(40)))
    expected = stored(few_shot(dataset, 6))
    assert len({row["number"] for row in expected}) == 12
    assert stored(few_shot(dataset.shuffle(seed=3), 6)) == expected
    # yet another column does not change which images are drawn where no two are equal
    different = from_cells([{"path": None, "bytes": b"%d" % i} for i in range(40)])
    with_number = different.add_column("number", list(range(40)))
    assert stored(few_shot(with_number, 6).remove_columns("number")) == stored(few_shot(different, 6))


def test_sets_with_several_images_a_row_use_them_all():
    dataset = from_cells([{"path": None, "bytes": b"same"} for _ in range(20)])
    masks = [{"path": None, "bytes": b"%d" % i} for i in range(20)]
    dataset = dataset.add_column("mask", masks, feature=datasets.Image(decode=False))
    expected = stored(few_shot(dataset, 4))
    assert stored(few_shot(dataset.shuffle(seed=3), 4)) == expected
    assert len({row["mask"]["bytes"] for row in expected}) == 8


def test_labels_alone_are_enough():
    labels = tiny_images(50).remove_columns("image")
    assert few_shot(labels, 3)["label"] == [c for c in range(5) for _ in range(3)]
