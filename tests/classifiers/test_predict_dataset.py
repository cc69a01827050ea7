"""Tables of predictions: the rows of `predict_proba`, whatever the images come in, and at most a few batches held."""

from __future__ import annotations

import io
import os
import resource
from weakref import ref

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import ExifTags, Image
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from peft_ncgeo import CoPAConfig, ZeroShotClassifier, adapt
from peft_ncgeo.classifiers.trained import TrainedClassifier
from peft_ncgeo.data.reading import read_image
from peft_ncgeo.few_shot import TipAdapter
from peft_ncgeo.hub import export_classifier
from peft_ncgeo.training import align_classifier

from ..conftest import NAMES, VIT, tiny, tiny_clip, tiny_images, tiny_processor, tiny_vit, tiny_vit_classifier
from ..errors import message

IMAGES = tiny_images(7, seed=2)["image"][:]
SUPPORT = tiny_images(10)
pytestmark = pytest.mark.filterwarnings("ignore:The head belongs", "ignore:Left out")


def named_vit():
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: k for k, name in enumerate(NAMES)}}
    return tiny(ViTForImageClassification, ViTConfig(**{**VIT, **labels}))


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    processor, support = tiny_processor(), (SUPPORT["image"][:], SUPPORT["label"][:])
    export = export_classifier(tiny_clip(), NAMES, tmp_path_factory.mktemp("export") / "pandas", processor)
    tip = {"class_names": NAMES, "head": TipAdapter(), "num_views": 0, "processor": processor}
    return {
        "zero-shot": ZeroShotClassifier(tiny_clip(), processor),
        "copa": adapt(get_peft_model(tiny_vit(), CoPAConfig()), *support, steps=2, processor=processor),
        "tip-adapter": adapt(tiny_clip(), *support, **tip),
        "aligned texts": align_classifier(tiny_clip(), SUPPORT, 0.5, processor),
        "aligned head": align_classifier(named_vit(), SUPPORT, 0.5, processor.image_processor),
        "exported": TrainedClassifier.from_pretrained(export),
        "trained": TrainedClassifier(named_vit(), processor),
    }


@pytest.fixture(scope="module")
def zero_shot(classifiers):
    return classifiers["zero-shot"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven images, one of them on its side, among files that are broken, hidden or of other kinds."""
    root = tmp_path_factory.mktemp("photos")
    (root / "b" / "deep").mkdir(parents=True)
    (root / ".cache").mkdir()
    places = ["a.png", "b/c.PNG", "b/deep/d.bmp", "b/e.jpg", "f.tiff", "g.gif", "h.webp"]
    for place, image in zip(places, IMAGES, strict=True):
        image.save(root / place, exif=exif() if place.endswith("jpg") else b"")
    for place in ("b/broken.jpg", "notes.txt", ".hidden.png", ".cache/i.png"):
        (root / place).write_bytes(b"no image")
    (root / "b" / "loop").symlink_to(root)
    return root, [root / place for place in ["a.png", "b/broken.jpg", *places[1:2], *places[2:]]]


def exif() -> Image.Exif:
    found = Image.Exif()
    found[ExifTags.Base.Orientation] = 6
    return found


def best(probabilities: torch.Tensor, names: list, k: int = 1) -> list[list]:
    """Names and probabilities of the k best, one after the other, of each row."""
    order = np.argsort(-probabilities.numpy(), axis=1, kind="stable")[:, :k]
    return [[x for i in row for x in (names[i], float(p[i]))] for row, p in zip(order, probabilities, strict=True)]


def assert_same(found: list[list], expected: list[list]) -> None:
    assert [row[::2] for row in found] == [row[::2] for row in expected]
    np.testing.assert_allclose([row[1::2] for row in found], [row[1::2] for row in expected], rtol=1e-5)


def rows(table: pd.DataFrame, k: int = 1) -> list[list]:
    columns = [f"{name}{f'_{i}' if i else ''}" for i in (0, *range(2, k + 1)) for name in ("name", "probability")]
    return table[columns].to_numpy(dtype=object).tolist()


def test_rows_are_the_probabilities_of_the_files_of_a_folder(classifiers, folder):
    """Of every classifier; a broken file is a row that says so; two processes give what one gives."""
    root, files = folder
    good = [file for file in files if file.name != "broken.jpg"]
    for kind, classifier in classifiers.items():
        names = [*range(5)] if kind == "copa" else NAMES
        named = {"class_names": NAMES} if kind == "zero-shot" else {}
        table = classifier.predict_dataset(root, top_k=2, **named)
        assert [*table] == ["path", "name", "probability", "name_2", "probability_2", "error"], kind
        assert table["path"].tolist() == sorted(map(str, files), key=lambda path: path.split("/"))
        broken = table["path"].str.endswith("broken.jpg")
        assert table["error"].notna().tolist() == broken.tolist()
        assert "cannot be read" in table.loc[broken, "error"].item()
        assert table.loc[broken, ["name", "probability", "name_2", "probability_2"]].isna().all(axis=None)
        read = table[~broken].set_index("path").loc[[*map(str, good)]]
        probabilities = classifier.predict_proba([read_image(file) for file in good], **named)
        assert torch.equal(classifier.predict_proba((str(file) for file in good), **named), probabilities)
        assert read["name"].tolist() == classifier(good, **named) == classifier.predict(good, **named), kind
        assert_same(rows(read, 2), best(probabilities, names, 2))
        few = classifier.top_k(good, k=2, **named)
        assert [[x for pair in row for x in pair] for row in few] == rows(read, 2)
    for workers, size in ((2, 3), (0, 3)):
        found = classifiers["trained"].predict_dataset(root, batch_size=size, num_workers=workers, top_k=2)
        pd.testing.assert_frame_equal(found, classifiers["trained"].predict_dataset(root, top_k=2), rtol=1e-5)


def test_images_of_every_kind_and_what_is_refused(zero_shot, classifiers, folder, tmp_path):
    arrays = [np.asarray(image) for image in IMAGES]
    grey = [image.convert("L") for image in IMAGES]
    expected, of_grey = (zero_shot.predict_proba(images, NAMES) for images in (IMAGES, grey))
    for given in (arrays, iter(arrays), np.stack(arrays), tuple(IMAGES)):
        assert torch.equal(zero_shot.predict_proba(given, NAMES), expected)
    assert torch.equal(zero_shot.predict_proba([np.asarray(image) for image in grey], NAMES), of_grey)
    assert torch.equal(zero_shot.predict_proba(arrays[3], NAMES), zero_shot.predict_proba(IMAGES[3], NAMES))
    table = zero_shot.predict_dataset(iter([*IMAGES, arrays[0] / 255.0]), NAMES, batch_size=3)
    assert table["row"].tolist() == [*range(8)]
    assert_same(rows(table)[:7], best(expected, NAMES))
    assert "uint8" in table["error"][7]
    for wrong in (arrays[0] / 255, arrays[0].astype(int), arrays[0].transpose(2, 0, 1), arrays[0][..., :2]):
        for classifier, named in ((zero_shot, (NAMES,)), (classifiers["copa"], ())):
            assert "uint8" in message(lambda w=wrong, c=classifier, n=named: c.predict([w], *n), ValueError)
    missing = tmp_path / "missing.png"
    assert "'" + str(missing)[:20] in message(lambda: zero_shot.predict([IMAGES[0], missing], NAMES), ValueError)
    assert "predict_dataset" in message(lambda: zero_shot.predict(tmp_path, NAMES), ValueError)
    assert "no folder" in message(lambda: zero_shot.predict_dataset(tmp_path / "none", NAMES), FileNotFoundError)
    assert "no image files" in message(lambda: zero_shot.predict_dataset(tmp_path, NAMES), ValueError)
    (tmp_path / "a.txt").touch()
    (tmp_path / ".b.png").touch()
    told = message(lambda: zero_shot.predict_dataset(tmp_path, NAMES), ValueError)
    assert "1 of other kinds" in told
    assert "1 hidden" in told
    with pytest.warns(UserWarning, match=r"1 of other kinds, such as .*notes.txt.*2 hidden"):
        zero_shot.predict_dataset(folder[0], NAMES)
    assert "neither a folder nor an image" in message(
        lambda: zero_shot.predict_dataset(tmp_path / "a.txt", NAMES), ValueError
    )
    assert "no images" in message(lambda: zero_shot.predict_dataset([], NAMES), ValueError)
    splits = datasets.DatasetDict(test=SUPPORT)
    assert "one of its splits" in message(lambda: zero_shot.predict_dataset(splits, NAMES), TypeError)
    assert "'picture'" in message(
        lambda: zero_shot.predict_dataset(SUPPORT, NAMES, image_column="picture"), ValueError
    )
    for name, value in {"top_k": 0, "num_workers": -1, "batch_size": 0, "num_test_views": 3}.items():
        assert name in message(lambda n=name, v=value: zero_shot.predict_dataset(IMAGES, NAMES, **{n: v}), ValueError)


def test_data_sets_and_their_streams(zero_shot):
    """A damaged cell and a label that is not known are rows of their own."""
    cells = [{"bytes": png(image), "path": None} for image in IMAGES]
    cells[2] = {"bytes": b"no image", "path": None}
    labels = [0, 1, 2, 3, -1, 0, 1]
    data = Dataset.from_dict({"image": cells, "label": labels}, features=SUPPORT.features)
    table = zero_shot.predict_dataset(data, NAMES, batch_size=3)
    assert [*table] == ["row", "label", "name", "probability", "error"]
    assert table["label"].tolist() == [None if label < 0 else NAMES[label] for label in labels]
    expected = best(zero_shot.predict_proba(IMAGES, NAMES), NAMES)
    assert table["error"].notna().tolist() == table["name"].isna().tolist() == [i == 2 for i in range(7)]
    assert_same(rows(table.drop(2)), expected[:2] + expected[3:])
    for same in (data.to_iterable_dataset(), data.with_format("torch")):
        pd.testing.assert_frame_equal(zero_shot.predict_dataset(same, NAMES, batch_size=3), table)
    turned = data.select([0, 1]).with_transform(lambda batch: {"image": [i.rotate(90) for i in batch["image"]]})
    expected = zero_shot.predict_proba([image.rotate(90) for image in IMAGES[:2]], NAMES)
    assert_same(rows(zero_shot.predict_dataset(turned, NAMES)), best(expected, NAMES))


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "png")
    return stream.getvalue()


def test_a_few_batches_are_held_and_files_are_closed(zero_shot, tmp_path):
    held, most = [], 0

    def images(count):
        nonlocal most
        for i in range(count):
            most = max(most, sum(image() is not None for image in held))
            image = Image.new("RGB", (4, 4), (i, 0, 0))
            held.append(ref(image))
            yield image
            del image

    assert len(zero_shot.predict_dataset(images(40), NAMES, batch_size=4)) == 40
    assert most <= 3 * 4
    most = 0
    assert len(zero_shot.predict(images(40), NAMES, batch_size=4)) == 40
    assert most <= 3 * 4
    IMAGES[0].save(tmp_path / "a.png")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 30, before[1]))
    try:
        many = [tmp_path / "a.png"] * 100
        assert len(set(zero_shot.predict(many, NAMES))) == 1
        assert len(set(zero_shot.predict_dataset(many, NAMES)["name"])) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_trained_classifiers_from_folders(tmp_path):
    """An adapter and a whole model; a backbone alone would have a head at random."""
    base, processor = named_vit(), tiny_processor().image_processor
    expected = base(processor(images=IMAGES, return_tensors="pt")["pixel_values"]).logits.softmax(-1).detach()
    base.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    loaded = TrainedClassifier.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(loaded.predict_proba(IMAGES), expected)
    assert loaded.class_names == NAMES
    model = get_peft_model(named_vit(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    tuned = TrainedClassifier.from_pretrained(tmp_path / "adapter", base_model=str(tmp_path / "whole"))
    direct = TrainedClassifier(model.eval(), processor).predict_proba(IMAGES)
    assert torch.equal(tuned.predict_proba(IMAGES), direct)
    assert not torch.allclose(direct, expected, atol=1e-5)
    unnamed = TrainedClassifier(tiny_vit_classifier(), processor)
    assert unnamed.predict(IMAGES) == unnamed.predict_proba(IMAGES).argmax(1).tolist()
    tiny_vit().save_pretrained(tmp_path / "backbone")
    assert "random" in message(lambda: TrainedClassifier.from_pretrained(tmp_path / "backbone"), ValueError)
    assert "ZeroShotClassifier" in message(lambda: TrainedClassifier(tiny_clip(), processor), ValueError)
    assert "no classification head" in message(lambda: TrainedClassifier(ViTModel(ViTConfig(**VIT)), processor))
    assert "class_names" in message(lambda: loaded.predict(IMAGES, class_names=["a", "b"]), ValueError)


def test_an_image_with_damaged_features_is_a_row(zero_shot, monkeypatch):
    damage = iter([1.0, torch.tensor([[1.0], [torch.nan], [1.0]]), 1.0])
    real = zero_shot._features
    monkeypatch.setattr(zero_shot, "_features", lambda views: [f * next(damage) for f in real(views)])
    table = zero_shot.predict_dataset(IMAGES, NAMES, batch_size=3)
    assert table["error"].notna().tolist() == [False] * 4 + [True] + [False] * 2
    assert "not finite" in table["error"][4]
    assert table["name"].isna().tolist() == table["error"].notna().tolist()
