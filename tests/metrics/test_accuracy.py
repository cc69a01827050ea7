from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image

from peft_ncgeo import ZeroShotClassifier
from peft_ncgeo.data import base_new_split
from peft_ncgeo.evaluation import evaluate_base_new, evaluate_groups
from peft_ncgeo.metrics.accuracy import class_groups

from ..conftest import NAMES, tiny_clip, tiny_images, tiny_processor
from ..training.runs import prompted_clip, trainer

# ---- many, medium and few ---------------------------------------------------------------------------------------

COUNTS = [500, 101, 100, 21, 20, 1, 0]
LABELS = [0, 0, 0, 1, 2, 3, 3, 4, 5, 6]
PREDICTIONS = [0, 1, 0, 1, 2, 3, 0, 0, 5, 0]


def test_groups_at_the_thresholds():
    groups = class_groups(COUNTS)
    assert {name: indices.tolist() for name, indices in groups.items()} == {
        "many": [0, 1],
        "medium": [2, 3],
        "few": [4, 5, 6],
    }
    other = class_groups([3, 1, 2, 4], thresholds=(1, 3))
    assert {name: indices.tolist() for name, indices in other.items()} == {"many": [3], "medium": [0, 2], "few": [1]}


def test_accuracy_of_each_group_is_a_mean_over_samples():
    assert evaluate_groups(PREDICTIONS, LABELS, COUNTS) == {
        "many": pytest.approx(3 / 4),  # a mean over classes would be (2/3 + 1) / 2
        "medium": pytest.approx(2 / 3),
        "few": pytest.approx(1 / 3),
    }


@pytest.mark.parametrize("thresholds", [(20, 100), (5, 60), "thirds"])
def test_groups_against_a_loop(thresholds):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 130, 11)
    labels = rng.integers(0, 11, 300)
    predictions = np.where(rng.random(300) < 0.6, labels, rng.integers(0, 11, 300))
    if thresholds == "thirds":
        ranked = sorted(range(11), key=lambda k: (-counts[k], k))
        group_of = {k: ("many" if r < 4 else "medium" if r < 8 else "few") for r, k in enumerate(ranked)}
    else:
        low, high = thresholds
        group_of = {k: "many" if n > high else "few" if n <= low else "medium" for k, n in enumerate(counts)}
    expected = {}
    for name in ("many", "medium", "few"):
        hits = [p == y for p, y in zip(predictions, labels, strict=True) if group_of[y] == name]
        expected[name] = pytest.approx(sum(hits) / len(hits))
    got = evaluate_groups(predictions, labels, counts, thresholds)
    assert list(got) == ["many", "medium", "few"]
    assert got == expected
    assert evaluate_groups(torch.tensor(predictions), torch.tensor(labels), torch.tensor(counts), thresholds) == got


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([1, 5, 3, 5, 2, 4], [[1, 3], [5, 2], [4, 0]]),
        ([7, 7, 7, 7], [[0, 1], [2], [3]]),
        ([1, 2, 3, 4, 5], [[4, 3], [2, 1], [0]]),
        ([1, 2], [[1], [0], []]),
        ([0, 2, 1], [[1], [2], [0]]),
        ([3, 4] * 15, [[*range(1, 20, 2)], [*range(21, 30, 2), *range(0, 10, 2)], [*range(10, 30, 2)]]),
    ],
)
@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_thirds(counts, expected, dtype):
    assert [part.tolist() for part in class_groups(np.array(counts, dtype), "thirds").values()] == expected


def test_a_group_without_classes_or_samples_is_none():
    assert evaluate_groups([0, 0], [0, 1], [200, 150]) == {"many": 0.5, "medium": None, "few": None}
    assert evaluate_groups([2], [2], [200, 50, 2]) == {"many": None, "medium": None, "few": 1.0}
    assert evaluate_groups([], [], [200, 50, 2]) == {"many": None, "medium": None, "few": None}
    assert evaluate_groups([1], [0], [2, 1], "thirds") == {"many": 0.0, "medium": None, "few": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predictions": [0, 1]}, r"both be \(N,\) class indices, got \(2,\) and \(3,\)"),
        ({"predictions": np.zeros((3, 4))}, r"got \(3, 4\) and \(3,\); take the argmax of logits"),
        ({"predictions": np.zeros((3, 1)), "labels": np.zeros((3, 1))}, r"got \(3, 1\) and \(3, 1\)"),
        ({"labels": [0, 4, 1]}, "Label 4 is not an index of the 4 classes"),
        ({"labels": [0, 1, -1]}, "Label -1 is not an index"),
        ({"labels": [0, 1, 1.5]}, "Label 1.5 must be a class index"),
        ({"class_counts": [[1, 2, 3, 4]]}, "class_counts must be one number of at least 0 for each class"),
        ({"class_counts": []}, "class_counts must be one number"),
        ({"class_counts": [1, 2, -3, 4]}, "class_counts must be one number of at least 0"),
        ({"class_counts": [1, 2, math.nan, 4]}, "class_counts must be one number of at least 0"),
        ({"thresholds": (20, 20)}, r"thresholds=\(20, 20\) must be \(low, high\) with low < high"),
        ({"thresholds": (100, 20)}, r'with low < high, or "thirds"'),
        ({"thresholds": (1, 2, 3)}, r"thresholds=\(1, 2, 3\) must be"),
        ({"thresholds": "12"}, "thresholds='12' must be"),
    ],
)
def test_evaluate_groups_refuses(change, message):
    arguments = {"predictions": [0, 1, 2], "labels": [0, 1, 2], "class_counts": [1, 30, 200, 4], **change}
    with pytest.raises(ValueError, match=message):
        evaluate_groups(**arguments)


# ---- base and new -----------------------------------------------------------------------------------------------


def halves(count: int = 45, seed: int = 5) -> DatasetDict:
    return base_new_split(tiny_images(count, seed=seed))


@pytest.mark.parametrize("build", [tiny_clip, prompted_clip])
def test_base_new_equals_the_trainers(build, tmp_path):
    run = trainer(tmp_path, build(), eval_dataset=dict(halves()))
    if build is prompted_clip:
        run.train()
    metrics = run.evaluate()
    got = evaluate_base_new(ZeroShotClassifier(run.model, tiny_processor()), halves(), batch_size=7)
    assert got == {
        "base": pytest.approx(metrics["eval_base_accuracy"]),
        "new": pytest.approx(metrics["eval_new_accuracy"]),
        "harmonic_mean": pytest.approx(metrics["eval_harmonic_mean"]),
    }
    assert 0 < got["base"] < 1


def test_base_new_against_one_image_at_a_time():
    classifier = ZeroShotClassifier(prompted_clip(), tiny_processor())
    shares = []
    for half, names in (("base", NAMES[:3]), ("new", NAMES[3:])):
        hits = [classifier.predict(row["image"], names) == [names[row["label"]]] for row in halves()[half]]
        shares.append(sum(hits) / len(hits))
    got = evaluate_base_new(classifier, halves())
    assert [got["base"], got["new"]] == pytest.approx(shares)
    assert got["harmonic_mean"] == pytest.approx(2 / (1 / shares[0] + 1 / shares[1]))
    assert set(got) == {"base", "new", "harmonic_mean"}


def test_images_are_decoded_batch_by_batch_and_names_encoded_once(monkeypatch):
    decoded, events = [], []

    def transform(batch):
        decoded.extend(batch["label"])
        return batch

    splits = {half: dataset.with_transform(transform) for half, dataset in halves().items()}
    classifier = ZeroShotClassifier(tiny_clip(), tiny_processor())
    predict = classifier.predict_proba

    def watched(images, *args, **kwargs):
        events.append((len(images), len(decoded), classifier.text_features(kwargs["class_names"]).data_ptr()))
        return predict(images, *args, **kwargs)

    monkeypatch.setattr(classifier, "predict_proba", watched)
    evaluate_base_new(classifier, splits, batch_size=10)
    assert [event[0] for event in events] == [10, 10, 7, 10, 8]
    assert [event[1] for event in events] == [10, 20, 27, 37, 45]
    assert len({event[2] for event in events}) == 2


def test_long_sets_get_a_bar(capfd):
    classifier = ZeroShotClassifier(tiny_clip(), tiny_processor())
    evaluate_base_new(classifier, halves(15), batch_size=9)
    assert "Evaluating" not in capfd.readouterr().err
    evaluate_base_new(classifier, halves(50), batch_size=1)
    err = capfd.readouterr().err
    assert "Evaluating base" in err
    assert "Evaluating new" in err


def test_columns_may_have_other_names():
    classifier = ZeroShotClassifier(tiny_clip(), tiny_processor())
    renamed = halves().rename_columns({"image": "picture", "label": "kind"})
    assert evaluate_base_new(classifier, renamed, "picture", "kind") == evaluate_base_new(classifier, halves())


def test_no_hit_at_all_is_zero():
    """Labels that say the other class of two, so that every prediction is wrong."""
    classifier = ZeroShotClassifier(tiny_clip(), tiny_processor())
    new = halves()["new"]
    names = new.features["label"].names
    wrong = [1 - names.index(name) for name in classifier.predict(new["image"][:], names)]
    new = new.remove_columns("label").add_column("label", wrong, feature=new.features["label"])
    got = evaluate_base_new(classifier, {"base": new, "new": new})
    assert got == {"base": 0.0, "new": 0.0, "harmonic_mean": 0.0}


def test_base_new_refuses():
    classifier = ZeroShotClassifier(tiny_clip(), tiny_processor())
    good = halves(10)
    plain = Dataset.from_dict({"image": [Image.new("RGB", (4, 4))], "label": [0]})
    cases = [
        ({"base": good["base"]}, "No half 'new' among \\['base'\\]; base_new_split"),
        ({"new": good["new"], "train": good["base"]}, "No half 'base' among \\['new', 'train'\\]"),
        ({"base": good["base"], "new": good["new"].select([])}, "Half 'new': The data set is empty"),
        ({"base": plain, "new": good["new"]}, "Half 'base': Column 'label' is not a ClassLabel"),
    ]
    for splits, message in cases:
        with pytest.raises(ValueError, match=message):
            evaluate_base_new(classifier, splits)
    with pytest.raises(TypeError, match="Half 'new': Expected a datasets.Dataset, got NoneType"):
        evaluate_base_new(classifier, {"base": good["base"], "new": None})
    with pytest.raises(TypeError, match='splits must map "base" and "new" to data sets, got Dataset'):
        evaluate_base_new(classifier, good["base"])
    with pytest.raises(TypeError, match="Expected a ZeroShotClassifier.*, got CLIPModel"):
        evaluate_base_new(tiny_clip(), good)
    with pytest.raises(ValueError, match="batch_size=0 must.*whole.*least 1"):
        evaluate_base_new(classifier, good, batch_size=0)
