from __future__ import annotations

import hashlib
from pathlib import Path

import datasets
import pytest

from peft_ncgeo.data import base_new_split, few_shot, load_image_demo, long_tailed, step_imbalanced

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
    with pytest.raises(ValueError, match="Class 'black fish'.*1.*fewer.*2"):
        few_shot(fewer, 2)


def test_rows_without_a_label_are_never_drawn():
    dataset = tiny_images(50)
    labels = [None if i < 10 else -1 if i < 20 else label for i, label in enumerate(dataset["label"])]
    unlabelled = dataset.remove_columns("label").add_column("label", labels, feature=dataset.features["label"])
    assert rows(few_shot(unlabelled, 6)) == rows(few_shot(dataset.select(range(20, 50)), 6))


def from_cells(cells: list, **columns) -> datasets.Dataset:
    features = tiny_images(2, ["cat", "dog"]).features
    features.update({name: datasets.Value("int64") for name in columns})
    labels = [i % 2 for i in range(len(cells))]
    return datasets.Dataset.from_dict({"image": cells, "label": labels, **columns}, features=features)


def stored(dataset: datasets.Dataset) -> list[dict]:
    return dataset.cast_column("image", datasets.Image(decode=False)).to_list()


def relabelled(dataset: datasets.Dataset, labels: list[int], names: list[str]) -> datasets.Dataset:
    return dataset.remove_columns("label").add_column("label", labels, feature=datasets.ClassLabel(names=names))


def in_four(dataset: datasets.Dataset) -> datasets.Dataset:
    """Four classes, by the label and the image's first number."""
    return relabelled(dataset, [2 * label + image[0] % 2 for image, label in rows(dataset)], list("abcd"))


def test_a_copy_gives_the_same_shots_wherever_it_lies(tmp_path):
    folders = tmp_path / "here", tmp_path / "elsewhere" / "copy"
    for folder, step in zip(folders, (1, 7), strict=True):  # under other names
        for i, row in enumerate(tiny_images(60, ["cat", "dog"])):
            path = folder / ("cat", "dog")[row["label"]] / f"{step * i % 60:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(path)
    cache = str(tmp_path / "cache")
    original, moved = (
        datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=cache)
        for folder in folders
    )
    files, labels = [Path(row["image"]["path"]) for row in stored(original)], original["label"][:]
    # as on the Hub: the bytes in the set, under the files' bare names
    pushed = from_cells([{"path": file.name, "bytes": file.read_bytes()} for file in files])
    nameless = from_cells([{"path": None, "bytes": file.read_bytes()} for file in files])
    pushed, nameless = (relabelled(copy, labels, ["cat", "dog"]) for copy in (pushed, nameless))
    pushed.to_parquet(tmp_path / "copy.parquet")
    parquet = datasets.Dataset.from_parquet(str(tmp_path / "copy.parquet"), cache_dir=cache)
    for draw in (
        lambda dataset: few_shot(dataset, 4, seed=1),
        lambda dataset: long_tailed(dataset, imbalance_factor=4, seed=1, shuffle_classes=True),
        lambda dataset: step_imbalanced(dataset, ratio=3, n_max=9, seed=2),
        lambda dataset: few_shot(base_new_split(in_four(dataset))["new"], 2),
    ):
        expected = rows(draw(original))
        assert len(set(expected)) == len(expected)
        for copy in (moved, pushed, parquet, nameless, pushed.shuffle(seed=3)):
            assert rows(draw(copy)) == expected


def test_images_are_ranked_by_their_bytes_whatever_their_paths():
    own = [f"gone/{i}.png" for i in range(20)]
    some_paths = [[None] * 20, [""] * 20, own, own[::-1], ["same.png"] * 20, [*own[:19], None], [*own[:19], own[0]]]
    drawn = []
    for seed, paths in enumerate(some_paths):
        dataset = from_cells([{"path": path, "bytes": b"%02d" % i} for i, path in enumerate(paths)])
        drawn.append([row["image"]["bytes"] for row in stored(few_shot(dataset.shuffle(seed=seed), 9))])
    assert drawn == [drawn[0]] * 7
    assert drawn[0][:9] != sorted(drawn[0][:9])  # by a hash, not by the bytes themselves


def test_a_file_that_is_gone_is_named():
    with pytest.raises(ValueError, match="Column 'image': cannot read 'gone/1.png'"):
        few_shot(
            from_cells([{"path": f"gone/{i % 2}.png", "bytes": b"0" if i % 2 == 0 else None} for i in range(4)]), 1
        )


def test_the_demos_shots_stay():
    """Those that the tables in README are made of."""
    train = load_image_demo().splits["train"]
    drawn = hashlib.sha256(b"".join(image for image, _ in rows(few_shot(train, 2, seed=1)))).hexdigest()
    assert drawn.startswith("bf897f0e05d4c345")


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
