"""Images of the user's own from folders, tables, lists and data sets, in one form."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value
from datasets import Image as ImageFeature
from PIL import Image

from peft_ncgeo.data import load_images

COLOURS = {"bullet_train": (250, 0, 0), "crab": (0, 250, 0), "wasp": (0, 0, 250)}


def draw(path, name):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), COLOURS[name]).save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of 3, 2 and 1 images; `bullet_train` has a word in it that `datasets` takes for a split."""
    root = tmp_path_factory.mktemp("images")
    for count, name in zip((3, 2, 1), COLOURS, strict=True):
        for i in range(count):
            draw(root / name / f"train_{i}.PNG", name)
    (root / ".hidden").mkdir()
    (root / "notes.txt").write_text("not an image")
    return root


@pytest.fixture(scope="module")
def table(folder):
    """The same images as paths relative to the folder, with names, in another order."""
    paths = sorted(folder.glob("*/*.PNG"), reverse=True)
    return pd.DataFrame({"file": [str(p.relative_to(folder)) for p in paths], "kind": [p.parent.name for p in paths]})


def by_colour(dataset, image="image", label="label") -> list[tuple[str, str]]:
    """The class that each image shows, and the class that its label says, sorted."""
    names = dataset.features[label].names
    shown = {colour: name for name, colour in COLOURS.items()}
    return sorted((shown[row[image].getpixel((0, 0))], names[row[label]]) for row in dataset)


def test_every_source_gives_the_same_images_and_classes(folder, table, tmp_path):
    from_folder = load_images(str(folder))
    expected = [(name, name) for count, name in zip((3, 2, 1), COLOURS, strict=True) for _ in range(count)]
    assert by_colour(from_folder) == expected
    assert from_folder.features["label"].names == list(COLOURS)
    columns = {"image_column": "file", "label_column": "kind"}
    table.to_csv(folder / "table.csv", index=False)  # beside the folders of classes
    whole = table.assign(file=[str(folder / path) for path in table["file"]])
    from_folder.save_to_disk(tmp_path / "saved")
    for source in (folder / "table.csv", whole, Dataset.from_pandas(whole, preserve_index=False)):
        found = load_images(source, **columns)
        assert by_colour(found, "file", "kind") == expected
        assert found.features["kind"].names == list(COLOURS)
    (folder / "table.csv").unlink()
    for found in (
        load_images(list(whole["file"]), labels=list(whole["kind"])),
        load_images(tmp_path / "saved"),
        load_images(DatasetDict(train=from_folder, test=from_folder), split="test"),
    ):
        assert by_colour(found) == expected
    unlabelled = load_images(sorted((folder / "crab").iterdir()))
    assert unlabelled.column_names == load_images(folder / "crab").column_names == ["image"]
    assert isinstance(unlabelled.features["image"], ImageFeature)
    assert len(unlabelled) == 2


@pytest.mark.slow
def test_numbers_are_read_in_the_order_of_the_names_that_are_given(folder, table):
    names = ["wasp", "crab", "bullet_train"]
    paths = [folder / path for path in table["file"]]
    for kind in (int, str, np.float32, "{:02}".format):
        labels = [kind(names.index(name)) for name in table["kind"]]
        found = load_images(paths, labels=labels, class_names=names)
        assert found.features["label"].names == names
        assert all(shown == told for shown, told in by_colour(found))
    with pytest.raises(ValueError, match="numbers, 0 to 2; name the classes.*class_names"):
        load_images(paths, labels=labels)
    assert load_images(paths, labels=labels, class_names=["00", "01", "02"])["label"][:] == list(map(int, labels))
    empty = load_images(paths, labels=[None, "", *labels[2:]], class_names=names)
    assert empty["label"][:3] == [None, None, int(labels[2])]


@pytest.mark.slow
def test_splits(tmp_path):
    for split, names in {"train": COLOURS, "val": ["crab"], "test": ["wasp", "crab"]}.items():
        for name in names:
            draw(tmp_path / split / name / "a.png", name)
    parts = load_images(tmp_path)
    assert list(parts) == ["train", "validation", "test"]
    assert all(part.features["label"].names == list(COLOURS) for part in parts.values())
    assert by_colour(parts["test"]) == [("crab", "crab"), ("wasp", "wasp")]
    assert by_colour(load_images(tmp_path, split="validation")) == [("crab", "crab")]
    with pytest.raises(ValueError, match="No split.*'dev'.*'validation'"):
        load_images(tmp_path, split="dev")
    with pytest.raises(ValueError, match="'wasp'.*'test'.*not in 'train'"):
        load_images(DatasetDict(train=parts["validation"], test=parts["test"]))
    texts = Features(image=ImageFeature(), label=Value("string"))
    rows = {"image": parts["test"]["image"][:], "label": ["crab", "wasp"]}
    both = Dataset.from_dict(rows, features=texts)
    found = load_images(DatasetDict(train=both, test=both.select([1])))["test"]
    assert by_colour(found) == [("wasp", "wasp")]  # numbered as in training, not 0
    with pytest.raises(ValueError, match="'wasp'.*'test'.*training"):
        load_images(DatasetDict(train=both.select([0]), test=both))


@pytest.mark.slow
def test_a_multi_label_column_stays():
    label = Sequence(ClassLabel(names=["crab", "wasp"]))
    rows = {"image": [Image.new("RGB", (4, 4))], "label": [[0, 1]]}
    found = load_images(Dataset.from_dict(rows, features=Features(image=ImageFeature(), label=label)))
    assert found["label"][:] == [[0, 1]]


def test_refusals_name_the_thing_and_the_mend(folder, table, tmp_path):
    paths = [str(folder / path) for path in table["file"]]
    whole, names = table.assign(file=paths), list(table["kind"])
    broken = tmp_path / "table.csv"
    table.to_csv(broken, index=False)
    columns = {"image_column": "file", "label_column": "kind"}
    for expected, source, options in (
        (r"'.*no.png'.*1 of 7 are missing", [*paths, "no.png"], {}),
        (r"no file.*wasp.*relative to its folder", broken, columns),
        ("No column 'image' among.*image_column", whole, {}),
        ("No column 'label' among.*label_column=None", whole, {"image_column": "file"}),
        ("number 3 and the name 'bullet", paths, {"labels": ["3", *names[1:]]}),
        ("6 paths and 5 labels", paths, {"labels": names[1:]}),
        ("Class 'wasp' of row 0.*class_names", paths, {"labels": names, "class_names": ["crab", "bullet_train"]}),
        ("Number '4' of row 0", paths, {"labels": [4] + [0] * 5, "class_names": ["crab", "wasp"]}),
        ("Row 0 of column .*0.5", paths, {"labels": [0.5] * 6}),
        ("no labels", paths, {"class_names": ["crab", "wasp"]}),
        ("does not exist", "./nowhere", {}),
        ("does not exist", "nowhere.csv", {}),
        ("Row 0 holds None", pd.DataFrame({"image": [None]}), {}),
        ("source must be.*got int", 3, {}),
        ("has none; leave split out", whole, {**columns, "split": "train"}),
        ("both 'file'", whole, {"image_column": "file", "label_column": "file"}),
    ):
        with pytest.raises((ValueError, TypeError), match=expected) as refused:
            load_images(source, **options)
        assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_folders_of_an_unclear_shape_are_refused(tmp_path):
    draw(tmp_path / "a" / "crab" / "deep" / "x.png", "crab")
    draw(tmp_path / "b" / "crab" / "x.png", "crab")
    draw(tmp_path / "b" / "y.png", "crab")
    draw(tmp_path / "c" / "train" / "crab" / "x.png", "crab")
    draw(tmp_path / "c" / "wasp" / "x.png", "wasp")
    draw(tmp_path / "d" / "crab" / "x.png", "crab")
    (tmp_path / "d" / "wasp").mkdir()
    (tmp_path / "e").mkdir()
    draw(tmp_path / "f" / "x.png", "crab")
    (tmp_path / "f" / "metadata.csv").write_text("file_name,label\nx.png,crab\n")
    expected = {"a": "'deep'", "b": "'y.png'", "c": "'wasp'.*'train'", "d": "wasp holds no images", "e": "no images"}
    for name, message in {**expected, "f": "metadata.csv"}.items():
        with pytest.raises(ValueError, match=message):
            load_images(tmp_path / name)
    found = load_images(tmp_path / "f" / "metadata.csv", image_column="file_name")
    assert by_colour(found, "file_name") == [("crab", "crab")]
